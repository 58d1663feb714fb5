"""How scores become weights: where SiLU and softmax attention differ in the eager walk.

Scores of a tile are (H * G, m, n) with all keys that a query may see in its row, and hugely
negative where it does not see one.
"""

from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import silu

from hstu_xd.ops.pair_bias import unseen


class Normalization(Protocol):
    """Weights of a tile and the gradient of its scores. Memory is used again where that is said."""

    def weights(self, scores: Tensor) -> Tensor:
        """Weights, zero where the query does not see the key; overwrites ``scores``."""
        ...

    def differentiable_weights(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Weights and a second tensor of their shape, both for :meth:`score_gradient`."""
        ...

    def score_gradient(
        self, weights: Tensor, kept: Tensor, grad_out: Tensor, values: Tensor
    ) -> Tensor:
        """Gradient of the scores; overwrites ``weights`` and ``kept``.

        Args:
            weights, kept: of :meth:`differentiable_weights`.
            grad_out: (H * G, m, dv) gradient of the weighted sum of values.
            values: (H * G, n, dv).
        """
        ...


class SiLU:
    """``w = s sigmoid(s)``; it and its slope are exactly zero at a hugely negative score."""

    def weights(self, scores: Tensor) -> Tensor:
        """``silu(s)``."""
        return silu(scores, inplace=True)

    def differentiable_weights(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """``silu(s)`` and the gate ``sigmoid(s)``."""
        gate = torch.sigmoid(scores)
        return scores.mul_(gate), gate

    def score_gradient(
        self, weights: Tensor, kept: Tensor, grad_out: Tensor, values: Tensor
    ) -> Tensor:
        """``dw (gate + w (1 - gate))``."""
        slope = weights.addcmul_(weights, kept, value=-1).add_(kept)
        return torch.bmm(grad_out, values.transpose(1, 2), out=kept).mul_(slope)


class Softmax:
    """``w = softmax(s)`` over the keys that a query sees; zero where it sees none."""

    def weights(self, scores: Tensor) -> Tensor:
        """``softmax(s)``."""
        sees = scores.amax(2, keepdim=True) > unseen(scores.dtype) / 2
        return scores.softmax(2).mul_(sees)

    def differentiable_weights(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """``softmax(s)``, and memory that is free from now on."""
        return self.weights(scores), scores

    def score_gradient(
        self, weights: Tensor, kept: Tensor, grad_out: Tensor, values: Tensor
    ) -> Tensor:
        """``w (dw - sum(w dw))``."""
        grad = torch.bmm(grad_out, values.transpose(1, 2), out=kept)
        return grad.sub_((weights * grad).sum(2, keepdim=True)).mul_(weights)
