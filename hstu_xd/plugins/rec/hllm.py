"""HLLM with the cross-domain parts around its user LLM: the same parameters, the same calls."""

import logging
from typing import Any

import torch
from REC.model.basemodel import all_gather
from REC.model.HLLM.hllm import HLLM
from torch import Tensor, nn
from torch.nn.functional import layer_norm, pad

from hstu_xd.errors import InputError
from hstu_xd.model.ddsr import DynamicDomainState
from hstu_xd.model.settings import EncoderSettings
from hstu_xd.model.views import EncoderRows, Events
from hstu_xd.plugins.bridge import UnpaddedBatch
from hstu_xd.plugins.rec.cross_domain_mixin import CrossDomainMixin, llm_sizes
from hstu_xd.plugins.rec.settings import HLLM_MODEL

_logger = logging.getLogger(__name__)

# LLMs of REC whose layers hand a mask of all pairs, (B, 1, N, N), to their attention.
_MASKED_LLMS = ("llama", "mistral")


class DomainStateSublayer(nn.Module):
    """DDSR behind an encoder: ``Wo DDSR(LN(x))``, which is to be added to ``x``.

    It starts at zero, as DDSR's values do.

    Args:
        settings: sizes of the encoder, and those of DDSR.

    Source: arXiv 2508.20945, dynamic domain state representation; a sublayer behind a transformer
        in place of a gate's term inside HSTU is this project's.
    """

    def __init__(self, settings: EncoderSettings) -> None:
        super().__init__()
        s = self._settings = settings
        self._states = DynamicDomainState.from_settings(s)
        self._output = nn.Linear(s.num_heads * s.dv, s.embedding_dim, bias=False)
        nn.init.xavier_uniform_(self._output.weight)

    def forward(self, x: Tensor, events: Events) -> Tensor:
        """Read the domains' latest hidden states for every token: (L, K) float -> (L, K) float."""
        normed = layer_norm(x, x.shape[-1:])
        reads = EncoderRows(self._settings, events).state_reads
        answer = self._states(normed, normed, reads, events.target_domains)
        return self._output(answer)


