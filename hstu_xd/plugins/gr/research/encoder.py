"""Upstream's HSTU with the cross-domain parts: same parameter names, same interface."""

from typing import Any

import torch
from generative_recommenders.research.modeling.sequential.hstu import HSTU
from torch import Tensor, nn
from torch.nn.functional import pad

from hstu_xd.catalog import DomainCatalog
from hstu_xd.declaration import tags
from hstu_xd.errors import HstuXdError
from hstu_xd.model.encoder import CrossDomainEncoder
from hstu_xd.model.inputs import next_domain_modules, next_domain_signal
from hstu_xd.model.settings import EncoderSettings
from hstu_xd.plugins.bridge import UnpaddedBatch
from hstu_xd.plugins.gr.research.domain_batches import NEXT_DOMAINS, required_payload

_TIMESTAMPS = "timestamps"
# Private to upstream's stack of layers.
_LAYERS = "_attention_layers"


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
        self._is_plain = settings.is_plain
        self._tape: nn.Module | None = None
        self._target_domain_emb: nn.Embedding | None = None
        if self._is_plain:
            return
        stack = CrossDomainEncoder(settings)
        stack.take_parameters(getattr(self._hstu, _LAYERS))
        self._hstu = stack
        self._tape, self._target_domain_emb = next_domain_modules(settings)

    def debug_str(self) -> str:
        """Upstream's description with this model's name and switches; a part of its paths."""
        name = super().debug_str().replace("HSTU", "HSTU_XD", 1)
        return "-".join([name, *tags(self.settings)])

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
        batch = self._unpadded(past_lengths, past_ids, past_payloads)
        _, padded, _ = self._input_features_preproc(
            past_lengths=past_lengths,
            past_ids=past_ids,
            past_embeddings=self._with_signals(past_embeddings, batch),
            past_payloads=past_payloads,
        )
        hidden = self._hstu(batch.gather(padded), batch.events)
        return self._output_postproc(batch.spread(hidden)), []

    def _unpadded(
        self, past_lengths: Tensor, past_ids: Tensor, past_payloads: dict[str, Tensor]
    ) -> UnpaddedBatch:
        columns = torch.arange(past_ids.shape[1], device=past_ids.device)
        domains = self.catalog.domain_of(past_ids)
        next_domains = domains
        if self.settings.reads_target_domain:
            next_domains = required_payload(past_payloads, NEXT_DOMAINS, "a switch of xd_encoder")
        if self.settings.reads_time:
            times = required_payload(past_payloads, _TIMESTAMPS, "the relative bias or DDSR")
        else:
            times = torch.zeros_like(past_ids)
        return UnpaddedBatch.build(
            columns < past_lengths.unsqueeze(1),
            domains=domains,
            next_domains=next_domains,
            times=times,
            next_times=pad(times[:, 1:], (0, 1)),
        )

    def _with_signals(self, embeddings: Tensor, batch: UnpaddedBatch) -> Tensor:
        """Add TAPE and the target domain so that upstream's preprocessor sees sqrt(K) e + them."""
        events = batch.events
        signal = next_domain_signal(
            self._tape, self._target_domain_emb, events.domains, events.target_domains
        )
        if signal is None:
            return embeddings
        return embeddings + batch.spread(signal) * embeddings.shape[-1] ** -0.5
