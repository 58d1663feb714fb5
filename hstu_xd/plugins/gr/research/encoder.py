"""Upstream's HSTU with the cross-domain parts: same parameter names, same interface."""

from typing import Any

import torch
from generative_recommenders.research.modeling.sequential.hstu import HSTU
from torch import Tensor, nn
from torch.nn.functional import pad

from hstu_xd.catalog import DomainCatalog
from hstu_xd.errors import HstuXdError
from hstu_xd.model.encoder import CrossDomainEncoder
from hstu_xd.model.inputs import next_domain_modules, next_domain_signal
from hstu_xd.model.settings import EncoderSettings
from hstu_xd.model.views import Events
from hstu_xd.plugins.gr.research.features import NEXT_DOMAINS, required_payload

_TIMESTAMPS = "timestamps"


class HSTU_XD(HSTU):
    """HSTU that may attend inside domains, know the next domain and read domain states.

    With every switch off, SiLU and ``impl="auto"`` it runs upstream's own layers, to the last bit.
    With a switch on, softmax or an implementation named, this package's layers hold upstream's
    parameters.

    Args:
        catalog: item -> domain table.
        settings: sizes and switches; ``norm_length`` is ``max_sequence_len + max_output_len``.
        max_sequence_len: longest history.
        max_output_len: room for outputs behind it.
        embedding_module, similarity_module, input_features_preproc_module,
            output_postproc_module: upstream's modules, as for its HSTU.
        attn_dropout_rate: stands in ``debug_str`` only, as upstream computes without it.
        verbose: print how parameters are initialised.
    """

    def __init__(
        self,
        *,
        catalog: DomainCatalog,
        settings: EncoderSettings,
        max_sequence_len: int,
        max_output_len: int,
        embedding_module: Any,
        similarity_module: Any,
        input_features_preproc_module: Any,
        output_postproc_module: Any,
        attn_dropout_rate: float = 0.0,
        verbose: bool = True,
    ) -> None:
        super().__init__(
            max_sequence_len=max_sequence_len,
            max_output_len=max_output_len,
            embedding_dim=settings.embedding_dim,
            num_blocks=settings.num_blocks,
            num_heads=settings.num_heads,
            linear_dim=settings.dv,
            attention_dim=settings.dqk,
            normalization="rel_bias",
            linear_config="uvqk",
            linear_activation=settings.linear_activation,
            linear_dropout_rate=settings.linear_dropout_rate,
            attn_dropout_rate=attn_dropout_rate,
            embedding_module=embedding_module,
            similarity_module=similarity_module,
            input_features_preproc_module=input_features_preproc_module,
            output_postproc_module=output_postproc_module,
            enable_relative_attention_bias=settings.enable_relative_attention_bias,
            concat_ua=settings.concat_ua,
            verbose=verbose,
        )
        self.settings = settings
        self.catalog = catalog
        self._is_plain = (
            not settings.is_cross_domain
            and settings.normalization == "silu"
            and settings.impl == "auto"
        )
        self._tape: nn.Module | None = None
        self._target_domain_emb: nn.Embedding | None = None
        if self._is_plain:
            return
        stack = CrossDomainEncoder(settings)
        stack.take_parameters(self._hstu._attention_layers)
        self._hstu = stack
        self._tape, self._target_domain_emb = next_domain_modules(settings)

    def debug_str(self) -> str:
        """Upstream's description with this model's name and switches; a part of its paths."""
        s = self.settings
        parts = [super().debug_str().replace("HSTU", "HSTU_XD", 1)]
        parts += [s.normalization] * (s.normalization != "silu")
        parts += ["mask"] * s.domain_mask
        parts += [f"view{s.target_view_heads}"] * bool(s.target_view_heads)
        parts += ["tape"] * s.tape
        parts += [f"ddsr{s.states_per_domain}"] * s.ddsr
        parts += ["target"] * s.target_domain_embedding
        if s.has_segments:
            size = s.segment_length if s.segment_by == "count" else s.segment_gap
            parts += [f"{s.segment_by}{size}", f"tokens{s.history_tokens}"]
            parts += [f"lookback{s.segment_lookback}"] * bool(s.segment_lookback)
        return "-".join(parts)

    def generate_user_embeddings(
        self,
        past_lengths: Tensor,
        past_ids: Tensor,
        past_embeddings: Tensor,
        past_payloads: dict[str, Tensor],
        delta_x_offsets: tuple[Tensor, Tensor] | None = None,
        cache: list[Any] | None = None,
        return_cache_states: bool = False,
    ) -> tuple[Tensor, list[Any]]:
        """Encode every position.

        Args:
            past_lengths: (B,) int64, at least 1.
            past_ids: (B, N) int64, oldest first.
            past_embeddings: (B, N, K) float.
            past_payloads: "timestamps" (B, N) int64 with the request's time behind the last event,
                and "xd_next_domains" (B, N) int64 where a switch reads the next domain.
            delta_x_offsets, cache, return_cache_states: upstream's incremental mode; for HSTU with
                every switch off only.

        Returns:
            (B, N, K) float and upstream's cache states.

        Raises:
            InputError: a payload is missing.
            HstuXdError: incremental arguments with a switch on.
        """
        if self._is_plain:
            return super().generate_user_embeddings(
                past_lengths,
                past_ids,
                past_embeddings,
                past_payloads,
                delta_x_offsets,
                cache,
                return_cache_states,
            )
        if delta_x_offsets is not None or cache is not None or return_cache_states:
            raise HstuXdError(
                "delta_x_offsets, cache and return_cache_states are upstream's incremental mode, "
                "which HSTU_XD has only with every switch off; encode whole histories instead"
            )
        users, columns = past_ids.shape
        inside = torch.arange(columns, device=past_ids.device) < past_lengths.unsqueeze(1)
        tokens = torch.nonzero(inside.flatten()).squeeze(1)
        events = self._events(past_lengths, past_ids, past_payloads, tokens)
        _, padded, _ = self._input_features_preproc(
            past_lengths=past_lengths,
            past_ids=past_ids,
            past_embeddings=self._with_signals(past_embeddings, events, tokens),
            past_payloads=past_payloads,
        )
        hidden = self._hstu(padded.flatten(0, 1)[tokens], events)
        encoded = hidden.new_zeros(users * columns, hidden.shape[1]).index_copy(0, tokens, hidden)
        return self._output_postproc(encoded.view(users, columns, -1)), []

    def _events(
        self,
        past_lengths: Tensor,
        past_ids: Tensor,
        past_payloads: dict[str, Tensor],
        tokens: Tensor,
    ) -> Events:
        domains = self.catalog.domain_of(past_ids).flatten()[tokens]
        target_domains = domains
        if self.settings.reads_target_domain:
            payload = required_payload(past_payloads, NEXT_DOMAINS, "a switch of xd_encoder")
            target_domains = payload.flatten()[tokens]
        if self.settings.reads_time:
            times = required_payload(past_payloads, _TIMESTAMPS, "the relative bias or DDSR")
        else:
            times = torch.zeros_like(past_ids)
        return Events(
            domains=domains,
            target_domains=target_domains,
            timestamps=times.flatten()[tokens],
            next_timestamps=pad(times[:, 1:], (0, 1)).flatten()[tokens],
            offsets=pad(past_lengths.cumsum(0), (1, 0)),
        )

    def _with_signals(self, embeddings: Tensor, events: Events, tokens: Tensor) -> Tensor:
        """Add TAPE and the target domain so that upstream's preprocessor sees sqrt(K) e + them."""
        signal = next_domain_signal(
            self._tape, self._target_domain_emb, events.domains, events.target_domains
        )
        if signal is None:
            return embeddings
        users, columns, width = embeddings.shape
        spread = signal.new_zeros(users * columns, width).index_copy(0, tokens, signal)
        return embeddings + spread.view_as(embeddings) * width**-0.5
