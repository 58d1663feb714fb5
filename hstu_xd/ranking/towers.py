"""Two towers for coarse ranking: one encoder pass of a history, read out once for every goal.

A candidate's score is a dot product of a vector of the user, by goal, and one of the item, so that
an index finds the best items of a whole catalogue. That a target-decoupled SASRec serves coarse
ranking is stated in arXiv 2510.21714; the read-outs and their controls are decisions of this
project.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hstu_xd.errors import InputError
from hstu_xd.interest.positions import Positions
from hstu_xd.interest.tin import target_attention
from hstu_xd.ranking.batches import RequestBatch
from hstu_xd.ranking.histories import Levels
from hstu_xd.ranking.model import ItemVectors, RankingModel
from hstu_xd.ranking.settings import RankingSettings


class TowerRanker(RankingModel):
    """Scores ``<h_g, W_g e_c>``, where ``h_g`` is read out of the encoded history for the goal g.

    The encoder is SASRec's (arXiv 1808.09781), with layer norms before attention and network: an
    event reads those before it, and a learned vector that stands before the first one, which is all
    there is of a user without events. ``h_g`` is attention with a learned query for each goal.

    Args:
        levels: of the store's items.
        known: (I + 1,) bool, items that have a vector of their own.
        goals: number of goals.
        settings: all of the run.

    Raises:
        InputError: vectors that do not split into heads.
    """

    def __init__(
        self, levels: Levels, known: NDArray[np.bool_], goals: int, settings: RankingSettings
    ) -> None:
        super().__init__(levels, known, goals, settings)
        rank, self._settings = settings.rank, settings.interest
        self.items = ItemVectors(
            levels.paths,
            known,
            item_width=rank.item_width,
            level_width=rank.level_width,
            std=rank.init_std,
        )
        width, readout = self.items.width, self._settings.readout
        if width % self._settings.heads:
            raise InputError(
                f"xd_interest.heads = {self._settings.heads} does not divide {width}, the width of "
                f"an item's vector (xd_rank.item_width and xd_rank.level_width, "
                f"{len(levels.names)} levels); choose others"
            )
        self.positions = Positions(
            width,
            settings.search.k,
            goals=0,
            rank=self._settings.rank_encoding,
            gap=self._settings.gap_encoding,
            std=rank.init_std,
        )
        self.start = nn.Parameter(rank.init_std * torch.randn(width))
        own = {"layer": 1, "tower": self._settings.layers}.get(readout, 0)
        self.shared = self._encoder(width, self._settings.layers - own)
        self.own = nn.ModuleList(self._encoder(width, own) for _ in range(goals if own else 0))
        self.norm = nn.LayerNorm(width)
        decoupled = readout in ("goal", "layer", "tower")
        self.queries = nn.Parameter(torch.randn(goals if decoupled else 1, width))
        # Likeness of items is seen from the first step on where nothing turns their vectors.
        self.maps = nn.Parameter(torch.eye(width).repeat(len(self.queries), 1, 1))
        self.goals = nn.Embedding(goals, width) if readout == "embedding" else None
        self.bias = nn.Parameter(torch.zeros(goals))

    def _encoder(self, width: int, layers: int) -> nn.ModuleList:
        return nn.ModuleList(
            nn.TransformerEncoderLayer(
                width, self._settings.heads, 2 * width, 0.0, batch_first=True, norm_first=True
            )
            for _ in range(layers)
        )

    def item_vectors(self, items: Tensor) -> Tensor:
        """Return the vectors that an index holds: (..., d), the same for all goals."""
        return self.items(items)

    def user_vectors(self, batch: RequestBatch) -> Tensor:
        """Return the vectors that an index is asked with: (R, G, d).

        The map of a goal is taken to the user's side, ``<h, W e> = <W' h, e>``, so that one index
        serves all goals.
        """
        goals, (states, hidden) = len(self.bias), self._encoded(batch)
        queries = self.queries.expand(states.shape[0], -1, -1)
        if self.own:
            read = [
                self._read(queries[:, [goal]], self._layers(layers, states, hidden), hidden)
                for goal, layers in enumerate(self.own)
            ]
            vectors = torch.cat(read, 1)
        else:
            vectors = self._read(queries, states, hidden)
        if self.goals is not None:
            vectors = vectors + self.goals.weight
        mapped = (vectors.unsqueeze(2) @ self.maps).squeeze(2)
        return mapped.expand(-1, goals, -1) / mapped.shape[-1] ** 0.5

    def forward(self, batch: RequestBatch) -> Tensor:
        """Return the logits of the requests' candidates for their goals: (R, C)."""
        rows = torch.arange(batch.goals.shape[0])
        asked = self.user_vectors(batch)[rows, batch.goals]
        logits = (self.item_vectors(batch.candidates) @ asked.unsqueeze(-1)).squeeze(-1)
        return logits + self.bias[batch.goals, None]

    def tables(self) -> list[nn.Parameter]:
        """Return the parameters that are looked up rather than multiplied."""
        return [*self.items.parameters(), *self.positions.parameters(), self.start]

    def _encoded(self, batch: RequestBatch) -> tuple[Tensor, Tensor]:
        """Return (R, K + 1, d) states, latest event first, and where no event is, (R, K + 1)."""
        events = self.positions(self.items(batch.events), batch.buckets, batch.goals)
        rows = torch.cat([events, self.start.expand(events.shape[0], 1, -1)], 1)
        hidden = nn.functional.pad(batch.events == 0, (0, 1))
        return self._layers(self.shared, rows, hidden), hidden

    def _layers(self, layers: nn.Module, rows: Tensor, hidden: Tensor) -> Tensor:
        """Run layers in which an event reads itself and those before it, which stand behind it."""
        later = torch.ones(2 * [rows.shape[1]], dtype=torch.bool).tril(-1)
        for layer in layers.children():
            rows = layer(rows, src_mask=later, src_key_padding_mask=hidden)
        return rows

    def _read(self, queries: Tensor, states: Tensor, hidden: Tensor) -> Tensor:
        """Weigh states by their likeness to learned queries: (R, G, d)."""
        return target_attention(queries, self.norm(states), ~hidden)
