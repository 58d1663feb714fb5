"""Options of the benchmarks and what is made of them; the commands hold the defaults."""

import json
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from hstu_xd.errors import HstuXdError, InputError

if TYPE_CHECKING:
    from hstu_xd.bench.cases import Case

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
SearchedEvents = Annotated[
    list[int] | None,
    typer.Option(
        min=100,
        help="Events of the searched user; repeat for several. [default: 10000, 100000, 1000000]",
    ),
]
OpenedEvents = Annotated[
    int | None,
    typer.Option(
        min=100,
        help="Also time the opening of an index of so many events, 100000000 say, which takes 50 "
        "bytes of memory and 24 of disk each.",
    ),
]
LogServer = Annotated[
    str | None,
    typer.Option(
        help="PostgreSQL server for the log, which gets databases for the time of the measurement; "
        "compared with a file. [default: a file alone]"
    ),
]
StateStore = Annotated[
    str,
    typer.Option(
        help="Place of users' states, as serve takes it; compared with memory. One of its own is "
        "best: Redis keeps them for an hour."
    ),
]
NumWorkers = Annotated[
    int, typer.Option(min=1, help="Processes; compared with one where there are more.")
]
ServiceThreads = Annotated[
    int | None, typer.Option(min=1, help="Threads of PyTorch. [default: as many as serve takes]")
]
Connections = Annotated[
    int,
    typer.Option(min=1, help="Connections of the clients that wait for answers, all together."),
]
LogEvents = Annotated[
    int, typer.Option(min=0, help="Events that the log has before the service starts.")
]
Device = Annotated[Literal["cpu", "cuda"], typer.Option(help="Where to run.")]
StoreData = Annotated[
    Path | None,
    typer.Option(
        "--data", help="Prepared store (train-step: or requests) of the batches. [default: drawn]"
    ),
]
Variants = Annotated[
    str, typer.Option(help="With --data: variants as of hstu-xd ablate, separated by commas.")
]
StoreRecipe = Annotated[
    list[Path] | None,
    typer.Option(
        "--gin_config_file",
        help="With --data: file of settings; repeat to layer files. [default: plain HSTU]",
    ),
]
StoreBindings = Annotated[
    list[str] | None,
    typer.Option(
        "--gin_bindings",
        help='With --data: setting, "xd_train.num_negatives = 512"; repeat for several.',
    ),
]


def given_options(context: typer.Context, names: Iterable[str]) -> list[str]:
    """Return the options of these parameters that stand in the command line."""
    options = {each.name: each.opts[0] for each in context.command.params}
    sources = {name: context.get_parameter_source(name) for name in names}
    return [
        options[name]
        for name, source in sources.items()
        if source is not None and source.name == "COMMANDLINE"
    ]


# Parameter of train-step -> the setting that it sets of a recipe.
_SIZES = {
    "seq_len": "xd_train.max_sequence_length",
    "batch_size": "xd_train.local_batch_size",
    "heads": "xd_encoder.num_heads",
    "dqk": "xd_encoder.dqk",
    "dv": "xd_encoder.dv",
    "width": "xd_train.item_embedding_dim",
    "layers": "xd_encoder.num_blocks",
}


def sizes_of_recipe(context: typer.Context, seq_len: list[int] | None) -> list[list[str]]:
    """Return the bindings of the sizes that stand in the command line, for each length.

    Raises:
        InputError: an option has no effect on the batches of a store.
    """
    drawn = "num_domains", "skew", "interleaving", "sweep", "provider", "against"
    if given := given_options(context, drawn):
        raise InputError(f"{given[0]} has no effect on the batches of a store; drop it, or --data")
    names = [name for name in _SIZES if name != "seq_len" and given_options(context, [name])]
    sizes = [f"{_SIZES[name]} = {context.params[name]}" for name in names]
    lengths = [[f"{_SIZES['seq_len']} = {length}"] for length in seq_len or ()]
    return [[*length, *sizes] for length in lengths or [[]]]


