"""A log of people who come back to the same songs, and a run on it."""

from pathlib import Path

import numpy as np
from quick_runs import QUICKEST

from hstu_xd.data.prepare import prepare_logs
from hstu_xd.training.run import train
from hstu_xd.training.settings import load_settings


def repeating_store(folder: Path, *, users: int = 40, songs: int = 15, seed: int = 0) -> Path:
    """Write a store in which about half of all events are of items that their user had before."""
    random = np.random.default_rng(seed)
    lines = ["user,item,domain,timestamp"]
    for user in range(users):
        for event in range(12):
            item = int(random.integers(songs))
            domain = "jazz" if item % 3 else "rock"
            lines.append(f"u{user:02d},{domain}{item},{domain},{1_600_000_000 + 1000 * event}")
    log = folder / "plays.csv"
    log.write_text("\n".join(lines) + "\n")
    prepare_logs([str(log)], folder / "store")
    return folder / "store"


def repeating_run(store: Path, out: Path, *more: str) -> Path:
    """Train on it for an epoch."""
    train(store, load_settings([], [*QUICKEST, *more]), out)
    return out
