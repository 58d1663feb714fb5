"""``hstu-xd bench``: timings behind a correctness gate, as a table, as JSON rows or as curves."""

import json
from collections.abc import Iterable
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any

import typer

from hstu_xd.errors import HstuXdError, InputError

BENCHMARKS = ("encoder", "attention", "train-step", "serving", "service", "prepare", "sampler")


def bench(
    what: Annotated[
        str, typer.Argument(help=f"One of: {', '.join(BENCHMARKS)}; or plot, of stored rows.")
    ],
    stored: Annotated[
        list[Path] | None,
        typer.Argument(
            help="Files of rows (plot). Run folder (service) [default: random weights].",
            metavar="[ROWS]...",
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the rows as one JSON array.")
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(
            help="File for the rows, .json or .csv. Folder for the log (prepare) [default: a "
            "temporary one] or for figures and table (plot)."
        ),
    ] = None,
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
    interleaving: Annotated[
        list[str] | None,
        typer.Option(help="random, or blocks: one domain after the other. [default: random]"),
    ] = None,
    sweep: Annotated[
        bool,
        typer.Option(
            "--sweep", help="N 256..16384, D 1..64, skews and interleavings, one at a time."
        ),
    ] = False,
    provider: Annotated[
        list[str] | None, typer.Option(help="Provider; repeat for several. [default: all]")
    ] = None,
    against: Annotated[
        list[str] | None,
        typer.Option(
            help="Provider to compare with; repeat for several. [default: reference; train-step "
            "dense]"
        ),
    ] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    bias: Annotated[
        bool, typer.Option("--bias/--no-bias", help="Relative bias, where a provider has one.")
    ] = True,
    plan: Annotated[
        str,
        typer.Option(help="Build groupings and masks in each pass, or once, as layers share them."),
    ] = "each",
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Users of a batch. [default: 8; sampler 128]")
    ] = None,
    heads: Annotated[int, typer.Option(help="Attention heads.")] = 4,
    dqk: Annotated[int, typer.Option(help="Width of queries and keys a head.")] = 16,
    dv: Annotated[int, typer.Option(help="Width of values a head.")] = 16,
    width: Annotated[int, typer.Option(help="Model width (encoder).")] = 64,
    layers: Annotated[
        int | None, typer.Option(help="Layers (encoder). [default: 2; serving, service 4]")
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option(min=1, help="Threads of PyTorch. [default: 2; service as hstu-xd serve]"),
    ] = None,
    repeats: Annotated[
        int | None,
        typer.Option(min=1, help="Timed passes of each provider. [default: 5; sampler 50]"),
    ] = None,
    device: Annotated[
        str, typer.Option(help="cpu or cuda (encoder, attention, train-step).")
    ] = "cpu",
    seconds: Annotated[
        float, typer.Option(min=1, help="Of twice the load that can be borne (service).")
    ] = 60.0,
    rows: Annotated[int, typer.Option(min=100, help="Events of the log (prepare).")] = 1_000_000,
    data: Annotated[
        Path | None, typer.Option(help="Prepared store (sampler). [default: a synthetic one]")
    ] = None,
    retrieval_items: Annotated[
        int | None,
        typer.Option(
            min=1000, help="Also search the best of so many items, 1000000 say (serving)."
        ),
    ] = None,
) -> None:
    """Measure a part of hstu-xd. A provider that computes something else gets no time."""
    if what == "plot":
        _plot(stored or [], out)
        return
    if what not in BENCHMARKS:
        raise InputError(_unknown("benchmark", what, (*BENCHMARKS, "plot")))
    if stored and what != "service":
        raise InputError(f"{stored[0]}: only bench plot reads rows; to write them use --out")
    if retrieval_items and what != "serving":
        raise InputError(
            f"--retrieval-items belongs to bench serving, not to bench {what}; drop it"
        )
    if what == "prepare":
        _show(_prepare(rows, out), as_json)
        return
    if out is not None:
        from hstu_xd.bench.row_files import check_name

        check_name(out)
    if what == "sampler":
        from hstu_xd.bench.sampler import run

        history = (seq_len or [200])[0]
        results = run(data, history=history, batch_size=batch_size or 128, repeats=repeats or 50)
        _show(results, as_json, out)
        return
    if what == "service":
        from hstu_xd.bench import service
        from hstu_xd.bench.cases import Case
        from hstu_xd.cli.serve import check_packages

        check_packages()
        from hstu_xd.serving.http.settings import default_threads

        case = Case(
            what, (seq_len or [200])[0], (num_domains or [5])[0], heads=heads, dqk=dqk, dv=dv,
            width=width, layers=layers or 4,
        )  # fmt: skip
        run = stored[0] if stored else None
        _show(
            service.measure(run, case, seconds=seconds, threads=threads or default_threads()),
            as_json,
            out,
        )
        return
    from hstu_xd.bench import passes, retrieval, serving, train_step
    from hstu_xd.bench.cases import Case

    chosen, rivals = _competitors(what, provider, against)
    base = Case(
        what, 1000, 1, batch_size=batch_size or 8, heads=heads, dqk=dqk, dv=dv, width=width,
        layers=layers or (4 if what == "serving" else 2), device=device, dtype=dtype,
        biased=bias, plan=plan,
    )  # fmt: skip
    cases = [
        replace(base, seq_len=n, num_domains=d, skew=s, interleaving=order)
        for n in seq_len or [1000]
        for d in num_domains or ([5] if what == "serving" else [1, 5, 10])
        for s in skew or [0.0]
        for order in interleaving or ["random"]
    ]
    if sweep:
        if seq_len or num_domains or skew or interleaving:
            raise InputError(
                "--sweep chooses lengths, domains, skews and interleavings; drop --seq-len, "
                "--num-domains, --skew and --interleaving, or --sweep"
            )
        from hstu_xd.bench.cases import sweep as preset

        cases = list(preset(base))
    how_often = {"threads": threads or 2, "repeats": repeats or 5}
    if what == "serving":
        results = serving.measure(cases, chosen, **how_often)
        if retrieval_items:
            results += retrieval.measure(retrieval_items, width=width, **how_often)
    else:
        measure = train_step.measure if what == "train-step" else passes.measure
        results = measure(cases, chosen, **how_often, against=rivals)
    _show(results, as_json, out)


