"""Metrics of trained runs among a target and 999 sampled candidates, without sampling any.

    python examples/results/fk/among_sampled.py STORE RUN ...

With ``r`` unseen items of the domain above the target and ``m`` in all beside it, the number of
sampled ones above it is hypergeometric; what is printed, one JSON object a run and split, is the
expectation. Ties count against the target, and no user may have met an item twice, as in fk.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch

from hstu_xd.data.batches import SequenceData, Split
from hstu_xd.data.store import InteractionStore
from hstu_xd.evaluation.ranks import rank_targets
from hstu_xd.training.run import load_trained, stored_settings

SAMPLED = 999


def expected(above: np.ndarray, others: np.ndarray) -> dict[str, float]:
    """Return the mean metrics of targets with so many items above them, out of so many others."""
    places = np.arange(SAMPLED + 1)  # sampled items above the target
    gain = 1 / np.log2(places + 2)
    values = {
        "hr@5": places < 5,
        "hr@10": places < 10,
        "ndcg@10": gain * (places < 10),
        "mrr": 1 / (places + 1),
    }
    log_factorial = np.concatenate([[0.0], np.log(np.arange(1, others.max() + 1)).cumsum()])

    def log_choose(n: np.ndarray, k: np.ndarray) -> np.ndarray:
        inside = (k >= 0) & (k <= n)
        k = np.clip(k, 0, n)
        chosen = log_factorial[n] - log_factorial[k] - log_factorial[n - k]
        return np.where(inside, chosen, -np.inf)

    sums = dict.fromkeys(values, 0.0)
    for r, m in zip(above, others):
        share = np.exp(
            log_choose(r, places)
            + log_choose(m - r, SAMPLED - places)
            - log_choose(m, np.array(SAMPLED))
        )
        for name, value in values.items():
            sums[name] += float((share * value).sum())
    return {name: total / len(above) for name, total in sums.items()}


def main(store_path: Path, runs: list[Path]) -> None:
    """Print the rows of some runs."""
    store = InteractionStore.open(store_path)
    for run in runs:
        trained = load_trained(run)
        window = stored_settings(run, allow_imports=False).train.max_sequence_length
        for split in (Split.VALID, Split.TEST):
            data = SequenceData(store, split, window)
            ranked = rank_targets(trained.model, data, data.users, scorer=trained.scorer)
            seen, offsets = data.seen(data.users)
            user = torch.repeat_interleave(torch.arange(data.users.size), offsets.diff())
            row: dict[str, object] = {"run": run.name, "split": split.value}
            for domain, name in enumerate(store.catalog.domain_names):
                met = user[store.catalog.domain_of(seen) == domain]
                pool = store.catalog.items_of(domain).numel()
                others = pool - 1 - torch.bincount(met, minlength=data.users.size)
                mine = ranked.domains == domain
                row[name] = expected((ranked.ranks[mine] - 1).numpy(), others[mine].numpy())
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), [Path(run) for run in sys.argv[2:]])
