"""The metrics of a run: as they come, a file of JSON lines and TensorBoard's log; its summary."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hstu_xd.data.batches import Split

METRICS_FILE, SUMMARY_FILE = "metrics.jsonl", "summary.json"


def write_summary(run: Path, summary: Mapping[str, Any]) -> None:
    """Write what a run has come to, which appears whole or not at all."""
    partial = run / "summary.partial"
    partial.write_text(json.dumps(summary, indent=1) + "\n")
    partial.replace(run / SUMMARY_FILE)


class MetricsLog:
    """Appends rows to a run's metrics file and mirrors them to TensorBoard.

    Args:
        run: the run folder.
        enabled: False on all processes but the first, which then write nothing.
    """

    def __init__(self, run: Path, *, enabled: bool) -> None:
        self._path, self._folder, self._enabled = run / METRICS_FILE, run / "tensorboard", enabled
        self._board = None

    def rewind(self, size: int, step: int) -> None:
        """Forget what was written after a checkpoint: rows past ``size`` bytes come again."""
        if self._enabled:
            if self._path.exists():  # a run may stop before it has a row
                os.truncate(self._path, size)
            self._open(purge_step=step)

    def size(self) -> int:
        """Bytes written so far."""
        return self._path.stat().st_size if self._path.exists() else 0

    def write(self, split: Split, epoch: int, step: int, values: Mapping[str, float]) -> None:
        """Append one evaluation (or training) row."""
        if not self._enabled:
            return
        row = {"split": split.value, "epoch": epoch, "step": step, **values}
        with self._path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        board = self._board or self._open(purge_step=None)
        for name, value in values.items():
            board.add_scalar(f"{split.value}/{name}", value, step)
        board.flush()

    def close(self) -> None:
        """Close TensorBoard's file."""
        if self._board is not None:
            self._board.close()

    def _open(self, purge_step: int | None):  # type: ignore[no-untyped-def]
        # Imported here: TensorBoard takes a second to load and evaluation alone never needs it.
        from torch.utils.tensorboard import SummaryWriter

        self._board = SummaryWriter(str(self._folder), purge_step=purge_step)
        return self._board