class HLLM_XD(HLLM, CrossDomainMixin):
    """REC's HLLM whose user LLM may attend inside domains, know the next one and read their states.

    REC's own code runs throughout. Before the user LLM its input is told of the next domain (TAPE,
    target domain), in the layers that are not named to keep full attention the mask hides other
    domains, and behind it a sublayer adds what the domain states say (DDSR). All but the mask start
    at zero, so that a trained HLLM continues unchanged.

    Hooks on the user LLM read the batch of the latest call; under gradient checkpointing its
    backward pass has to come before the next call, as it does in REC's trainer.

    Args:
        config: REC's configuration.
        args: what REC's HLLM takes behind it, HLLM's ``dataload`` or PerSRec's numbers.

    Raises:
        InputError: a setting out of range for the user LLM, or a mask on one that takes none.
    """

    _xd_model = HLLM_MODEL

    def __init__(self, config: Any, *args: Any) -> None:
        super().__init__(config, *args)
        self._xd_configure()
        self._ddsr: nn.Module | None = None
        self._xd_batch: UnpaddedBatch
        self._xd_domains: Tensor
        self._xd_target_domains: Tensor
        self._xd_negative_ids: Tensor
        if not self._xd_is_plain:
            self._xd_add_parts(llm_sizes(self.user_llm.config.to_dict(), config))
            self._xd_extend_user_llm()
        self._xd_warm_start()

    def _xd_extend_user_llm(self) -> None:
        settings = self._xd_encoder_settings
        if settings.ddsr:
            self._ddsr = DomainStateSublayer(settings)
            self.user_llm.register_forward_hook(self._xd_add_states)
        if settings.tape or settings.target_domain_embedding:
            self.user_llm.register_forward_pre_hook(self._xd_add_signal, with_kwargs=True)
        if settings.domain_mask:
            self._xd_mask_layers()

    def _xd_mask_layers(self) -> None:
        kind = self.user_llm.config.model_type
        if kind not in _MASKED_LLMS:
            raise InputError(
                f"xd_domain_mask: the user LLM is a {kind}, whose attention takes no mask here; "
                f"known: {', '.join(_MASKED_LLMS)}"
            )
        full = self._xd_encoder_settings.full_attention_layers
        masked = [i for i in range(len(self.user_llm.model.layers)) if i not in full]
        if self.use_ft_flash_attn:
            _logger.warning(
                "flash-attn takes no mask: layers %s of the user LLM go without", masked
            )
        for number in masked:
            attention = self.user_llm.model.layers[number].self_attn
            attention.use_ft_flash_attn = False
            attention.register_forward_pre_hook(self._xd_hide_domains, with_kwargs=True)

    def forward(self, interaction: Any, mode: str = "train") -> Any:
        """Compute the loss of a batch, or what REC asks for by ``mode``.

        Args:
            interaction: for "train" a dict of REC's: among others ``pos_item_ids`` (B, N + 1)
                int64, ``neg_item_ids`` (B, R) int64 and ``attention_mask`` (B, N) int64, which of
                the first N items predict their next one; and ``xd_times`` (B, N + 1) int64 where
                the settings read time.
            mode: "train", "predict" or "compute_item".
        """
        if mode == "train" and not self._xd_is_plain:
            items = interaction["pos_item_ids"]
            self._xd_negative_ids = interaction["neg_item_ids"]
            self._xd_take(
                interaction["attention_mask"].bool(),
                self._xd_domains_of(items),
                interaction["xd_times"]
                if self._xd_settings.reads_time
                else torch.zeros_like(items),
            )
        return super().forward(interaction, mode)

    @torch.no_grad()
    def predict(
        self, item_seq: Tensor, time_seq: Tensor, item_feature: Tensor, *args: Any
    ) -> Tensor:
        """Score all items.

        Args:
            item_seq: (B, N) int64, oldest first, zeros at the left.
            time_seq: as REC's with everything off; else (B, N + 2) int64 of
                :func:`hstu_xd.plugins.rec.rec_metrics.with_request`.
            item_feature: (item_num, K) float.
            args: what else REC passes.

        Returns:
            (B, item_num) float.

        Raises:
            InputError: a ``time_seq`` of another shape.
        """
        if not self._xd_is_plain:
            self._xd_take(item_seq != 0, *self._xd_request(item_seq, time_seq))
        return super().predict(item_seq, time_seq, item_feature, *args)

    def nce_loss(
        self, cur_embs: Tensor, target_pos: Tensor, target_neg: Tensor, user_attention_mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Compute REC's logits and labels; domain-scoped, other domains' negatives do not count.

        Args:
            cur_embs: (B, N, K) float, hidden states of the user LLM.
            target_pos: (B, N, K) float, next items.
            target_neg: (B, R, K) float; all targets share them, and those of all processes.
            user_attention_mask: (B, N), which positions count.

        Returns:
            (L, 1 + M) float and (L,) int64.
        """
        logits, labels = super().nce_loss(cur_embs, target_pos, target_neg, user_attention_mask)
        if self._xd_settings.scopes_negatives:
            shared = self._xd_domains_of(all_gather(self._xd_negative_ids).flatten())
            asked = self._xd_target_domains[user_attention_mask.bool()]
            other = asked.unsqueeze(1) != shared
            logits = logits.masked_fill(pad(other, (1, 0)), torch.finfo(logits.dtype).min)
        return logits, labels

    def _xd_take(self, valid: Tensor, domains: Tensor, times: Tensor) -> None:
        """Keep what the hooks of the next call read; see :meth:`_xd_unpadded`."""
        self._xd_batch = self._xd_unpadded(valid, domains, times)
        self._xd_domains, self._xd_target_domains = domains[:, :-1], domains[:, 1:]

    def _xd_add_signal(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        signal = self._xd_signal(self._xd_batch)
        assert signal is not None
        embeds = kwargs["inputs_embeds"]
        embeds = embeds + self._xd_batch.spread(signal).to(embeds.dtype)
        return args, kwargs | {"inputs_embeds": embeds}

    def _xd_hide_domains(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        domains, mask = self._xd_domains, kwargs["attention_mask"]
        other = (domains.unsqueeze(2) != domains.unsqueeze(1)).unsqueeze(1)
        mask = mask.masked_fill(other, torch.finfo(mask.dtype).min)
        return args, kwargs | {"attention_mask": mask}

    def _xd_add_states(self, _: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        assert self._ddsr is not None
        *below, last = output.hidden_states
        said = self._ddsr(self._xd_batch.gather(last), self._xd_batch.events)
        output.hidden_states = (*below, last + self._xd_batch.spread(said).to(last.dtype))
        return output
