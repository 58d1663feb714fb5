"""Options that several benchmarks share; their defaults stand in the signatures of the commands."""

from pathlib import Path
from typing import Annotated, Literal

import typer

Json = Annotated[bool, typer.Option("--json", help="Print the rows as one JSON array.")]
Out = Annotated[
    Path | None, typer.Option(help="File to write the rows to as they come, .json or .csv.")
]
SeqLens = Annotated[
    list[int] | None, typer.Option(help="Events of a user; repeat for several. [default: 1000]")
]
NumDomains = Annotated[
    list[int] | None, typer.Option(help="Domains; repeat for several. [default: 1, 5, 10]")
]
NumDomainsServed = Annotated[
    list[int] | None, typer.Option(help="Domains; repeat for several. [default: 5]")
]
Skews = Annotated[
    list[float] | None,
    typer.Option(
        help="Share of the first domain, or 0 for equal shares; repeat for several. [default: 0]"
    ),
]
Interleavings = Annotated[
    list[str] | None,
    typer.Option(
        help="Order of a user's domains: random, or blocks, one after the other; repeat for both. "
        "[default: random]"
    ),
]
Sweep = Annotated[
    bool,
    typer.Option(
        "--sweep",
        help="Measure a preset of cases instead: lengths from 256 to 16384, 1 to 64 domains, "
        "several skews and both interleavings, one of them changed at a time.",
    ),
]
Providers = Annotated[
    list[str] | None,
    typer.Option("--provider", help="Provider to measure; repeat for several. [default: all]"),
]
Against = Annotated[
    list[str] | None,
    typer.Option(
        help="Provider that the others' times are compared with; repeat for several. "
        "[default: reference]"
    ),
]
AgainstDense = Annotated[
    list[str] | None,
    typer.Option(
        help="Provider that the others' times are compared with; repeat for several. "
        "[default: dense]"
    ),
]
DType = Annotated[
    Literal["float32", "bfloat16", "float16"], typer.Option(help="Type of all numbers.")
]
Bias = Annotated[
    bool,
    typer.Option("--bias/--no-bias", help="Use the relative bias, where a provider has one."),
]
Plan = Annotated[
    Literal["each", "once"],
    typer.Option(
        help="Build groupings and masks in each pass, or once before all of them, as the layers "
        "of a model share them."
    ),
]
BatchSize = Annotated[int, typer.Option(min=1, help="Users of a batch.")]
Heads = Annotated[int, typer.Option(help="Attention heads.")]
Dqk = Annotated[int, typer.Option(help="Width of queries and keys in a head.")]
Dv = Annotated[int, typer.Option(help="Width of values in a head.")]
Width = Annotated[int, typer.Option(help="Width of the model.")]
Layers = Annotated[int, typer.Option(help="Layers of the model.")]
Threads = Annotated[int, typer.Option(min=1, help="Threads of PyTorch.")]
Repeats = Annotated[int, typer.Option(min=1, help="Timed passes of each provider.")]
RetrievalItems = Annotated[
    int | None,
    typer.Option(min=1000, help="Also time the search for the best of so many items, 1000000 say."),
]
Device = Annotated[Literal["cpu", "cuda"], typer.Option(help="Where to run.")]