def _competitors(
    what: str, provider: list[str] | None, against: list[str] | None
) -> tuple[list[str], list[str]]:
    """Who is measured, and who of them the others are compared with.

    Raises:
        InputError: an unknown provider, or one to compare with that is not measured.
    """
    from hstu_xd.bench import providers, serving, train_step

    own = {"train-step": train_step, "serving": serving}
    known = tuple(own[what].PROVIDERS if what in own else providers.PROVIDERS[what])
    if what == "serving" and against:
        raise InputError("bench serving has comparisons of its own; drop --against")
    chosen = provider or list(known)
    for name in (*chosen, *(against or ())):
        if name not in known:
            raise InputError(_unknown("provider", name, known))
    for name in against or ():
        if name not in chosen:
            raise InputError(f"--against {name} is not measured; add --provider {name}")
    return chosen, against or ["dense" if what == "train-step" else "reference"]


def _prepare(rows: int, out: Path | None) -> list[dict[str, Any]]:
    from tempfile import TemporaryDirectory

    from hstu_xd.bench.prepare import run

    if out is not None:
        return run(rows, out)
    with TemporaryDirectory() as folder:
        return run(rows, Path(folder))


def _plot(stored: list[Path], out: Path | None) -> None:
    from hstu_xd.bench.curves import draw
    from hstu_xd.bench.row_files import read

    if not stored or out is None:
        raise InputError("bench plot needs files of rows and --out FOLDER")
    for path in draw(read(stored), out):
        typer.echo(path)


def _show(results: Iterable[dict[str, Any]], as_json: bool, out: Path | None = None) -> None:
    """Store the rows as they come, and print them.

    Raises:
        HstuXdError: a provider disagrees with the reference, or raised.
    """
    from hstu_xd.bench.row_files import render, write

    rows: list[dict[str, Any]] = []
    for row in results:
        rows.append(row)
        if out is not None:
            write(out, rows)
    typer.echo(json.dumps(rows) if as_json else render(rows))
    wrong = sorted({row["provider"] for row in rows if row["correct"] is False})
    if wrong:
        raise HstuXdError(f"{', '.join(wrong)} disagrees with the reference and was not timed")
    for row in rows:
        if row.get("failed"):
            raise HstuXdError(f"{row['provider']} failed: {row['failed']}")


def _unknown(kind: str, name: str, known: Iterable[str]) -> str:
    near = get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"no {kind} {name!r}{hint} There are {', '.join(known)}"
