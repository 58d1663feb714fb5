"""Retrain every day: continue yesterday's model on what is new, against training from nothing.

A log is cut in time into parts of equally many events. The first one is the past; after each of the
days that follow, one model is trained from nothing on all there is, and another one continues that
of the day before. Both rank the next event of everybody who comes back on the next day.

Run: python examples/daily_retraining.py
Run: python examples/daily_retraining.py --log amazon4.csv.gz --days 9 --out daily \
     --gin_config_file gin/standalone/xd.gin --continued "xd_train.num_epochs = 3"
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import polars as pl

from hstu_xd.data.batches import SequenceData, Split
from hstu_xd.data.prepare import prepare_logs
from hstu_xd.data.sources.columns import ColumnOptions
from hstu_xd.data.store import InteractionStore
from hstu_xd.evaluation.metrics import user_metrics
from hstu_xd.evaluation.protocol import Protocol
from hstu_xd.evaluation.ranks import rank_targets
from hstu_xd.training.run import load_trained, train
from hstu_xd.training.settings import load_settings
from hstu_xd.training.stored_settings import stored_settings

COLUMNS = ColumnOptions("user_id", "item_id", "domain", "timestamp")
METRIC = "ndcg@100"
SMALL = (
    "xd_encoder.num_blocks = 1",
    "xd_train.item_embedding_dim = 16",
    "xd_train.num_epochs = 2",
    "xd_train.num_negatives = 64",
)


def small_log(users: int = 120, events: int = 24) -> pl.DataFrame:
    """Users of two domains, who move on to later items as the days go by."""
    draw = np.random.default_rng(0)
    user, when = np.repeat(np.arange(users), events), np.tile(np.arange(events), users)
    item = (when + user + draw.integers(0, 8, user.size)) % 60
    domain = np.array(["books", "films"])[item % 2]
    tokens = pl.Series(domain) + pl.Series(item).cast(pl.String)
    names = pl.Series(user).cast(pl.String)
    seconds = 86_400 * when + draw.integers(0, 86_400, user.size)
    return pl.DataFrame(
        {"user_id": names, "item_id": tokens, "domain": domain, "timestamp": seconds}
    )


def store_of(log: pl.DataFrame, folder: Path) -> InteractionStore:
    """Prepare a part of a log, unless that is done."""
    if not folder.exists():
        file = folder.with_suffix(".csv")
        log.select("user_id", "item_id", "domain", "timestamp").write_csv(file)
        prepare_logs([str(file)], folder, columns=COLUMNS, tell=str, warn=str)
        file.unlink()
    return InteractionStore.open(folder)


def trained(store: InteractionStore, out: Path, settings, before: Path | None) -> dict:
    """Train a model, unless that is done, and return its summary with the seconds it took."""
    if not (out / "seconds").exists():
        began = time.perf_counter()
        train(store.path, settings, out, read_test=False, continue_from=before)
        (out / "seconds").write_text(str(time.perf_counter() - began))
    summary = json.loads((out / "summary.json").read_text())
    steps = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])["step"]
    events = steps * summary["seconds_per_step"] * summary["events_per_second"]
    seconds = float((out / "seconds").read_text())
    return {"epochs": summary["epochs"], "train_events": round(events), "seconds": seconds}


def next_events(run: Path, store: InteractionStore, since: int) -> np.ndarray:
    """Rank the last event of everybody who has one after a time: (Q,) of the metric, by user."""
    model, protocol = load_trained(run), Protocol()
    data = SequenceData(store, Split.TEST, model.model.window)
    last = np.asarray(store.timestamps)[np.asarray(store.offsets)[1:] - 1]
    users = data.users[last[data.users] > since]
    ranked = rank_targets(model.model, data, users, protocol=protocol, scorer=model.scorer)
    return user_metrics(ranked, protocol)[METRIC].double().numpy()


def days(log: pl.DataFrame, number: int, out: Path, recipe: list, bindings: list, continued: list):
    """Yield a row for each day."""
    times = log["timestamp"].sort()
    cuts = [int(times[len(times) * (day + 1) // (number + 2)]) for day in range(number + 1)]
    cuts.append(int(times[-1]))
    scratch, before = load_settings([Path(x) for x in recipe], bindings), None
    for day in range(number + 1):
        log_so_far = log.filter(pl.col("timestamp") <= cuts[day])
        # Of the next day only what can be recommended: events on items that are known, the first
        # of each user.
        coming = log.filter(
            (pl.col("timestamp") > cuts[day]) & (pl.col("timestamp") <= cuts[day + 1])
        )
        coming = coming.join(log_so_far.select("item_id").unique(), on="item_id", how="semi")
        coming = coming.sort("timestamp", maintain_order=True).unique("user_id", keep="first")
        store = store_of(log_so_far, out / f"log{day}")
        ahead = store_of(pl.concat([log_so_far, coming]), out / f"ahead{day}")
        runs = {"from nothing": out / f"nothing{day}"}
        costs = {"from nothing": trained(store, runs["from nothing"], scratch, None)}
        if before is not None:
            runs["continued"] = out / f"continued{day}"
            own = stored_settings(before, allow_imports=False, bindings=continued)
            costs["continued"] = trained(store, runs["continued"], own, before)
        before = runs.get("continued", runs["from nothing"])
        if len(runs) == 1:
            continue
        found = {name: next_events(run, ahead, cuts[day]) for name, run in runs.items()}
        difference = found["continued"] - found["from nothing"]
        yield {
            "day": day,
            "events": store.num_interactions,
            "targets": difference.size,
            METRIC: {name: float(values.mean()) for name, values in found.items()},
            "difference": float(difference.mean()),
            "error": float(difference.std(ddof=1) / difference.size**0.5),
            **{
                key: {name: cost[key] for name, cost in costs.items()}
                for key in ("train_events", "seconds", "epochs")
            },
            "items": json.loads((before / "run.json").read_text())["continues"]["items"],
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--log", type=Path)
    parser.add_argument("--days", type=int, default=2)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--gin_config_file", action="append", default=[])
    parser.add_argument("--gin_bindings", action="append", default=[])
    parser.add_argument("--continued", action="append", default=[], help="bindings from day 1 on")
    given = parser.parse_args()
    log = small_log() if given.log is None else pl.read_csv(given.log)
    bindings = given.gin_bindings + (list(SMALL) if given.log is None else [])
    with tempfile.TemporaryDirectory() as folder:
        out = given.out or Path(folder)
        out.mkdir(parents=True, exist_ok=True)
        rows = []
        for row in days(log, given.days, out, given.gin_config_file, bindings, given.continued):
            rows.append(row)
            share = row["train_events"]["continued"] / row["train_events"]["from nothing"]
            print(
                f"day {row['day']}: {METRIC} {row[METRIC]['continued']:.4f} continued, "
                f"{row[METRIC]['from nothing']:.4f} from nothing "
                f"({row['difference']:+.4f} ± {row['error']:.4f}, {row['targets']:,} users), "
                f"{share:.2f} of its events trained on",
                flush=True,
            )
            (out / "rows.json").write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
