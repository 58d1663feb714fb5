"""The rows whose output is asked of the last layer: it computes the queries of no others.

A layer costs what its rows ask and what they can be asked. The second, keys, values and domain
states, is needed of all rows; queries, gates, what they attend to, what they ask of the states and
the output projection are needed of the rows alone that somebody reads. Of a history that is encoded
for what comes next, that is its last one.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hstu_xd.errors import InputError
from hstu_xd.model.views import EncoderRows, View
from hstu_xd.ops.grouping import lazy_property
from hstu_xd.ops.state_attention.state_reads import QuestionReads, StateReads


@dataclass(frozen=True, eq=False)
class AskedRows:
    """Some of a batch's rows, and what each of them reads.

    Attributes:
        rows: all rows of the batch.
        entries: (Q,) int64, ascending, each once: which of the L events and R questions are asked
            for; question ``r`` is ``L + r``.
    """

    rows: EncoderRows
    entries: Tensor

    @classmethod
    def of(cls, rows: EncoderRows, asked: Tensor) -> tuple["AskedRows", Tensor]:
        """Bring what is asked for into order.

        Args:
            rows: of the batch.
            asked: (n,) int64, in any order, entries perhaps several times.

        Returns:
            The Q rows, and the place among them of each one that is asked for, (n,) int64.

        Raises:
            InputError: not a vector of int64, or entries that there are not (the last is checked
                on CPU only, where it costs no wait).
        """
        number = rows.entry_targets.numel()
        if asked.ndim != 1 or asked.dtype != torch.int64:
            raise InputError(
                f"rows is {asked.dtype} of shape {tuple(asked.shape)}; a vector of torch.int64 is "
                "needed: call rows.long() or flatten it"
            )
        entries, places = asked.unique(return_inverse=True)
        if entries.device.type == "cpu" and entries.numel():
            first, last = entries[[0, -1]].tolist()
            if first < 0 or last >= number:
                raise InputError(
                    f"rows holds {first}..{last}; the batch has rows 0..{number - 1}: its events, "
                    "then its questions"
                )
        return cls(rows, entries), places

    @lazy_property
    def places(self) -> Tensor:
        """Return where the rows lie among all: (Q,) int64."""
        order = self.rows.order
        return self.entries if order is None else order.entries[self.entries]

    def take(self, x: Tensor) -> Tensor:
        """Take the rows out of all: (L', W) -> (Q, W)."""
        return x.index_select(0, self.places)

    def narrowed(self, views: Sequence[View]) -> list[View]:
        """Return what the heads of these rows read, given what those of all rows read."""
        return [View(v.heads, [g.asking(self.places) for g in v.groupings]) for v in views]

    @lazy_property
    def targets(self) -> Tensor:
        """Return the domain that each row predicts: (Q,) int64."""
        return self.rows.entry_targets[self.entries]

    @lazy_property
    def state_reads(self) -> StateReads:
        """Return which domain states the events among the rows read."""
        return self.rows.state_reads.asking(self.entries[: self._num_events])

    @lazy_property
    def question_reads(self) -> QuestionReads | None:
        """Return which domain states the questions among the rows read."""
        asked = self.rows.questions
        if asked is None:
            return None
        which = self._questions
        return QuestionReads.copies(
            self.rows.state_reads, asked.rows[which], asked.timestamps[which]
        )

    def take_states(self, states: Tensor) -> Tensor:
        """Take the states of all events, then of questions that ask: (L', W) -> (n, W)."""
        entries = self.rows.take_entries(states)
        if self.rows.questions is None:
            return entries
        length = self._length
        return torch.cat([entries[:length], entries[length:][self._questions]])

    @property
    def _length(self) -> int:
        return self.rows.events.domains.numel()

    @lazy_property
    def _num_events(self) -> int:
        """Count the events among the rows, which come first."""
        if self.rows.questions is None:
            return self.entries.numel()
        return int((self.entries < self._length).sum())

    @property
    def _questions(self) -> Tensor:
        """Return which questions are among the rows: (n,) int64."""
        return self.entries[self._num_events :] - self._length
