"""Commands of one run: train, evaluate, recommend and export."""

import json
from pathlib import Path
from typing import Annotated

import typer


def train(
    data: Annotated[Path, typer.Option("--data", help="Prepared store.")],
    out: Annotated[Path, typer.Option("--out", help="Run folder to write.")],
    gin_config_file: Annotated[
        list[Path] | None,
        typer.Option(
            "--gin_config_file", help="Settings; repeat to layer files; default: plain HSTU."
        ),
    ] = None,
    gin_bindings: Annotated[
        list[str] | None,
        typer.Option("--gin_bindings", help='One setting, "xd_encoder.ddsr = True".'),
    ] = None,
    name: Annotated[str | None, typer.Option("--name", help="What tables call the run.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue a run that stopped, with its own settings.")
    ] = False,
) -> None:
    """Train a model on a prepared store; torchrun starts it on several processes."""
    from hstu_xd.training.run import train as run_training
    from hstu_xd.training.settings import load_settings

    given = gin_config_file or gin_bindings
    settings = load_settings(gin_config_file or [], gin_bindings or []) if given else None
    summary = run_training(data, settings, out, name=name, resume=resume)
    test = summary["test"]
    typer.echo(
        f"{out}: best epoch {summary['best_epoch']}, test "
        + ", ".join(f"{m} {100 * test[m]:.2f} %" for m in ("hr@10", "hr@100", "ndcg@100", "mrr"))
    )


def evaluate(
    run: Annotated[Path, typer.Argument(help="Run folder.")],
    data: Annotated[
        Path | None, typer.Option("--data", help="Prepared store; default: the run's own.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Rank the held-out events of every user with a run's best model."""
    from hstu_xd.data.batches import SequenceData, Split
    from hstu_xd.evaluation.metrics import METRICS
    from hstu_xd.evaluation.ranks import evaluate as evaluate_split
    from hstu_xd.training.run import load, open_data, read_run

    facts, model = read_run(run), load(run)
    store = open_data(run, data)
    length = facts["max_sequence_length"]
    values = {
        split.value: evaluate_split(model, SequenceData(store, split, length))
        for split in (Split.VALID, Split.TEST)
    }
    if as_json:
        typer.echo(json.dumps({"run": str(run), "data": str(store.path), **values}))
        return
    groups = ["", *(f"[{name}]" for name in ("switch", "stay", *store.domain_names))]
    for split, metrics in values.items():
        typer.echo(
            f"{split} (%)".ljust(24) + "".join(m.rjust(10) for m in METRICS) + "users".rjust(10)
        )
        for group in (g for g in groups if f"count{g}" in metrics):
            cells = "".join(f"{100 * metrics[m + group]:10.2f}" for m in METRICS)
            typer.echo((group or "all").ljust(24) + cells + f"{metrics['count' + group]:10,}")


def recommend(
    run: Annotated[Path, typer.Argument(help="Run folder.")],
    user: Annotated[str, typer.Option("--user", help="User id as in the log.")],
    domain: Annotated[str, typer.Option("--domain", help="Domain to recommend from.")],
    k: Annotated[int, typer.Option("--k", min=1, help="Number of items.")] = 10,
    data: Annotated[
        Path | None, typer.Option("--data", help="Prepared store; default: the run's own.")
    ] = None,
    at: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Time of the request, in seconds as the store's. [default: the last event's]",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Recommend unseen items of a domain from a user's whole history."""
    from hstu_xd.evaluation.ranks import recommend_items
    from hstu_xd.training.run import load, open_data, read_run

    store = open_data(run, data)
    user_index = store.user_index(user)
    model = load(run)
    domain_id = model.catalog.domain_index(domain)
    window = read_run(run)["max_sequence_length"]
    found = recommend_items(model, *store.history(user_index), domain_id, k, window=window, at=at)
    rows = [{"item": model.catalog.token(item), "score": score} for item, score in found]
    if as_json:
        typer.echo(json.dumps({"user": user, "domain": domain, "items": rows}))
        return
    for rank, row in enumerate(rows, start=1):
        typer.echo(f"{rank:4d}  {row['item']:32s} {row['score']:.4f}")


def export(
    run: Annotated[Path, typer.Argument(help="Run folder.")],
    out: Annotated[Path, typer.Option("--out", help="Folder to write.")],
    force: Annotated[bool, typer.Option("--force", help="Replace an existing export.")] = False,
) -> None:
    """Write the encoder as a torch.export program, with weights, item vectors and catalogue."""
    from hstu_xd.export import MANIFEST, write_export

    manifest = write_export(run, out, force=force)
    for name in (*manifest["hashes"], MANIFEST):
        typer.echo(f"wrote {out / name} ({(out / name).stat().st_size:,} bytes)")
