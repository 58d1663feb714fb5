"""HSTU of HLLM and PerSRec with the cross-domain parts: the same parameters, the same calls."""

from typing import Any

import torch
from REC.model.basemodel import all_gather
from REC.model.IDNet.hstu import HSTU
from torch import Tensor, nn
from torch.nn.functional import normalize, pad

from hstu_xd.catalog import DomainCatalog
from hstu_xd.errors import InputError
from hstu_xd.modules.encoder import CrossDomainEncoder
from hstu_xd.modules.plan import EncoderPlan
from hstu_xd.modules.tape import TransitionAwarePositionalEmbedding
from hstu_xd.plugins.rec.loss import draw_within, sampled_softmax
from hstu_xd.plugins.rec.session import SESSION
from hstu_xd.plugins.rec.settings import RecSettings


class HSTU_XD(HSTU):
    """REC's HSTU that may attend inside domains, know the next domain and read domain states.

    With everything off it runs REC's own code. Otherwise this package's layers hold REC's
    parameters and see the valid tokens only, end to end: REC fills the left of short histories
    with random items when it trains. What attention is divided by stays the padded length.

    Args:
        config: REC's configuration.
        args: what REC's HSTU takes behind it, HLLM's ``dataload`` or PerSRec's numbers.
    """

    def __init__(self, config: Any, *args: Any) -> None:
        super().__init__(config, *args)
        self._settings = SESSION.settings or RecSettings("HSTU_XD")
        self._is_plain = self._settings.is_plain
        self._tape: nn.Module | None = None
        self._target_domain_emb: nn.Embedding | None = None
        if self._is_plain:
            return
        known = SESSION.catalog
        domains = torch.zeros(self.item_num) if known is None else known.item_domains
        names = ["all"] if known is None else known.domain_names
        self._catalog = DomainCatalog(domains, names)
        width = self._hstu_embedding_dim
        self._encoder_settings = self._settings.encoder_settings(
            num_domains=self._catalog.num_domains,
            norm_length=self._max_sequence_length,
            embedding_dim=width,
            num_blocks=self._num_blocks,
            num_heads=self._num_heads,
            dqk=self._dqk,
            dv=self._dv,
            linear_dropout_rate=self._linear_dropout_rate,
            linear_activation=self._linear_activation,
        )
        self._check_length(config["MAX_ITEM_LIST_LENGTH_TEST"])
        self._take_over_layers()
        if self._encoder_settings.tape:
            self._tape = TransitionAwarePositionalEmbedding(self._catalog.num_domains, width)
        if self._encoder_settings.target_domain_embedding:
            self._target_domain_emb = nn.Embedding(self._catalog.num_domains, width)
            nn.init.zeros_(self._target_domain_emb.weight)

    def _check_length(self, evaluated: int | None) -> None:
        if evaluated and evaluated != self._max_sequence_length:
            raise InputError(
                f"MAX_ITEM_LIST_LENGTH_TEST: {evaluated}; HSTU_XD with a switch on divides "
                f"attention by MAX_ITEM_LIST_LENGTH ({self._max_sequence_length}) throughout: give "
                "both the same value, or leave the first out"
            )

    def _take_over_layers(self) -> None:
        """Put this package's layers in the place of REC's, with REC's parameters."""
        layers = self._hstu._attention_layers
        stack = CrossDomainEncoder(self._encoder_settings)
        if not self._settings.relative_bias:
            for layer in layers:  # built by REC, and applied neither there nor here
                layer._rel_attn_bias = None
        stack.take_parameters(layers)
        self._hstu = stack

    @property
    def reads_time(self) -> bool:
        """Whether training samples must bring the events' times behind REC's entries."""
        return not self._is_plain and self._encoder_settings.reads_time

    def forward(self, interaction: tuple[Tensor, ...]) -> dict[str, Tensor]:
        """Loss of a batch.

        Args:
            interaction: items (B, N + 1) int64, negatives (B, N + 1) int64, which of the first N
                items predict their next one (B, N) int64, what else REC puts there, and with
                :attr:`reads_time` the times (B, N + 1) int64 last.
        """
        if self._is_plain:
            return super().forward(interaction)
        items, drawn, valid = interaction[0], interaction[1], interaction[2].bool()
        times = interaction[-1] if self.reads_time else torch.zeros_like(items)
        domains = self._domains_of(items)
        hidden = self._encode(items[:, :-1], valid, domains, times)
        targets = items[:, 1:][valid]
        negatives, excluded = self._negatives(items, drawn, targets)
        with torch.no_grad():
            self.logit_scale.clamp_(0, torch.tensor(100.0).log().item())
        return sampled_softmax(
            hidden,
            self._vectors(targets),
            self._vectors(negatives),
            scale=self.logit_scale.exp(),
            threshold=self.nce_thres,
            excluded=excluded,
        )

    @torch.no_grad()
    def predict(
        self, item_seq: Tensor, time_seq: Tensor, item_feature: Tensor, *args: Any
    ) -> Tensor:
        """Scores of all items.

        Args:
            item_seq: (B, N) int64, oldest first, zeros at the left.
            time_seq: as REC's with everything off; else (B, N + 2) int64 of
                :func:`hstu_xd.plugins.rec.evaluation.with_request`.
            item_feature: (item_num, K) float, unit vectors.
            args: what else REC passes.

        Returns:
            (B, item_num) float.

        Raises:
            InputError: a ``time_seq`` of another shape.
        """
        if self._is_plain:
            return super().predict(item_seq, time_seq, item_feature, *args)
        users, columns = item_seq.shape
        if time_seq.shape != (users, columns + 2):
            raise InputError(
                f"time_seq has shape {tuple(time_seq.shape)}; HSTU_XD needs ({users}, "
                f"{columns + 2}): the history's times, the request's time and its domain, see "
                "hstu_xd.plugins.rec.evaluation.with_request"
            )
        domains = torch.cat([self._domains_of(item_seq), time_seq[:, -1:]], dim=1)
        valid = item_seq != 0
        hidden = self._encode(item_seq, valid, domains, time_seq[:, :-1])
        # Of an empty history REC encodes the padding item, to which no attention is paid.
        last = self._inputs(item_seq[:, -1], columns - 1)
        ends = valid.sum(1).cumsum(0) - 1
        last[valid[:, -1]] = hidden[ends[valid[:, -1]]].to(last.dtype)
        return normalize(last, dim=-1) @ item_feature.t()

    def _encode(self, items: Tensor, valid: Tensor, domains: Tensor, times: Tensor) -> Tensor:
        """Hidden states of the valid tokens.

        Args:
            items: (B, N) int64.
            valid: (B, N) bool, a run of columns up to the last one.
            domains: (B, N + 1) int64, that of the event after the last included.
            times: (B, N + 1) int64, likewise.

        Returns:
            (L, K) float.
        """
        present = valid.flatten().nonzero().squeeze(1)
        plan = EncoderPlan(
            domains=domains[:, :-1].flatten()[present],
            target_domains=domains[:, 1:].flatten()[present],
            timestamps=times[:, :-1].flatten()[present],
            next_timestamps=times[:, 1:].flatten()[present],
            offsets=pad(valid.sum(1).cumsum(0), (1, 0)),
            num_domains=self._catalog.num_domains,
            states_per_domain=self._encoder_settings.states_per_domain,
        )
        x = self._inputs(items.flatten()[present], present % items.shape[1])
        if self._tape is not None:
            x = x + self._tape(plan.domains, plan.target_domains)
        if self._target_domain_emb is not None:
            x = x + self._target_domain_emb(plan.target_domains)
        return self._hstu(x, plan)

    def _inputs(self, items: Tensor, columns: Tensor | int) -> Tensor:
        """Item and position: REC counts positions in the padded history, from its left end."""
        columns = torch.as_tensor(columns, device=items.device)
        return self._vectors(items) + self.position_embedding(columns)

    def _vectors(self, items: Tensor) -> Tensor:
        return self.item_id_proj_tower(self.item_embedding(items))

    def _domains_of(self, items: Tensor) -> Tensor:
        """Domain of each item, 0 where it has none: random padding may lack one."""
        return self._catalog.item_domains[items].clamp(min=0)

    def _negatives(
        self, items: Tensor, drawn: Tensor, targets: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Negatives of the targets, and which pairs do not count.

        With ``num_negatives`` every target has its own (L, R), else the batch (that of all
        processes) shares REC's one draw a place. Domain-scoped, a place draws from the domain of
        the batch's item there, so that a domain has as many draws as items, and a target is
        compared with those of its own domain.
        """
        scoped = self._settings.scopes_negatives
        if self.num_negatives:
            if scoped:
                domains = self._domains_of(targets)
                return draw_within(domains, self._catalog, self.num_negatives), None
            shape = (targets.numel(), self.num_negatives)
            return torch.randint(1, self.item_num, shape, device=items.device), None
        if not scoped:
            return all_gather(drawn).flatten(), None
        drawn = draw_within(self._domains_of(items), self._catalog, 1).squeeze(-1)
        shared = all_gather(drawn).flatten()
        other = self._domains_of(targets).unsqueeze(1) != self._domains_of(shared)
        return shared, other
