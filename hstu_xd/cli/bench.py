"""``hstu-xd bench``: a sub-command for each benchmark, with only those options that it heeds."""

from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any, Literal

import typer

from hstu_xd.cli.bench_options import (
    Against,
    AgainstDense,
    BatchSize,
    Bias,
    Connections,
    Device,
    Dqk,
    DType,
    Dv,
    Heads,
    Interleavings,
    Json,
    Layers,
    LogEvents,
    LogServer,
    NumDomains,
    NumDomainsServed,
    NumWorkers,
    OpenedEvents,
    Out,
    Plan,
    Providers,
    Repeats,
    RetrievalItems,
    SearchedEvents,
    SeqLens,
    ServiceThreads,
    Skews,
    StateStore,
    StoreBindings,
    StoreData,
    StoreRecipe,
    Sweep,
    Threads,
    Variants,
    Width,
    chosen_cases,
    chosen_providers,
    chosen_rivals,
    given_options,
    one_length,
    refuse_bias_without_effect,
    show,
    sizes_of_recipe,
)
from hstu_xd.errors import InputError

bench = typer.Typer(
    help="Measure speed and memory, results checked first.\n\n"
    "Every provider is compared with a reference before it is timed; one that computes something "
    "else gets no time. Providers take turns in one process, so that ratios hold."
)
_MODEL, _SERVING, _DATA, _ROWS = "Model", "Serving", "Data", "Stored rows"


@bench.command(rich_help_panel=_MODEL)
def encoder(
    seq_len: SeqLens = None,
    num_domains: NumDomains = None,
    skew: Skews = None,
    interleaving: Interleavings = None,
    sweep: Sweep = False,
    provider: Providers = None,
    against: Against = None,
    dtype: DType = "float32",
    bias: Bias = True,
    plan: Plan = "each",
    batch_size: BatchSize = 8,
    heads: Heads = 4,
    dqk: Dqk = 16,
    dv: Dv = 16,
    width: Width = 64,
    layers: Layers = 2,
    threads: Threads = 2,
    repeats: Repeats = 5,
    device: Device = "cpu",
    as_json: Json = False,
    out: Out = None,
) -> None:
    """Time a stack of layers, forward and backward."""
    from hstu_xd.bench import passes
    from hstu_xd.bench.cases import Case
    from hstu_xd.bench.providers import PROVIDERS

    names = chosen_providers(PROVIDERS["encoder"], provider)
    rivals = chosen_rivals(PROVIDERS["encoder"], names, against, "reference")
    refuse_bias_without_effect(bias, "encoder", names)
    base = Case(
        "encoder", 1000, 1, batch_size=batch_size, heads=heads, dqk=dqk, dv=dv, width=width,
        layers=layers, device=device, dtype=dtype, biased=bias, plan=plan,
    )  # fmt: skip
    cases = chosen_cases(base, seq_len, num_domains, skew, interleaving, sweep=sweep)
    show(
        lambda: passes.measure(cases, names, threads=threads, repeats=repeats, against=rivals),
        as_json,
        out,
    )


@bench.command(rich_help_panel=_MODEL)
def attention(
    seq_len: SeqLens = None,
    num_domains: NumDomains = None,
    skew: Skews = None,
    interleaving: Interleavings = None,
    sweep: Sweep = False,
    provider: Providers = None,
    against: Against = None,
    dtype: DType = "float32",
    bias: Bias = True,
    plan: Plan = "each",
    batch_size: BatchSize = 8,
    heads: Heads = 4,
    dqk: Dqk = 16,
    dv: Dv = 16,
    threads: Threads = 2,
    repeats: Repeats = 5,
    device: Device = "cpu",
    as_json: Json = False,
    out: Out = None,
) -> None:
    """Time attention alone, forward and backward."""
    from hstu_xd.bench import passes
    from hstu_xd.bench.cases import Case
    from hstu_xd.bench.providers import PROVIDERS

    names = chosen_providers(PROVIDERS["attention"], provider)
    rivals = chosen_rivals(PROVIDERS["attention"], names, against, "reference")
    refuse_bias_without_effect(bias, "attention", names)
    base = Case(
        "attention", 1000, 1, batch_size=batch_size, heads=heads, dqk=dqk, dv=dv,
        device=device, dtype=dtype, biased=bias, plan=plan,
    )  # fmt: skip
    cases = chosen_cases(base, seq_len, num_domains, skew, interleaving, sweep=sweep)
    show(
        lambda: passes.measure(cases, names, threads=threads, repeats=repeats, against=rivals),
        as_json,
        out,
    )


