"""Small made-up runs and their store, laid out as ``train`` and ``prepare`` lay them out."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from hstu_xd.data.store_files import Log, write_store
from hstu_xd.evaluation.protocol import METRICS

DOMAINS = ("beauty", "books", "films")
ITEMS_EACH = 10


@dataclass
class Workshop:
    """Writes stores and runs below a folder."""

    root: Path

    def store(
        self,
        name: str = "prepared",
        *,
        domains: tuple[str, ...] = DOMAINS,
        users: int = 40,
        synthetic: bool = False,
        seed: int = 0,
    ) -> Path:
        rng = np.random.default_rng(seed)
        folder = self.root / name
        folder.mkdir()
        lengths = rng.integers(3, 30, users)
        size = len(domains) * ITEMS_EACH
        log = Log(
            users=pl.Series([f"u{i:04d}" for i in range(users)]),
            items=pl.DataFrame(
                {
                    "item": [f"i{i:03d}" for i in range(size)],
                    "domain": [d for d in sorted(domains) for _ in range(ITEMS_EACH)],
                }
            ),
            offsets=np.concatenate([[0], lengths.cumsum()]),
            item_ids=rng.integers(1, size + 1, lengths.sum()).astype(np.int32),
            time=np.arange(lengths.sum()),
        )
        write_store(folder, log, {"synthetic": synthetic})
        return folder

    def run(
        self,
        name: str,
        store: Path,
        *,
        variant: str = "hstu",
        seed: int = 1,
        level: float = 0.2,
        epochs: int = 4,
        finished: bool = True,
        **info: Any,
    ) -> Path:
        """A run whose HR@100 on test is ``level`` plus a thousandth a seed."""
        folder = self.root / name
        folder.mkdir(parents=True)
        manifest = json.loads((store / "manifest.json").read_text())
        counts = ("users", "items", "interactions", "domains", "delta", "synthetic")
        record = {
            "version": "0.1.0",
            "created": "2025-11-21T08:00:00Z",
            "command": f"hstu-xd train --data {store.name} --out {name}",
            "data": str(store),
            "data_hashes": manifest["hashes"],
            "data_summary": {key: manifest[key] for key in counts},
            "seed": seed,
            "parameters": 12345,
            "variant_name": variant,
            "torch": "2.13.0",
            "threads": 1,
            "switches": {"domain_mask": variant != "hstu", "tape": False, "target_view_heads": 0},
            "max_sequence_length": 100,
            "encoder": {"num_blocks": 2, "domain_mask": variant != "hstu"},
            "train": {"random_seed": seed, "local_batch_size": 32, "temperature": 0.05},
            **info,
        }
        (folder / "run.json").write_text(json.dumps(record))
        names = list(manifest["domains"])
        rows = []
        for epoch in range(1, epochs + 1):
            grown = level * (1 - 0.5**epoch)
            rows += [
                {
                    "split": "train",
                    "epoch": epoch,
                    "step": 2 * epoch + i,
                    "loss": 5 / epoch + seed / 9,
                }
                for i in (0, 1)
            ]
            rows.append(
                {"split": "valid", "epoch": epoch, "step": 2 * epoch + 1} | metrics(grown, names)
            )
        test = metrics(level + seed / 1000, names)
        if finished:
            rows.append({"split": "test", "epoch": epochs, "step": 2 * epochs + 1} | test)
            summary = {
                "best_epoch": epochs,
                "valid": metrics(level, names),
                "test": test,
                "seconds_per_step": 0.25,
                "events_per_second": 4321.0,
            }
            (folder / "summary.json").write_text(json.dumps(summary))
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return folder


def metrics(level: float, domains: list[str]) -> dict[str, float]:
    """All metrics of all groups around a level of HR@100."""
    scale = dict(zip(METRICS, (0.1, 0.4, 1.0, 0.2, 0.3, 0.15)))
    values: dict[str, float] = {}
    for i, suffix in enumerate(["", "[switch]", "[stay]", *(f"[{d}]" for d in domains)]):
        values |= {f"{m}{suffix}": level * share * (1 + i / 10) for m, share in scale.items()}
        values[f"count{suffix}"] = 40 - i
    return values
