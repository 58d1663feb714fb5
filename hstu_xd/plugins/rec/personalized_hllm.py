"""PerSRec's PersonalizedHLLM with the cross-domain parts around its user LLM."""

import dataclasses
import math
from typing import Any

import torch
from REC.model.HLLM.hllm import PersonalizedHLLM
from torch import Tensor, nn
from torch.nn.functional import pad

from hstu_xd.errors import InputError
from hstu_xd.plugins.rec.hllm import HLLM_XD
from hstu_xd.plugins.rec.settings import PERSONALIZED_HLLM_MODEL
from hstu_xd.plugins.rec.user_tokens import TokenPlaces, UserTokenMixin


class PersonalizedHLLM_XD(HLLM_XD, UserTokenMixin, PersonalizedHLLM):
    """PerSRec's PersonalizedHLLM with HLLM_XD's parts around its user LLM.

    PerSRec's own code runs throughout, as HLLM's does under HLLM_XD. Under the domain mask the
    user LLM's input gets a copy of every token for each domain, at the token's own position, see
    :mod:`hstu_xd.plugins.rec.user_tokens`, and its output loses them again. Layers that keep full
    attention let events read the D copies of a token as one: each with a D-th of a token's weight.

    Where anything is on, the loss is over events alone: PerSRec teaches the event before the tokens
    to predict a token's input, never the first one behind them, and counts some negatives twice.

    Args:
        config: PerSRec's configuration.
        args: its numbers of items and users.

    Raises:
        InputError: a key of PerSRec's that is missing or out of range; or with anything on, events
            that are dropped at random, or a user LLM that reads PerSRec's mask in another way.
    """

    _xd_model = PERSONALIZED_HLLM_MODEL

    def __init__(self, config: Any, *args: Any) -> None:
        places = self._xd_places = TokenPlaces.read(config, around_llm=True)
        super().__init__(config, *args)
        if not self._xd_is_plain:
            _check_lengths(places, config)

    def _xd_extend_user_llm(self) -> None:
        kind = self.user_llm.config.model_type
        if kind != "llama":
            raise InputError(
                f"user_pretrain_dir: the user LLM is a {kind}; PerSRec's mask of history and "
                "tokens is made for a Llama, other LLMs of REC read it as hiding everything or "
                f"not at all, so {self._xd_model} takes no other"
            )
        if self.drop_out:
            raise InputError(
                f"item_dropout: {self.drop_out}; {self._xd_model} with a switch on drops no "
                "events, for domain states would keep them; leave it out"
            )
        self._xd_add_slots()
        # What is added by hooks of HLLM_XD is added between these two.
        self.user_llm.register_forward_pre_hook(self._xd_insert_copies, with_kwargs=True)
        super()._xd_extend_user_llm()
        self.user_llm.register_forward_hook(self._xd_drop_copies)

    def _xd_mask_layers(self) -> None:
        super()._xd_mask_layers()
        for number in self._xd_encoder_settings.full_attention_layers:
            attention = self.user_llm.model.layers[number].self_attn
            attention.register_forward_pre_hook(self._xd_weigh_copies, with_kwargs=True)

    def nce_loss(
        self, cur_embs: Tensor, target_pos: Tensor, target_neg: Tensor, user_attention_mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Compute REC's logits and labels, over events alone where anything is on.

        Args:
            cur_embs: (B, N + T, K) float, hidden states of the user LLM.
            target_pos: (B, N + T, K) float, inputs of the columns after them.
            target_neg: (B, R + T', K) float, T' at most T of which stand twice.
            user_attention_mask: (B, N + T), which positions count.

        Returns:
            (L, 1 + M) float and (L,) int64.
        """
        if self._xd_is_plain:
            return super().nce_loss(cur_embs, target_pos, target_neg, user_attention_mask)
        columns = self._xd_slots.event_columns
        following = pad(columns[1:], (0, 1), value=cur_embs.shape[1]) - 1
        drawn = self._xd_negative_ids.shape[1]
        head = min(self.pretrain_item_num, drawn)
        tail = target_neg[:, target_neg.shape[1] - (drawn - head) :]
        return super().nce_loss(
            cur_embs[:, columns],
            target_pos[:, following],
            torch.cat([target_neg[:, :head], tail], dim=1),
            user_attention_mask[:, columns],
        )

    def compress_pretrain(self, *given: Any, **named: Any) -> Any:
        """Run PerSRec's method, which its trainer does not call; refused with anything on."""
        self._xd_refuse_cache("compress_pretrain")
        return super().compress_pretrain(*given, **named)

    def predict1(self, *given: Any, **named: Any) -> Any:
        """Run PerSRec's method, which its trainer does not call; refused with anything on."""
        self._xd_refuse_cache("predict1")
        return super().predict1(*given, **named)

    def _xd_take(self, valid: Tensor, domains: Tensor, times: Tensor) -> None:
        super()._xd_take(valid, domains, times)
        slots = self._xd_slots
        with_tokens = slots.insert(valid, 0)
        self._xd_batch = dataclasses.replace(
            self._xd_batch,
            valid=with_tokens,
            present=with_tokens.flatten().nonzero().squeeze(1),
        )
        self._xd_domains = slots.insert(self._xd_domains, slots.runs)

    def _xd_insert_copies(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        columns = self._xd_slots.columns
        mask = kwargs["attention_mask"]
        return args, kwargs | {
            "inputs_embeds": kwargs["inputs_embeds"][:, columns],
            "attention_mask": mask[:, :, columns][:, :, :, columns],
            "position_ids": columns.unsqueeze(0),
        }

    def _xd_drop_copies(self, _: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        *below, last = output.hidden_states
        output.hidden_states = (*below, last[:, self._xd_slots.first])
        return output

    def _xd_weigh_copies(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Let events read a token's copies as one, and copies those of their own domain alone."""
        slots, mask = self._xd_slots, kwargs["attention_mask"]
        query, key = slots.is_token.unsqueeze(1), slots.is_token
        other = query & key & (slots.runs.unsqueeze(1) != slots.runs)
        mask = mask.masked_fill(other, torch.finfo(mask.dtype).min)
        weighed = mask - math.log(slots.copies)
        return args, kwargs | {"attention_mask": torch.where(~query & key, weighed, mask)}


def _check_lengths(places: TokenPlaces, config: Any) -> None:
    """Refuse evaluations that would leave events out between the old and the recent ones."""
    pretrained = places.before[0]
    recent, evaluated = config["recent_item_num"], config["MAX_ITEM_LIST_LENGTH_TEST"]
    if recent is not None and pretrained + recent != places.length:
        raise InputError(
            f"recent_item_num: {recent}; with pretrain_item_num ({pretrained}) it must make "
            f"MAX_ITEM_LIST_LENGTH ({places.length}); leave it out"
        )
    if evaluated and evaluated != places.length:
        raise InputError(
            f"MAX_ITEM_LIST_LENGTH_TEST: {evaluated}; with a switch on it must be "
            f"MAX_ITEM_LIST_LENGTH ({places.length}); leave it out"
        )
