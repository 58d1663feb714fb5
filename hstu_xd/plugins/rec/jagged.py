"""REC's padded batches as the jagged ones that this package computes with."""

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import pad

from hstu_xd.model.views import Events


@dataclass(frozen=True, eq=False)
class JaggedBatch:
    """The valid tokens of a padded batch.

    Attributes:
        valid: (B, N) bool, a run of columns up to the last one.
        present: (L,) int64, places of the valid tokens in the flat batch.
        events: the valid tokens.
    """

    valid: Tensor
    present: Tensor
    events: Events

    @classmethod
    def of(cls, valid: Tensor, domains: Tensor, times: Tensor) -> "JaggedBatch":
        """Cut the padding off.

        Args:
            valid: (B, N) bool.
            domains: (B, N + 1) int64, that of the event after the last included.
            times: (B, N + 1) int64, likewise.
        """
        present = valid.flatten().nonzero().squeeze(1)
        events = Events(
            domains=domains[:, :-1].flatten()[present],
            target_domains=domains[:, 1:].flatten()[present],
            timestamps=times[:, :-1].flatten()[present],
            next_timestamps=times[:, 1:].flatten()[present],
            offsets=pad(valid.sum(1).cumsum(0), (1, 0)),
        )
        return cls(valid, present, events)

    def gather(self, padded: Tensor) -> Tensor:
        """The valid tokens: (B, N, ...) -> (L, ...)."""
        return padded.flatten(0, 1)[self.present]

    def spread(self, tokens: Tensor) -> Tensor:
        """Back to their places, zeros elsewhere: (L, ...) -> (B, N, ...)."""
        padded = tokens.new_zeros(self.valid.numel(), *tokens.shape[1:])
        return padded.index_copy(0, self.present, tokens).unflatten(0, self.valid.shape)
