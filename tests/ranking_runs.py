"""A small log of two domains, requests of it, and ranking runs of every kind."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import polars as pl

from hstu_xd.cli.app import run as run_command
from hstu_xd.data.batches import Split
from hstu_xd.data.requests import RequestSet
from hstu_xd.data.store import InteractionStore
from hstu_xd.ranking.run import TrainedRanker
from hstu_xd.serving.ranking_session import RankRequest

START, DAY = 1_600_000_000, 86_400
KINDS = {
    "counts": ("xd_interest.kind = 'none'", "xd_interest.counts = True"),
    "recent": (),
    "hard": ("xd_search.kind = 'hard'", "xd_search.skip_recent = 1"),
    "domain": ("xd_search.kind = 'hard'", "xd_search.scope = 'target_domain'"),
    "hstu": ("xd_interest.kind = 'hstu'",),
    "towers": ("xd_interest.kind = 'towers'",),
    "soft": ("xd_interest.kind = 'none'", "xd_search.soft = 'decoupled'"),
    "xd": (
        *("xd_search.kind = 'hard'", "xd_short.events = 9", "xd_encoder.domain_mask = True"),
        *("xd_encoder.target_view_heads = 2", "xd_encoder.tape = True", "xd_encoder.ddsr = True"),
        *("xd_interest.tape = True", "xd_interest.domain_states = True"),
    ),
}


def events() -> list[tuple[str, str, str, int, str]]:
    """Users who take a few of 40 items of two domains every day or two, some twice at once."""
    draw, rows = np.random.default_rng(0), []
    for user in range(12):
        days = np.sort(draw.choice(60, 30, replace=False))
        for day in days.tolist():
            at = START + day * DAY + user
            deal = str(bool(draw.random() < 0.5)).lower()
            rows += [
                (f"u{user}", f"i{item}", f"d{item % 2}", at, deal)
                for item in draw.choice(40, 3, replace=False).tolist()
            ]
    return rows


def run_words(*words: object) -> None:
    assert run_command([str(word) for word in words]) == 0


def make_runs(folder: Path, kinds: Sequence[str] = (*KINDS, "one_goal")) -> Path:
    """A store, requests of it, and a run of every kind; one_goal is of requests with one goal."""
    schema = ["user", "item", "domain", "time", "deal"]
    pl.DataFrame(events(), schema=schema, orient="row").write_parquet(folder / "log.parquet")
    names = [f"i{n}" for n in range(40)]
    types = pl.DataFrame({"item": names, "type": [f"t{n % 5}" for n in range(40)]})
    types.write_parquet(folder / "items.parquet")
    prepare = ["--event-cols", "deal", "--item-features", folder / "items.parquet"]
    run_words(
        *("prepare", folder / "log.parquet", "--out", folder / "store"),
        *(*prepare, "--levels", "type", "--min-user", 1, "--min-item", 1),
    )
    make = ("requests", "--data", folder / "store", "--positives", 2, "--negatives", 2)
    make += ("--min-history", 5, "--out")
    run_words(*make, folder / "requests", "--goal", "deal")
    run_words(*make, folder / "one_goal_requests")
    for kind in kinds:
        requests = "one_goal_requests" if kind == "one_goal" else "requests"
        rank_run(folder / kind, folder / requests, KINDS.get(kind, ()))
    return folder


def rank_run(out: Path, requests: Path, bindings: tuple[str, ...]) -> None:
    own = (*bindings, "xd_search.k = 6", "xd_rank.num_epochs = 1", "xd_rank.item_width = 4")
    given = [word for binding in own for word in ("--gin_bindings", binding)]
    run_words("rank", "--data", requests, "--out", out, *given)


def users_of(store: InteractionStore) -> list[str]:
    names = [f"u{n}" for n in range(12)]
    return sorted(names, key=store.user_index)


def asked_of(trained: TrainedRanker) -> tuple[np.ndarray, list[RankRequest]]:
    requests: RequestSet = trained.task.requests
    store, chosen = trained.task.store, requests.of_split(Split.TEST)
    names, token = users_of(store), store.catalog.token
    return chosen, [
        RankRequest(
            names[requests.users[r]],
            [token(int(i)) for i in requests.candidates[slice(*requests.offsets[r : r + 2])]],
            requests.goal_names[requests.goals[r]],
            int(requests.times[r]),
        )
        for r in chosen
    ]
