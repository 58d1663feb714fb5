"""The rows that are asked of a layer, and what they read: no layer computes more than that.

Of a history that is encoded for what comes next, one row of the last layer is wanted. Queries,
gates, what they attend to, what they ask of the states and the output projection are computed for
it alone; keys, values and domain states of the rows that it reads; and the layer before computes
the rows that are read here. Where everything is read, earlier layers compute all rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hstu_xd.errors import InputError
from hstu_xd.model.views import EncoderRows, View
from hstu_xd.ops.grouping import DomainGrouping, lazy_property
from hstu_xd.ops.state_attention.state_reads import QuestionReads, StateReads

# Rows of a batch from which on it is worth finding out what is read, measured on a CPU with a width
# of 128. Where nothing is asked it is little work.
WORTH_ASKING = 384
# Of rows, the share that is worth computing alone; to leave a few out costs more than they do.
_MOST = 0.9


@dataclass(frozen=True, eq=False)
class AskedRows:
    """The rows whose output is asked of a layer, and what each of them reads.

    Attributes:
        rows: all rows of the batch.
        layer: its number, from 0.
        entries: (Q,) int64, ascending, each once: which of the L events and R questions are asked
            for; question ``r`` is ``L + r``.
        all_below: the layers before compute all rows all the same.
    """

    rows: EncoderRows
    layer: int
    entries: Tensor
    all_below: bool = False

    @classmethod
    def of(
        cls, rows: EncoderRows, asked: Tensor, layer: int, *, all_below: bool
    ) -> tuple["AskedRows", Tensor]:
        """Bring what is asked of the last layer into order.

        Args:
            rows: of the batch.
            asked: (n,) int64, entries in any order, perhaps several times.
            layer: number of the layer.
            all_below: the layers before compute all rows all the same.

        Returns:
            The Q rows, and where among them each of the ``n`` is, (n,) int64.
        """
        entries, places = asked.unique(return_inverse=True)
        return cls(rows, layer, entries, all_below), places

    def of_layers(self) -> Sequence["AskedRows | None"]:
        """Return what is asked of each layer up to this one; None where it is all rows."""
        found: list[AskedRows | None] = [*[None] * self.layer, self]
        asked, given = self, self.given
        while given is not None:
            asked = replace(asked, layer=asked.layer - 1, entries=given)
            found[asked.layer], given = asked, asked.given
        return found

    @lazy_property
    def places(self) -> Tensor:
        """Return where the rows lie among all: (Q,) int64."""
        order = self.rows.order
        return self.entries if order is None else order.entries[self.entries]

    @lazy_property
    def views(self) -> list[View]:
        """Return what the heads of the rows read."""
        views = self.rows.views(self.layer)
        return [View(v.heads, [g.asking(self.places) for g in v.groupings]) for v in views]

    @lazy_property
    def given(self) -> Tensor | None:
        """Return the rows that the layer is given, ascending: those asked for and what they read.

        None: all are.
        """
        settings, rows = self.rows.settings, self.rows
        if not self.layer or self.all_below or rows.order is not None or self.attends_everywhere:
            return None
        read = [grouping.keys.asked for view in self.views for grouping in view.groupings]
        tokens = [self.entries, *(each.tokens for each in read if each is not None)]
        if len(tokens) <= len(read):
            return None  # one reads nearly all
        if self.layer in settings.state_layers:
            tokens.append(states_of(self.state_reads))
        is_read = torch.zeros(self._length, dtype=torch.bool, device=self.entries.device)
        is_read[torch.cat(tokens)] = True
        (found,) = torch.nonzero(is_read, as_tuple=True)
        return found if found.numel() <= _MOST * self._length else None

    @property
    def attends_everywhere(self) -> bool:
        """Whether all rows have to attend, as what they read is their domain's state."""
        settings = self.rows.settings
        return settings.ddsr and settings.state_from == "output"

    def take(self, x: Tensor) -> Tensor:
        """Take the rows that are asked for out of those that are given: (n, W) -> (Q, W)."""
        return self.at(self.places, x)

    def at(self, rows: Tensor, x: Tensor) -> Tensor:
        """Take rows of the batch out of those that are given: (m,) int64, (n, W) -> (m, W)."""
        if self.given is None:
            return x.index_select(0, rows)
        return x.index_select(0, self._places_given[rows])

    def memory(self, grouping: DomainGrouping, x: Tensor) -> Tensor:
        """Take the rows that are keys of one of the views' groupings: (n, W) -> (m, W)."""
        read = grouping.keys.asked
        return x if read is None else self.at(read.tokens, x)

    @lazy_property
    def _places_given(self) -> Tensor:
        assert self.given is not None
        numbers = torch.arange(self._length, device=self.given.device)
        return numbers.index_copy(0, self.given, numbers[: self.given.numel()])

    @lazy_property
    def targets(self) -> Tensor:
        """Return the domain that each row predicts: (Q,) int64."""
        return self.rows.entry_targets[self.entries]

    @lazy_property
    def state_reads(self) -> StateReads:
        """Return which domain states the events among the rows read."""
        # The states that questions read are those of any event.
        narrowed = self.rows.order is None
        return self.rows.state_reads.asking(self.entries[: self._num_events], narrowed=narrowed)

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
        """Take the states that events read, then those of questions that ask: (n, W) -> (m, W)."""
        if self.rows.order is None:
            return self.at(states_of(self.state_reads), states)
        entries = self.rows.take_entries(states)
        if self.rows.questions is None:
            return entries
        return torch.cat([entries[: self._length], entries[self._length :][self._questions]])

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


def check_asked(asked: Tensor, number: int) -> None:
    """Refuse what names no rows of a batch.

    Args:
        asked: (n,) int64, which rows are asked for.
        number: of events and questions.

    Raises:
        InputError: not a vector of int64, or rows that there are not (the last is checked on CPU
            only, where it costs no wait).
    """
    if asked.ndim != 1 or asked.dtype != torch.int64:
        raise InputError(
            f"asked is {asked.dtype} of shape {tuple(asked.shape)}; a vector of torch.int64 is "
            "needed: call asked.long() or flatten it"
        )
    if asked.device.type == "cpu" and asked.numel() and not torch.compiler.is_compiling():
        first, last = int(asked.min()), int(asked.max())
        if first < 0 or last >= number:
            raise InputError(
                f"asked holds {first}..{last}; the batch has rows 0..{number - 1}: its events, "
                "then its questions"
            )


def pays(x: Tensor, asked: Tensor) -> bool:
    """Return whether to compute some rows alone: of a batch (L', K) with (Q,) that are asked for.

    On a GPU, whose kernels compute all queries, nobody has measured it.
    """
    return x.device.type == "cpu" and (len(x) >= WORTH_ASKING or not asked.numel())


def states_of(reads: StateReads) -> Tensor:
    """Return the tokens whose states are read by some that ask: (n,) int64."""
    assert reads.asked is not None
    return reads.asked.states
