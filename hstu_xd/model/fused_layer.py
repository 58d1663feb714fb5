"""A layer for a few new rows, on top of what earlier ones left: what serving steps through.

It computes what :meth:`hstu_xd.model.encoder.HSTULayer.forward` does, by weights that the layer
lays out for it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.functional import layer_norm, silu

from hstu_xd.model.ddsr import FusedStates, by_head, columns_by_head, side_by_side
from hstu_xd.model.settings import EncoderSettings

# Of the norms of a layer.
EPS = 1e-6


class LayerCache(NamedTuple):
    """What L' rows leave for later ones: (L', H dqk) keys, (L', H dv) values, (L', K) states."""

    keys: Tensor
    values: Tensor
    states: Tensor


class Attend(Protocol):
    """How rows attend to what is in memory, head by head: queries, keys, values, biases."""

    def __call__(self, query: Tensor, keys: Tensor, values: Tensor, bias: Tensor) -> Tensor:
        """Read (H, r, dv) by (H, r, dqk), (H, dqk, n), (H, n, dv) and (H, r, n).

        The biases may be overwritten.
        """
        ...


class StepMemory(Protocol):
    """What the new rows of a layer read: their users' memories, and one another."""

    def read_rows(self, queries: Tensor, own: Tensor, attend: Attend) -> Tensor:
        """Let R rows attend to earlier rows and to one another.

        Args:
            queries: (H, R, dqk) float.
            own: (H, dqk + dv, R) float, keys and values of the rows.
            attend: how.

        Returns:
            (R, H * dv) float.
        """
        ...

    def read_states(self, queries: Tensor, own: Tensor, attend: Attend) -> Tensor:
        """Let R rows ask the domain states; the arguments are those of :meth:`read_rows`."""
        ...


@dataclass(frozen=True, eq=False)
class FusedLayer:
    """A layer for a few new rows: all that they are multiplied with is merged into one matrix.

    Attributes:
        settings: of the encoder.
        projection: (K, W), columns of gates, of queries, and of each head's key and value side by
            side; with DDSR further those of its scaled queries and, where a state is the layer's
            input, of its keys and values side by side.
        widths: how many columns each of the five has.
        states: DDSR's weights; None without it.
        bias_tables: of positions, (2 N - 1,), and of times, (buckets + 1,); None without bias.
        combine: see :meth:`hstu_xd.model.encoder.HSTULayer.combine`.
    """

    settings: EncoderSettings
    projection: Tensor
    widths: list[int]
    states: FusedStates | None
    bias_tables: tuple[Tensor, Tensor] | None
    combine: Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]

    def added_by_target(self) -> Tensor:
        """Return what a target domain adds to the products: (D, W), to DDSR's queries."""
        added = torch.zeros(self.settings.num_domains, sum(self.widths))
        if self.states is not None and self.states.targets is not None:
            added.split(self.widths, dim=1)[3].copy_(self.states.targets)
        return added

    def row_memory(self, cache: LayerCache, rows: Tensor) -> Tensor:
        """Return keys and values of some of the full layer's rows: (H, dqk + dv, n)."""
        heads = self.settings.num_heads
        return columns_by_head(side_by_side(cache.keys[rows], cache.values[rows], heads), heads)

    def step(self, x: Tensor, added: Tensor, memory: StepMemory) -> Tensor:
        """Run the layer over a few new rows, as it runs over all, see the top of the module.

        Args:
            x: (R, K) float.
            added: (R, W) float, of :meth:`added_by_target`.
            memory: what the rows read.

        Returns:
            (R, K) float.
        """
        s = self.settings
        normed = layer_norm(x, x.shape[-1:], eps=EPS)
        projected = torch.addmm(added, normed, self.projection)
        if s.linear_activation == "silu":
            silu(projected[:, : sum(self.widths[:3])], inplace=True)
        u, q, kv, query, of_input = projected.split_with_sizes(self.widths, 1)
        queries, own = by_head(q, s.num_heads), columns_by_head(kv, s.num_heads)
        # The norm undoes a division by N, but for its eps: so the eps is multiplied instead.
        read = memory.read_rows(queries, own, self.attend)
        attended = layer_norm(read, read.shape[1:], eps=EPS * s.norm_length**2)
        answer = None
        if self.states is not None:
            written = of_input if s.state_from == "input" else attended @ self.states.memory
            answer = memory.read_states(
                by_head(query, s.num_heads),
                columns_by_head(written, s.num_heads),
                self.states.attend,
            )
        return self.combine(x, u, attended, answer)

    @staticmethod
    def attend(query: Tensor, keys: Tensor, values: Tensor, bias: Tensor) -> Tensor:
        """Attend to rows, ``N`` times over: see :class:`Attend`; overwrites ``bias``."""
        return torch.bmm(silu(bias.baddbmm_(query, keys), inplace=True), values)
