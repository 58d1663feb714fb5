"""``hstu-xd recommend``: the next items of one domain for one user of the store."""

import json
from pathlib import Path
from typing import Annotated

import typer


def recommend(
    run: Annotated[Path, typer.Argument(help="Run folder.")],
    user: Annotated[str, typer.Option("--user", help="User id as in the log.")],
    domain: Annotated[str, typer.Option("--domain", help="Domain to recommend from.")],
    k: Annotated[int, typer.Option("--k", min=1, help="Number of items.")] = 10,
    data: Annotated[
        Path | None, typer.Option("--data", help="Prepared store; default: the run's own.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Recommend unseen items of a domain from a user's whole history."""
    from hstu_xd.evaluation.recommend import recommend_items
    from hstu_xd.training.run import load, open_data, read_run

    store = open_data(run, data)
    user_index = store.user_index(user)
    model = load(run)
    domain_id = model.catalog.domain_index(domain)
    window = read_run(run)["max_sequence_length"]
    found = recommend_items(model, *store.history(user_index), domain_id, k, window=window)
    rows = [{"item": model.catalog.token(item), "score": score} for item, score in found]
    if as_json:
        typer.echo(json.dumps({"user": user, "domain": domain, "items": rows}))
        return
    for rank, row in enumerate(rows, start=1):
        typer.echo(f"{rank:4d}  {row['item']:32s} {row['score']:.4f}")
