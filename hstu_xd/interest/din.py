"""Controls of TIN: an MLP that weighs events (DIN, arXiv 1706.06978), and their plain mean."""

import torch
from torch import Tensor, nn


class DIN(nn.Module):
    """Weighs every event by an MLP of candidate and event; the weights need not sum to one.

    The MLP reads ``[q, k, q - k, q * k]``; its first layer is applied to the parts, so that nothing
    of size N C K 4d is made.

    Args:
        width: of candidates and events.
        hidden: width of the MLP.

    Attributes:
        out_features: width of the result, ``[u, c]``.
    """

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.of_target = nn.Linear(width, hidden)
        self.of_event = nn.Linear(width, hidden, bias=False)
        self.of_product = nn.Linear(width, hidden, bias=False)
        self.last = nn.Sequential(nn.PReLU(), nn.Linear(hidden, 1))
        self.out_features = 2 * width

    def forward(
        self, candidates: Tensor, events: Tensor, mask: Tensor, buckets: Tensor, goals: Tensor
    ) -> Tensor:
        """Return what the events say of each candidate, see :meth:`TIN.forward`, time unread."""
        products = candidates.unsqueeze(2) * events.unsqueeze(1)
        hidden = self.of_target(candidates).unsqueeze(2) + self.of_event(events).unsqueeze(1)
        weights = self.last(hidden + self.of_product(products)).squeeze(-1) * mask[:, None]
        return torch.cat([weights @ events, candidates], -1)


class MeanPool(nn.Module):
    """Reads every event alike: the result is ``[mean, c]``.

    Args:
        width: of candidates and events.

    Attributes:
        out_features: width of the result.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.out_features = 2 * width

    def forward(
        self, candidates: Tensor, events: Tensor, mask: Tensor, buckets: Tensor, goals: Tensor
    ) -> Tensor:
        """Return the events' mean beside each candidate, see :meth:`TIN.forward`."""
        there = mask.unsqueeze(-1).to(events.dtype)
        mean = (events * there).sum(1, keepdim=True) / there.sum(1, keepdim=True).clamp(min=1)
        return torch.cat([mean.expand_as(candidates), candidates], -1)
