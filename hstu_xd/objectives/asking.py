"""What a position is asked beside its next event: the next events of other domains.

A request names any domain, while a position's own target is of the domain that happens to come
next. Here positions are asked for other domains too, as a request would ask: with readers, which
leave the history as it is (:class:`hstu_xd.batch.Questions`). All labels are targets of the same
batch, so nothing that is held out from training can become one.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from hstu_xd.batch import AskedEvents, JaggedBatch, Questions


@dataclass(frozen=True)
class OtherDomains:
    """Ask positions for domains other than that of their next event.

    A question's answer is the next event of its domain after the position, its time the time of
    that event; a position is not asked for a domain that does not come again.

    Attributes:
        count: domains that a position is asked for; drawn where more of them come again. 0: none
            is asked for.
        weight: what such a target counts beside a position's own.
        within_events: an answer is one of this many events after the position; 0: any.
        within_time: an answer comes at most this much later, in the log's unit; 0: at any time.
    """

    count: int = 0
    weight: float = 1.0
    within_events: int = 0
    within_time: int = 0

    def ask(
        self, batch: JaggedBatch, targets: Tensor, num_domains: int, generator: torch.Generator
    ) -> AskedEvents:
        """Put questions to the positions of a batch; on a GPU it waits, on a CPU nobody does.

        Args:
            batch: histories without padding.
            targets: (L,) int64, the item that follows each token.
            num_domains: number of domains ``D``.
            generator: on the CPU; one number is drawn from it, whatever the batch. Equal events
                are asked for the same domains wherever they stand, so that several processes
                together ask what one would.
        """
        seed = int(torch.randint(2**62, (), generator=generator))
        answers = next_in_domains(batch, num_domains)
        is_asked = self._may_be_asked(batch, answers)
        if self.count < num_domains - 1:
            lots = _lots(seed, batch, targets, num_domains).masked_fill_(~is_asked, -1)
            drawn = lots.topk(self.count, dim=0).indices
            is_asked &= torch.zeros_like(is_asked).scatter_(0, drawn, True)
        rows, domains = is_asked.T.nonzero(as_tuple=True)
        answer = answers[domains, rows]
        counts = torch.bincount(domains, minlength=num_domains).tolist()
        return AskedEvents(
            Questions(rows, domains, batch.next_timestamps[answer]), targets[answer], tuple(counts)
        )

    def _may_be_asked(self, batch: JaggedBatch, answers: Tensor) -> Tensor:
        """Return which domains each position may be asked for: (D, L) bool."""
        num_domains, length = answers.shape
        domains = torch.arange(num_domains, device=answers.device).unsqueeze(1)
        asked = (answers < length) & (domains != batch.target_domains)
        if self.within_events:
            rows = torch.arange(length, device=answers.device)
            asked &= answers - rows < self.within_events
        if self.within_time and length:
            later = batch.next_timestamps[answers.clamp(max=length - 1)] - batch.timestamps
            asked &= later <= self.within_time
        return asked


def next_in_domains(batch: JaggedBatch, num_domains: int) -> Tensor:
    """Find the token whose target is the next event of each domain.

    Args:
        batch: histories without padding, of L tokens.
        num_domains: number of domains ``D``.

    Returns:
        (D, L) int64: the first token from each position on, of the same user, whose target is of
        the domain; L where the domain does not come again.
    """
    length = batch.target_domains.numel()
    rows = torch.arange(length, device=batch.offsets.device)
    domains = torch.arange(num_domains, device=rows.device).unsqueeze(1)
    here = torch.where(batch.target_domains == domains, rows, length)
    following = here.flip(1).cummin(1).values.flip(1) if length else here
    ends = torch.repeat_interleave(
        batch.offsets[1:], batch.offsets.diff(), output_size=length
    )  # what comes after its user's end is somebody else's
    return following.masked_fill_(following >= ends, length)


def _lots(seed: int, batch: JaggedBatch, targets: Tensor, num_domains: int) -> Tensor:
    """Draw a number of at least 0 for every domain at every position, by what stands there.

    Returns:
        (D, L) int64.
    """
    lots = torch.full_like(targets, seed)
    for numbers in (batch.item_ids, targets, batch.timestamps):
        lots = _mixed(lots ^ numbers)
    domains = torch.arange(num_domains, device=targets.device).unsqueeze(1)
    return _mixed(lots ^ _mixed(domains + 1)).bitwise_and_(2**63 - 1)


def _mixed(numbers: Tensor) -> Tensor:
    """Mix the bits of int64 numbers, so that neighbours have nothing in common (splitmix64)."""
    numbers = (numbers ^ (numbers >> 30)) * -4658895280553007687
    numbers = (numbers ^ (numbers >> 27)) * -7723592293110705685
    return numbers ^ (numbers >> 31)