def one_length(context: typer.Context, seq_len: list[int] | None) -> int:
    """Return the longest history of a batch of a store, 100 where none is given.

    Raises:
        InputError: several are, or an option has no effect on batches that are only read.
    """
    if given := given_options(context, ("num_domains", "provider", "threads")):
        raise InputError(f"{given[0]} has no effect on batches that are read; drop it, or --data")
    if seq_len and len(seq_len) > 1:
        raise InputError("--seq-len: with --data one length is measured; give one")
    return (seq_len or [100])[0]


def chosen_providers(known: Collection[str], provider: list[str] | None) -> list[str]:
    """Return the providers to measure: those that the user named, or all."""
    for name in provider or ():
        _check_provider(name, known)
    return provider or list(known)


def chosen_rivals(
    known: Collection[str], names: list[str], against: list[str] | None, default: str
) -> list[str]:
    """Return those of the measured providers that the others are compared with.

    Raises:
        InputError: the user named one that is not measured.
    """
    for name in against or ():
        _check_provider(name, known)
        if name not in names:
            raise InputError(f"--against {name} is not measured; add --provider {name}")
    return against or [default]


def _check_provider(name: str, known: Collection[str]) -> None:
    """Check that a benchmark has a provider of that name.

    Raises:
        InputError: it has none; with the nearest name and all others.
    """
    if name not in known:
        near = get_close_matches(name, known, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        raise InputError(f"no provider {name!r}{hint} There are {', '.join(known)}")


def refuse_bias_without_effect(bias: bool, what: str, names: list[str]) -> None:
    """Refuse --no-bias where no provider would have one.

    Raises:
        InputError: it has no effect.
    """
    from hstu_xd.bench.providers import PROVIDERS

    if not bias and all(PROVIDERS[what][name].bias == "never" for name in names):
        raise InputError(f"--no-bias has no effect: {', '.join(names)} never has a bias; drop it")


def chosen_cases(
    base: "Case",
    seq_len: list[int] | None,
    num_domains: list[int] | None,
    skew: list[float] | None,
    interleaving: Sequence[str] | None,
    *,
    sweep: bool,
    default_domains: Sequence[int] = (1, 5, 10),
) -> list["Case"]:
    """Combine the sizes that were asked for, or take the preset of --sweep.

    Raises:
        InputError: an option has no effect beside the others.
    """
    from hstu_xd.bench import cases

    if sweep:
        if seq_len or num_domains or skew or interleaving:
            raise InputError(
                "--sweep chooses lengths, domains, skews and interleavings; drop --seq-len, "
                "--num-domains, --skew and --interleaving, or --sweep"
            )
        return list(cases.sweep(base))
    domains = num_domains or default_domains
    skews, orders = skew or [0.0], interleaving or ["random"]
    if max(domains) == 1 and (any(skews) or set(orders) != {"random"}):
        raise InputError(
            "--skew and --interleaving have no effect on a single domain; drop them, or add "
            "--num-domains 5"
        )
    return [
        replace(base, seq_len=n, num_domains=d, skew=s, interleaving=order)
        for n in seq_len or [1000]
        for d in domains
        for s in skews
        for order in orders
    ]


def show(
    measure: Callable[[], Iterable[dict[str, Any]]], as_json: bool, out: Path | None = None
) -> None:
    """Measure, store the rows as they come, and print them.

    Raises:
        InputError: rows cannot be stored in that file.
        HstuXdError: a provider disagrees with the reference, or raised.
    """
    from hstu_xd.bench.rows import check_file_name, render, write_rows

    if out is not None:
        check_file_name(out)
    rows: list[dict[str, Any]] = []
    for row in measure():
        rows.append(row)
        if out is not None:
            write_rows(out, rows)
    typer.echo(json.dumps(rows) if as_json else render(rows))
    wrong = sorted({row["provider"] for row in rows if row["correct"] is False})
    if wrong:
        raise HstuXdError(f"{', '.join(wrong)} disagrees with the reference and was not timed")
    for row in rows:
        if row.get("failed"):
            raise HstuXdError(f"{row['provider']} failed: {row['failed']}")
