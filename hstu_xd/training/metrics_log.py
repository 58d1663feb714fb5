"""The metrics of a run: as they come, a file of JSON lines and its trackers; its summary."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hstu_xd.data.batches import Split
from hstu_xd.training.run_facts import CONFIG_FILE, RUN_FILE
from hstu_xd.training.trackers import Trackers

METRICS_FILE, SUMMARY_FILE = "metrics.jsonl", "summary.json"


class MetricsLog:
    """Appends rows to a run's metrics file and tells its trackers, from entering to leaving it.

    Args:
        run: the run folder.
        enabled: False on all processes but the first, which then write nothing.
    """

    def __init__(self, run: Path, *, enabled: bool) -> None:
        self._run, self._path, self._enabled = run, run / METRICS_FILE, enabled
        self._trackers = Trackers(run)
        self._step: int | None = None

    def rewind(self, size: int, step: int) -> None:
        """Forget what was written after a checkpoint: rows past ``size`` bytes come again."""
        self._step = step
        if self._enabled and self._path.exists():  # a run may stop before it has a row
            os.truncate(self._path, size)

    def size(self) -> int:
        """Bytes written so far."""
        return self._path.stat().st_size if self._path.exists() else 0

    def __enter__(self) -> "MetricsLog":
        """Begin to tell the trackers of the run."""
        if self._enabled:
            lines = self._path.read_text().splitlines() if self._path.exists() else []
            self._trackers.start([_tracked(**json.loads(line)) for line in lines], self._step)
        return self

    def __exit__(self, *error: object) -> None:
        """Leave a run that has not been finished as one that may go on."""
        self._trackers.stop()

    def write(self, split: Split, epoch: int, step: int, values: Mapping[str, float]) -> None:
        """Append one evaluation (or training) row."""
        if not self._enabled:
            return
        row: dict[str, Any] = {"split": split.value, "epoch": epoch, "step": step, **values}
        with self._path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        self._trackers.metrics(*_tracked(**row))

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Write what the run has come to, which appears whole or not at all, and tell the trackers.

        Args:
            summary: of the run.
        """
        if not self._enabled:
            return
        partial = self._run / "summary.partial"
        partial.write_text(json.dumps(summary, indent=1) + "\n")
        partial.replace(self._run / SUMMARY_FILE)
        names = (RUN_FILE, CONFIG_FILE, METRICS_FILE, SUMMARY_FILE)
        files = [self._run / name for name in names]
        self._trackers.finish([file for file in files if file.exists()], summary)


def _tracked(split: str, epoch: int, step: int, **values: float) -> tuple[int, dict[str, float]]:
    """Return a row as trackers take it in: its step, and its values by split and name."""
    return step, {f"{split}/{name}": value for name, value in values.items()}