@bench.command("train-step", rich_help_panel=_MODEL)
def train_step(
    context: typer.Context,
    data: StoreData = None,
    variants: Variants = "hstu,all",
    gin_config_file: StoreRecipe = None,
    gin_bindings: StoreBindings = None,
    seq_len: SeqLens = None,
    num_domains: NumDomains = None,
    skew: Skews = None,
    interleaving: Interleavings = None,
    sweep: Sweep = False,
    provider: Providers = None,
    against: AgainstDense = None,
    batch_size: BatchSize = 8,
    heads: Heads = 4,
    dqk: Dqk = 16,
    dv: Dv = 16,
    width: Width = 64,
    layers: Layers = 2,
    threads: Threads = 2,
    repeats: Repeats = 5,
    device: Device = "cpu",
    as_json: Json = False,
    out: Out = None,
) -> None:
    """Time whole training steps of HSTU and its variants.

    Batches are drawn for the sizes that are asked for, or are those of a prepared store (--data):
    then sizes that are not given are those of the recipe.
    """
    from hstu_xd.bench import train_step as steps
    from hstu_xd.bench.cases import Case

    if data is not None:
        from hstu_xd.bench.store_steps import measure_on_store

        sizes = sizes_of_recipe(context, seq_len)
        recipe = gin_config_file or [], gin_bindings or []
        show(
            lambda: measure_on_store(
                data, variants, recipe, sizes, device=device, threads=threads, repeats=repeats
            ),
            as_json,
            out,
        )
        return
    if given := given_options(context, ("variants", "gin_config_file", "gin_bindings")):
        raise InputError(f"{given[0]} has no effect on drawn batches; drop it, or add --data")
    names = chosen_providers(steps.PROVIDERS, provider)
    rivals = chosen_rivals(steps.PROVIDERS, names, against, "dense")
    base = Case(
        "train-step", 1000, 1, batch_size=batch_size, heads=heads, dqk=dqk, dv=dv, width=width,
        layers=layers, device=device,
    )  # fmt: skip
    cases = chosen_cases(base, seq_len, num_domains, skew, interleaving, sweep=sweep)
    show(
        lambda: steps.measure(cases, names, threads=threads, repeats=repeats, against=rivals),
        as_json,
        out,
    )


@bench.command(rich_help_panel=_MODEL)
def dlrm(
    context: typer.Context,
    data: StoreData = None,
    seq_len: SeqLens = None,
    num_domains: NumDomains = None,
    provider: Providers = None,
    batch_size: BatchSize = 4,
    threads: Threads = 1,
    repeats: Repeats = 5,
    as_json: Json = False,
    out: Out = None,
) -> None:
    """Time upstream's production path against its extension.

    Its layers on a CPU, stock and regrouped by domain; with --data the batches of that store.
    """
    from hstu_xd.bench import dlrm as passes
    from hstu_xd.bench.cases import Case

    if data is not None:
        length = one_length(context, seq_len)
        show(lambda: passes.measure_batches(data, length, batch_size, repeats), as_json, out)
        return
    names = chosen_providers(passes.PROVIDERS, provider)
    base = Case("dlrm", 1000, 1, batch_size=batch_size)
    cases = chosen_cases(base, seq_len, num_domains, None, None, sweep=False)
    show(lambda: passes.measure_stack(cases, names, threads=threads, repeats=repeats), as_json, out)


@bench.command(rich_help_panel=_SERVING)
def serving(
    seq_len: SeqLens = None,
    num_domains: NumDomainsServed = None,
    skew: Skews = None,
    interleaving: Interleavings = None,
    sweep: Sweep = False,
    provider: Providers = None,
    heads: Heads = 4,
    dqk: Dqk = 16,
    dv: Dv = 16,
    width: Width = 64,
    layers: Layers = 4,
    threads: Threads = 2,
    repeats: Repeats = 5,
    retrieval_items: RetrievalItems = None,
    as_json: Json = False,
    out: Out = None,
) -> None:
    """Time one event and an answer against encoding it all again."""
    from hstu_xd.bench import serving as calls
    from hstu_xd.bench.cases import Case

    names = chosen_providers(calls.PROVIDERS, provider)
    base = Case("serving", 1000, 1, heads=heads, dqk=dqk, dv=dv, width=width, layers=layers)
    cases = chosen_cases(
        base, seq_len, num_domains, skew, interleaving, sweep=sweep, default_domains=[5]
    )

    def measure() -> Iterable[dict[str, Any]]:
        yield from calls.measure(cases, names, threads=threads, repeats=repeats)
        if retrieval_items:
            yield from calls.measure_retrieval(
                retrieval_items, width=width, threads=threads, repeats=repeats
            )

    show(measure, as_json, out)


@bench.command(rich_help_panel=_SERVING)
def service(
    context: typer.Context,
    run: Annotated[
        Path | None,
        typer.Argument(help="Run folder to serve. [default: a model with random weights]"),
    ] = None,
    seconds: Annotated[
        float, typer.Option(min=1, help="Seconds of load at twice the rate that can be answered.")
    ] = 60.0,
    seq_len: Annotated[int, typer.Option(help="Events that the model reads of a user.")] = 200,
    num_domains: Annotated[int, typer.Option(help="Domains.")] = 5,
    heads: Heads = 4,
    dqk: Dqk = 16,
    dv: Dv = 16,
    width: Width = 64,
    layers: Layers = 4,
    threads: ServiceThreads = None,
    workers: NumWorkers = 1,
    events: LogServer = None,
    store: StateStore = "memory",
    connections: Connections = 8,
    log_events: LogEvents = 0,
    as_json: Json = False,
    out: Out = None,
) -> None:
    """Put the HTTP service under twice the load it can bear."""
    from hstu_xd.bench import service as loads
    from hstu_xd.bench.cases import Case
    from hstu_xd.cli.serve import check_packages

    sizes = "seq_len", "num_domains", "heads", "dqk", "dv", "width", "layers"
    if run and (given := given_options(context, sizes)):
        raise InputError(f"{given[0]} has no effect on a trained run; drop it, or {run}")
    check_packages()
    case = Case(
        "service", seq_len, num_domains, heads=heads, dqk=dqk, dv=dv, width=width, layers=layers
    )
    show(
        lambda: loads.measure(
            run,
            case,
            seconds=seconds,
            threads=threads,
            workers=workers,
            events=events,
            store=store,
            connections=connections,
            log_events=log_events,
        ),
        as_json,
        out,
    )


