"""The jagged batch that flows through the model: one entry a token, padding only if kept."""

from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from hstu_xd.errors import InputError

_Record = TypeVar("_Record", "JaggedBatch", "Questions", "AskedEvents")


def _moved(record: _Record, device: torch.device) -> _Record:
    """Return a record whose tensors, those of the records in it too, are on another device."""
    parts = {k: v.to(device) for k, v in vars(record).items() if hasattr(v, "to")}
    return replace(record, **parts)


@dataclass(frozen=True)
class JaggedBatch:
    """Histories of B users laid end to end, each token with what is known of its next event.

    Attributes:
        item_ids: (L,) int64, ``1..num_items``.
        timestamps: (L,) int64, in the log's own unit.
        next_timestamps: (L,) int64, time of the event that the token predicts.
        target_domains: (L,) int64, domain of the event that the token predicts.
        offsets: (B + 1,) int64, user ``b`` owns tokens ``offsets[b]:offsets[b + 1]``.
        padded_length: tokens of every user, padding included, where padding was kept; else None.
        targets_per_domain: D counts of ``target_domains`` where the host knows them, so that
            nobody waits for a GPU to count; else None.
        asked: what some tokens are asked beside their next event, where an objective has prepared
            it; else None.
    """

    item_ids: Tensor
    timestamps: Tensor
    next_timestamps: Tensor
    target_domains: Tensor
    offsets: Tensor
    padded_length: int | None = None
    targets_per_domain: tuple[int, ...] | None = None
    asked: "AskedEvents | None" = None

    def to(self, device: torch.device) -> "JaggedBatch":
        """Return the same batch on another device."""
        return _moved(self, device)

    @classmethod
    def from_padded(
        cls,
        item_ids: Tensor,
        timestamps: Tensor,
        request_timestamps: Tensor,
        next_domains: Tensor,
    ) -> "JaggedBatch":
        """Drop the padding of right-padded histories.

        Args:
            item_ids: (B, N) int64, oldest first, 0 after each user's last event.
            timestamps: (B, N) int64.
            request_timestamps: (B,) int64, the time each user's last token predicts for.
            next_domains: (B, N) int64, domain of the event after each token; at a user's last
                token the requested domain.

        Raises:
            InputError: a 0 before a user's last item (the histories are not right-padded).
        """
        present = item_ids != 0
        lengths = present.sum(1)
        column = torch.arange(item_ids.shape[1], device=item_ids.device)
        if not torch.equal(present, column < lengths.unsqueeze(1)):
            row = int((present != (column < lengths.unsqueeze(1))).any(1).nonzero()[0])
            raise InputError(
                f"item_ids row {row} holds padding (0) before its last item; move the items to the "
                "left and the zeros to the end"
            )
        next_times = _next_times(timestamps, lengths, request_timestamps)
        return cls(
            item_ids=item_ids[present],
            timestamps=timestamps[present],
            next_timestamps=next_times[present],
            target_domains=next_domains[present],
            offsets=torch.nn.functional.pad(lengths.cumsum(0), (1, 0)),
        )

    @classmethod
    def with_padding(
        cls,
        item_ids: Tensor,
        timestamps: Tensor,
        request_timestamps: Tensor,
        next_domains: Tensor,
    ) -> "JaggedBatch":
        """Keep the padding of right-padded histories: all sizes follow from shapes alone.

        Padding comes after all events, which never read what is later: it costs time and changes
        nothing. What stands at padding is to be ignored.

        Args:
            item_ids, timestamps, request_timestamps, next_domains: see :meth:`from_padded`;
                domain -1 at padding.
        """
        users, columns = item_ids.shape
        next_times = _next_times(timestamps, (item_ids != 0).sum(1), request_timestamps)
        return cls(
            item_ids=item_ids.flatten(),
            timestamps=timestamps.flatten(),
            next_timestamps=next_times.flatten(),
            target_domains=next_domains.flatten().clamp(min=0),
            offsets=torch.arange(users + 1, device=item_ids.device) * columns,
            padded_length=columns,
        )


@dataclass(frozen=True)
class Questions:
    """Events of a batch to be encoded once more, each for another domain or another time.

    A question is a copy of its event that reads what the event reads, the event's own place
    included, and that no other row reads: its vector is what the history up to the event says of
    that domain at that time.

    Attributes:
        rows: (R,) int64, token of the batch that each question is a copy of, in any order; a token
            may be asked several times.
        target_domains: (R,) int64, domain that is asked for.
        timestamps: (R,) int64, time of the request.
    """

    rows: Tensor
    target_domains: Tensor
    timestamps: Tensor

    def to(self, device: torch.device) -> "Questions":
        """Return the same questions on another device."""
        return _moved(self, device)

    def check(self, num_tokens: int, num_domains: int) -> None:
        """Refuse questions that do not fit a batch.

        Raises:
            InputError: shapes that differ, a dtype other than int64, or ids out of range (the last
                is checked on CPU only, where it costs no wait).
        """
        for name, tensor in vars(self).items():
            if tensor.shape != (self.rows.numel(),) or tensor.dtype != torch.int64:
                raise InputError(
                    f"questions.{name} is {tensor.dtype} of shape {tuple(tensor.shape)}; "
                    f"torch.int64 of shape ({self.rows.numel()},) is needed, one entry a question"
                )
        if self.rows.device.type != "cpu" or not self.rows.numel():
            return
        for name, bound in (("rows", num_tokens), ("target_domains", num_domains)):
            ids: Tensor = getattr(self, name)
            if int(ids.min()) < 0 or int(ids.max()) >= bound:
                raise InputError(
                    f"questions.{name} holds {int(ids.min())}..{int(ids.max())}; 0..{bound - 1} "
                    "are known"
                )


@dataclass(frozen=True)
class AskedEvents:
    """Questions whose answers are known: a training's targets beside the next events.

    Attributes:
        questions: R of them.
        targets: (R,) int64, the item that answers each question, of the domain that is asked for.
        targets_per_domain: D counts of the domains that are asked for.
    """

    questions: Questions
    targets: Tensor
    targets_per_domain: tuple[int, ...]

    def to(self, device: torch.device) -> "AskedEvents":
        """Return the same on another device."""
        return _moved(self, device)


def _next_times(timestamps: Tensor, lengths: Tensor, request_timestamps: Tensor) -> Tensor:
    """(B, N) time of the event after each one; after a user's last one that of the request."""
    column = torch.arange(timestamps.shape[1], device=timestamps.device)
    last = column == (lengths - 1).unsqueeze(1)
    return torch.where(last, request_timestamps.unsqueeze(1), timestamps.roll(-1, 1))
