"""Items that training never met, ranked by their features: cut the journey log, and judge runs.

    python cold_items.py cut journey_events.parquet journey_items.parquet SEED OUT
    python cold_items.py judge valid|test RUN [RUN ...]

Two tenths of the items, drawn apart, keep no event but one of each user: the one before the last
is of the first tenth, which validation asks for, and the last one is of the second, which test asks
for. Equal scores are put in random order, for the model as for what is counted: means over draws.
"""

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import polars as pl
import torch
from torch import Tensor

from hstu_xd.data.batches import SequenceData, Split
from hstu_xd.data.store import InteractionStore
from hstu_xd.evaluation.metrics import RankedTargets, user_metrics
from hstu_xd.evaluation.ranks import target_ranks
from hstu_xd.objectives.objective import DotProduct
from hstu_xd.training.run import TrainedRun, load_trained
from hstu_xd.training.run_facts import open_data, read_run

METRICS = ("hr@10", "hr@100", "ndcg@100", "mrr")
DRAWS = 5
Scorer = Callable[[Tensor], Callable[[Tensor], Tensor]]


def cut(events: Path, items: Path, seed: int, out: Path) -> None:
    """Write log.parquet and items.parquet into a folder."""
    table = pl.read_parquet(items).rename({"department": "domain"})
    log = pl.read_parquet(events).join(table.select("item_id", "domain"), on="item_id")
    log = log.select("user_id", "item_id", "domain", "timestamp")
    bought = log["item_id"].unique().sort().shuffle(seed=seed)
    tenth = len(bought) // 10
    first, second = (pl.col("item_id").is_in(bought[n : n + tenth].implode()) for n in (0, tenth))

    def latest(rows: pl.DataFrame, name: str) -> tuple[pl.DataFrame, pl.DataFrame]:
        kept = rows.sort("timestamp", "item_id").group_by("user_id").last().select(log.columns)
        return kept, kept.select("user_id", pl.col("timestamp").alias(name))

    last, ends = latest(log.filter(second), "end")
    earlier = log.filter(first).join(ends, on="user_id").filter(pl.col("timestamp") < pl.col("end"))
    before_last, stops = latest(earlier, "stop")
    warm = log.filter(~first & ~second).join(ends, on="user_id", how="left")
    warm = warm.join(stops, on="user_id", how="left")
    until = pl.min_horizontal("end", "stop")
    warm = warm.filter(until.is_null() | (pl.col("timestamp") < until)).select(log.columns)
    # Who has fewer than ten events left would train on all of them, cold ones too.
    whole = pl.concat([warm, before_last, last]).filter(pl.len().over("user_id") >= 10)
    out.mkdir(parents=True)
    whole.write_parquet(out / "log.parquet")
    table.write_parquet(out / "items.parquet")


def counted(store: InteractionStore, train: SequenceData) -> Iterator[tuple[str, np.ndarray]]:
    """Yield what items are ranked by without a model: (I,) numbers of their node."""
    counts = np.bincount(train.events()[0].numpy(), minlength=store.num_items + 1)[1:]
    assert store.taxonomy is not None
    for level in ("category", "type"):
        # Node 0 is none.
        nodes = store.taxonomy.nodes[store.taxonomy.names.index(level)] + 1
        events, met = (np.bincount(nodes, weights=x) for x in (counts, counts > 0))
        events[0] = met[0] = 0
        yield f"popularity of the {level}", events[nodes]
        yield f"events an item of the {level}", (events / np.maximum(met, 1))[nodes]


def vectors_and_targets(trained: TrainedRun, data: SequenceData) -> tuple[Tensor, Tensor]:
    """Encode all histories; return user vectors and wanted items, by user."""
    found = []
    with torch.no_grad():
        for some in np.array_split(data.users, range(128, data.users.size, 128)):
            batch, targets = data.batch(some)
            last = batch.offsets[1:] - 1
            found.append((trained.ranker(batch)[last], targets[last]))
    vectors, targets = zip(*found)
    return torch.cat(vectors), torch.cat(targets)


def judge(run: Path, split: Split) -> dict:
    """Measure a run and its rivals on the cold targets of a split."""
    trained, store = load_trained(run), open_data(run)
    protocol, length = trained.protocol, read_run(run)["max_sequence_length"]
    data, train = (protocol.sequences(store, each, length) for each in (split, Split.TRAIN))
    vectors, wanted = vectors_and_targets(trained, data)
    met = trained.ranker.met_items
    assert met is not None
    cold = ~met[wanted]
    users, vectors, wanted = data.users[cold.numpy()], vectors[cold], wanted[cold]
    draws = torch.from_numpy(np.random.default_rng(0).random((DRAWS, store.num_items + 1)))

    def metrics(vectors: Tensor, scorer: Scorer, size: float) -> dict[str, np.ndarray]:
        """Average the metrics of each user over draws of a noise that is smaller than gaps."""
        seen, alike = data.seen(users), torch.zeros_like(wanted)
        found = []
        for noise in draws:

            def noisy(pool: Tensor, noise: Tensor = noise) -> Callable[[Tensor], Tensor]:
                score, jitter = scorer(pool), size * noise[pool]
                return lambda users: score(users).double() + jitter

            ranks, others = target_ranks(
                vectors, wanted, *seen, store.catalog, noisy, protocol=protocol
            )
            ranked = RankedTargets(ranks, alike, alike > 0, others)
            found.append(user_metrics(ranked, protocol))
        return {name: np.mean([x[name].numpy() for x in found], axis=0) for name in METRICS}

    with torch.no_grad():
        model = metrics(vectors, trained.scorer, 1e-7)
    rows, against = {"features": model}, {}
    one = torch.ones(len(wanted), 1, dtype=torch.float64)
    for name, numbers in counted(store, train):
        scores = torch.from_numpy(np.concatenate([[0.0], numbers]))[:, None]
        rows[name] = metrics(one, DotProduct(lambda items, scores=scores: scores[items]), 1e-4)
        difference = model["ndcg@100"] - rows[name]["ndcg@100"]
        against[name] = [difference.mean(), difference.std(ddof=1) / len(difference) ** 0.5]
    return {
        "seed": read_run(run)["seed"],
        "split": split.value,
        "targets": len(wanted),
        "rows": {
            name: {metric: round(float(x.mean()), 6) for metric, x in values.items()}
            for name, values in rows.items()
        },
        "ndcg@100 ahead of, standard error": {
            name: [round(float(x), 6) for x in pair] for name, pair in against.items()
        },
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1] == "cut":
        cut(Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]), Path(sys.argv[5]))
    else:
        found = [judge(Path(run), Split(sys.argv[2])) for run in sys.argv[3:]]
        print(json.dumps(found, indent=1))
