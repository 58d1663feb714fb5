"""``hstu-xd bench``: timings behind a correctness gate, as a table or as JSON rows."""

import json
import os
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any

import typer

from hstu_xd.errors import HstuXdError, InputError

BENCHMARKS = ("encoder", "attention", "train-step", "prepare", "sampler")


def bench(
    what: Annotated[str, typer.Argument(help=f"One of: {', '.join(BENCHMARKS)}.")],
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the rows as one JSON array.")
    ] = False,
    seq_len: Annotated[
        list[int] | None, typer.Option(help="Events of a user; repeat for several. [default: 1000]")
    ] = None,
    num_domains: Annotated[
        list[int] | None, typer.Option(help="Domains; repeat for several. [default: 1, 5, 10]")
    ] = None,
    skew: Annotated[
        list[float] | None,
        typer.Option(help="0 = balanced, else the share of the first domain. [default: 0]"),
    ] = None,
    provider: Annotated[
        list[str] | None, typer.Option(help="Provider; repeat for several. [default: all]")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Users of a batch. [default: 8; sampler 128]")
    ] = None,
    heads: Annotated[int, typer.Option(help="Attention heads.")] = 4,
    dqk: Annotated[int, typer.Option(help="Width of queries and keys a head.")] = 16,
    dv: Annotated[int, typer.Option(help="Width of values a head.")] = 16,
    width: Annotated[int, typer.Option(help="Model width (encoder).")] = 64,
    layers: Annotated[int, typer.Option(help="Layers (encoder).")] = 2,
    threads: Annotated[int, typer.Option(min=1, help="Threads of PyTorch.")] = 2,
    repeats: Annotated[
        int | None,
        typer.Option(min=1, help="Timed passes of each provider. [default: 5; sampler 50]"),
    ] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda (encoder, attention).")] = "cpu",
    rows: Annotated[int, typer.Option(min=100, help="Events of the log (prepare).")] = 1_000_000,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the log (prepare). [default: a temporary one]")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Prepared store (sampler). [default: a synthetic one]")
    ] = None,
) -> None:
    """Measure a part of hstu-xd. A provider that computes something else gets no time."""
    if what not in BENCHMARKS:
        raise InputError(_unknown("benchmark", what, BENCHMARKS))
    if what == "prepare":
        results: Iterable[dict[str, Any]] = _prepare(rows, out)
    elif what == "sampler":
        from hstu_xd.bench.sampler import run

        history = (seq_len or [200])[0]
        results = run(data, history=history, batch_size=batch_size or 128, repeats=repeats or 50)
    else:
        # Waiting threads sleep. Spinning ones stall every small operation for a scheduler's tick
        # wherever another process holds a core. OpenMP reads this when PyTorch is loaded.
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
        from hstu_xd.bench import passes, providers, train_step
        from hstu_xd.bench.cases import Case

        known = tuple(train_step.PROVIDERS) if what == "train-step" else providers.PROVIDERS[what]
        for name in provider or ():
            if name not in known:
                raise InputError(_unknown("provider", name, known))
        cases = [
            Case(what, n, d, s, batch_size or 8, heads, dqk, dv, width, layers, device)
            for n in seq_len or [1000]
            for d in num_domains or [1, 5, 10]
            for s in skew or [0.0]
        ]
        measure = train_step.measure if what == "train-step" else passes.measure
        results = measure(cases, provider or known, threads=threads, repeats=repeats or 5)
    _show(results, as_json)


def _prepare(rows: int, out: Path | None) -> list[dict[str, Any]]:
    from tempfile import TemporaryDirectory

    from hstu_xd.bench.prepare import run

    if out is not None:
        return run(rows, out)
    with TemporaryDirectory() as folder:
        return run(rows, Path(folder))


def _show(results: Iterable[dict[str, Any]], as_json: bool) -> None:
    """Print the rows.

    Raises:
        HstuXdError: a provider disagrees with the reference.
    """
    from hstu_xd.bench.table import render

    rows = list(results)
    typer.echo(json.dumps(rows) if as_json else render(rows))
    wrong = sorted({row["provider"] for row in rows if row["correct"] is False})
    if wrong:
        raise HstuXdError(f"{', '.join(wrong)} disagrees with the reference and was not timed")


def _unknown(kind: str, name: str, known: Iterable[str]) -> str:
    near = get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"no {kind} {name!r}{hint} There are {', '.join(known)}"
