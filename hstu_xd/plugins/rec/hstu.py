"""HSTU of HLLM and PerSRec with the cross-domain parts: the same parameters, the same calls."""

from typing import Any

import torch
import torch.distributed as dist
from REC.model.basemodel import all_gather
from REC.model.IDNet.hstu import HSTU
from torch import Tensor
from torch.nn.functional import normalize

from hstu_xd.errors import InputError
from hstu_xd.model.encoder import CrossDomainEncoder
from hstu_xd.plugins.bridge import UnpaddedBatch, draw_within
from hstu_xd.plugins.rec.cross_domain_mixin import CrossDomainMixin, hstu_sizes
from hstu_xd.plugins.rec.loss import own_generator, sampled_softmax
from hstu_xd.plugins.rec.settings import HSTU_MODEL

# Private to REC's stack of layers, and to each layer.
_LAYERS, _BIAS = "_attention_layers", "_rel_attn_bias"


class HSTU_XD(HSTU, CrossDomainMixin):
    """REC's HSTU that may attend inside domains, know the next domain and read domain states.

    With everything off it runs REC's own code. Otherwise this package's layers hold REC's
    parameters and see the valid tokens only, end to end: REC fills the left of short histories
    with random items when it trains. What attention is divided by stays the padded length.

    Args:
        config: REC's configuration.
        args: what REC's HSTU takes behind it, HLLM's ``dataload`` or PerSRec's numbers.
    """

    _xd_model = HSTU_MODEL

    def __init__(self, config: Any, *args: Any) -> None:
        super().__init__(config, *args)
        self._xd_configure()
        if not self._xd_is_plain:
            self._xd_add_parts(hstu_sizes(config) | {"norm_length": self._max_sequence_length})
            self._xd_check_length(config)
            self._xd_take_over_layers()
        self._xd_warm_start()

    def _xd_check_length(self, config: Any) -> None:
        trained, evaluated = (config[f"MAX_ITEM_LIST_LENGTH{x}"] for x in ("", "_TEST"))
        if evaluated and evaluated != trained:
            raise InputError(
                f"MAX_ITEM_LIST_LENGTH_TEST: {evaluated}; {self._xd_model} with a switch on "
                f"divides attention by MAX_ITEM_LIST_LENGTH ({trained}) throughout: give both the "
                "same value, or leave the first out"
            )

    def _xd_take_over_layers(self) -> None:
        """Put this package's layers in the place of REC's, with REC's parameters."""
        layers = getattr(self._hstu, _LAYERS)
        stack = CrossDomainEncoder(self._xd_encoder_settings)
        if not self._xd_settings.relative_bias:
            for layer in layers:
                if getattr(layer, _BIAS) is not None:  # built, and applied neither there nor here
                    layer.register_module(_BIAS, None)
        stack.take_parameters(layers)
        self._hstu = stack

    def forward(self, interaction: tuple[Tensor, ...]) -> dict[str, Tensor]:
        """Compute the loss of a batch.

        Args:
            interaction: items (B, N + 1) int64, negatives (B, N + 1) int64, which of the first N
                items predict their next one (B, N) int64, what else REC puts there, and
                where the settings read time, times (B, N + 1) int64 last.
        """
        if self._xd_is_plain:
            return super().forward(interaction)
        items, drawn, valid = interaction[0], interaction[1], interaction[2].bool()
        times = interaction[-1] if self._xd_settings.reads_time else torch.zeros_like(items)
        domains = self._xd_domains_of(items)
        hidden = self._xd_encode(items[:, :-1], valid, domains, times)
        targets = items[:, 1:][valid]
        negatives, excluded = self._xd_negatives(items, drawn, targets)
        with torch.no_grad():
            self.logit_scale.clamp_(0, torch.tensor(100.0).log().item())
        return sampled_softmax(
            hidden,
            self._xd_vectors(targets),
            self._xd_vectors(negatives),
            scale=self.logit_scale.exp(),
            threshold=self.nce_thres,
            excluded=excluded,
        )

    @torch.no_grad()
    def predict(
        self, item_seq: Tensor, time_seq: Tensor, item_feature: Tensor, *args: Any
    ) -> Tensor:
        """Score all items.

        Args:
            item_seq: (B, N) int64, oldest first, zeros at the left.
            time_seq: as REC's with everything off; else (B, N + 2) int64 of
                :func:`hstu_xd.plugins.rec.rec_metrics.with_request`.
            item_feature: (item_num, K) float, unit vectors.
            args: what else REC passes.

        Returns:
            (B, item_num) float.

        Raises:
            InputError: a ``time_seq`` of another shape.
        """
        if self._xd_is_plain:
            return super().predict(item_seq, time_seq, item_feature, *args)
        domains, times = self._xd_request(item_seq, time_seq)
        valid = item_seq != 0
        hidden = self._xd_encode(item_seq, valid, domains, times)
        # Of an empty history REC encodes the padding item, to which no attention is paid.
        last = self._xd_inputs(item_seq[:, -1], item_seq.shape[1] - 1)
        ends = valid.sum(1).cumsum(0) - 1
        last[valid[:, -1]] = hidden[ends[valid[:, -1]]].to(last.dtype)
        return normalize(last, dim=-1) @ item_feature.t()

    def _xd_encode(self, items: Tensor, valid: Tensor, domains: Tensor, times: Tensor) -> Tensor:
        """Compute the hidden states of the valid tokens.

        Args:
            items: (B, N) int64.
            valid: (B, N) bool, a run of columns up to the last one.
            domains: (B, N + 1) int64, that of the event after the last included.
            times: (B, N + 1) int64, likewise.

        Returns:
            (L, K) float.
        """
        batch = self._xd_unpadded(valid, domains, times)
        x = self._xd_inputs(batch.gather(items), batch.present % items.shape[1])
        signal = self._xd_signal(batch)
        return self._xd_through_layers(x if signal is None else x + signal, batch)

    def _xd_through_layers(self, x: Tensor, batch: UnpaddedBatch) -> Tensor:
        """Encode the valid tokens: (L, K) float -> (L, K)."""
        return self._hstu(x, batch.events)

    def _xd_inputs(self, items: Tensor, columns: Tensor | int) -> Tensor:
        """Add up item and position; REC counts positions from the left end of the padding."""
        columns = torch.as_tensor(columns, device=items.device)
        return self._xd_vectors(items) + self.position_embedding(columns)

    def _xd_vectors(self, items: Tensor) -> Tensor:
        return self.item_id_proj_tower(self.item_embedding(items))

    def _xd_negatives(
        self, items: Tensor, drawn: Tensor, targets: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Draw negatives of the targets, and tell which pairs do not count.

        With ``num_negatives`` every target has its own (L, R), else the batch (that of all
        processes) shares REC's one draw a place. Domain-scoped, a place draws from the domain of
        the batch's item there, so that a domain has as many draws as items, and a target is
        compared with those of its own domain.
        """
        catalog = self._xd_catalog if self._xd_settings.scopes_negatives else None
        if self.num_negatives:
            if catalog is not None:
                domains = self._xd_domains_of(targets)
                return draw_within(domains, catalog, self.num_negatives), None
            shape = (targets.numel(), self.num_negatives)
            return torch.randint(1, self.item_num, shape, device=items.device), None
        if catalog is None:
            return all_gather(drawn).flatten(), None
        draws = own_generator(dist.get_rank(), items.device)
        drawn = draw_within(self._xd_domains_of(items), catalog, 1, draws).squeeze(-1)
        shared = all_gather(drawn).flatten()
        other = self._xd_domains_of(targets).unsqueeze(1) != self._xd_domains_of(shared)
        return shared, other