@bench.command(rich_help_panel=_DATA)
def prepare(
    rows: Annotated[int, typer.Option(min=100, help="Events of the generated log.")] = 1_000_000,
    as_json: Json = False,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for the log and the stores. [default: a temporary one]"),
    ] = None,
) -> None:
    """Time hstu-xd prepare, its --append and a plain reader."""
    from hstu_xd.bench.prepare import measure_prepare

    with TemporaryDirectory() as folder:
        show(lambda: measure_prepare(rows, out or Path(folder)), as_json)


@bench.command(rich_help_panel=_DATA)
def sampler(
    data: Annotated[
        Path | None, typer.Option(help="Prepared store. [default: a synthetic one]")
    ] = None,
    seq_len: Annotated[int, typer.Option(min=1, help="Longest history of a sample.")] = 200,
    batch_size: BatchSize = 128,
    repeats: Annotated[int, typer.Option(min=1, help="Timed batches of each provider.")] = 50,
    as_json: Json = False,
    out: Out = None,
) -> None:
    """Time the batches that training draws from a store."""
    from hstu_xd.bench.sampler import measure_sampler

    show(
        lambda: measure_sampler(data, history=seq_len, batch_size=batch_size, repeats=repeats),
        as_json,
        out,
    )


@bench.command(rich_help_panel=_DATA)
def search(
    events: SearchedEvents = None,
    opening: OpenedEvents = None,
    k: Annotated[int, typer.Option(min=1, help="Events to find for a candidate.")] = 50,
    candidates: Annotated[int, typer.Option(min=1, help="Candidates of a request.")] = 16,
    repeats: Annotated[int, typer.Option(min=1, help="Timed requests of each provider.")] = 20,
    as_json: Json = False,
    out: Out = None,
) -> None:
    """Time hard and soft search in a long history against a scan."""
    from hstu_xd.bench.search import LENGTHS, measure_opening, measure_search

    def rows() -> Iterable[dict[str, Any]]:
        yield from measure_search(events or LENGTHS, k=k, candidates=candidates, repeats=repeats)
        if opening is not None:
            yield measure_opening(opening, k)

    show(rows, as_json, out)


@bench.command(rich_help_panel=_ROWS)
def suite(
    device: Annotated[
        Literal["cpu", "cuda"], typer.Option(help="The part of the suite that is for it.")
    ],
    out: Annotated[
        Path, typer.Option(help="Folder for the rows, a file a part; to be gone on with.")
    ],
    minutes: Annotated[
        float, typer.Option(min=0, help="Minutes that all of it may take; the rest is said.")
    ] = 8.0,
    data: Annotated[
        list[Path] | None,
        typer.Option(help="Prepared store whose training steps are measured; repeat for several."),
    ] = None,
    rehearse: Annotated[
        bool,
        typer.Option(
            "--rehearse",
            help="Run all of it with tiny sizes on the CPU; the figures mean nothing.",
        ),
    ] = False,
) -> None:
    """Measure all that the goals of speed are read from.

    Parts run in the order of importance, each a command of its own; rows are stored as they come,
    and what is stored is not measured again. At the end come the rows and the goals.
    """
    import torch

    from hstu_xd.bench import suite as suites
    from hstu_xd.bench.suite_parts import SUITES

    for store in data or ():
        if not (store / "manifest.json").is_file():
            raise InputError(f"--data {store}: no prepared store; make it with hstu-xd prepare")
    if device == "cuda" and not rehearse and not torch.cuda.is_available():
        raise InputError("--device cuda: PyTorch finds no GPU; use --device cpu, or --rehearse")
    suites.run(SUITES[device](data or []), out, minutes=minutes, rehearsal=rehearse, say=typer.echo)


@bench.command(rich_help_panel=_ROWS)
def plot(
    rows: Annotated[
        list[Path], typer.Argument(metavar="ROWS...", help="Files that --out of a benchmark wrote.")
    ],
    out: Annotated[Path, typer.Option(help="Folder for the figures and the table.")],
) -> None:
    """Draw curves and a table from stored rows."""
    from hstu_xd.bench.curves import draw
    from hstu_xd.bench.rows import read_rows

    for path in draw(read_rows(rows), out):
        typer.echo(path)
