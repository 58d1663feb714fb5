"""Upstream's DlrmHSTU with the cross-domain parts: same parameter names, same interface."""

from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from generative_recommenders.modules.dlrm_hstu import DlrmHSTU
from generative_recommenders.modules.hstu_transducer import HSTUTransducer
from torch import Tensor, nn

from hstu_xd.errors import InputError
from hstu_xd.model.inputs import next_domain_modules, next_domain_signal
from hstu_xd.plugins.dlrm_v3.bucketed_layer import BucketedSTULayer
from hstu_xd.plugins.dlrm_v3.candidate_interest import CandidateInterest
from hstu_xd.plugins.dlrm_v3.domain_groups import DomainGroups, RequestLayout
from hstu_xd.plugins.dlrm_v3.domain_states import (
    DomainStateStack,
    RequestStates,
    UncachedStack,
)
from hstu_xd.plugins.dlrm_v3.positions import PositionsInOrder
from hstu_xd.plugins.dlrm_v3.settings import GOAL, CrossDomain
from hstu_xd.plugins.rebinding import Rebinding, apply

_MODULE = "generative_recommenders.modules.dlrm_hstu"
# Payloads in which the domains travel from the features to the layers.
_HISTORY_DOMAINS = "xd_history_domains"
_TARGET_DOMAINS = "xd_target_domains"
# Private to upstream's layers: what narrows or widens their attention.
_REACHES = ("_max_attn_len", "_contextual_seq_len")


class CrossDomainTransducer(HSTUTransducer):
    """Upstream's transducer that regroups its rows once around the stack of layers.

    TAPE and the target-domain embedding are added to the input of the stack, behind its dropout.
    DDSR stands behind each layer, see :class:`DomainStateStack`.

    Args:
        stu_module: the stack.
        cross_domain: what is on.
        num_context: contextual rows of every user.
        others: upstream's own.

    Raises:
        InputError: layers with a window or contextual rows that see the whole history.
    """

    def __init__(
        self, stu_module: nn.Module, *, cross_domain: CrossDomain, num_context: int, **others: Any
    ) -> None:
        super().__init__(stu_module=stu_module, **others)
        for layer in stu_module.modules():
            for name in _REACHES:
                if getattr(layer, name, 0):
                    raise InputError(
                        f"a layer has {name.removeprefix('_')} = {getattr(layer, name)}, which "
                        "counts rows of the whole history; inside domains it means another thing. "
                        "Leave it 0, or switch xd_encoder.domain_mask off"
                    )
        self._cross_domain = cross_domain
        self._num_context = num_context
        self._groups: DomainGroups | None = None
        self._states: RequestStates | None = None
        self._xd_tape, self._xd_target_domain_emb = next_domain_modules(cross_domain.settings)

    def _preprocess(self, *, seq_payloads: dict[str, Tensor], **others: Any) -> Any:
        found = super()._preprocess(seq_payloads=seq_payloads, **others)
        *sizes, lengths, offsets, times, x, num_targets, payloads = found
        layout = RequestLayout.build(lengths, num_targets, self._num_context)
        domains = torch.zeros_like(layout.users)
        if self._cross_domain.reads_domains:
            told = seq_payloads[_HISTORY_DOMAINS], seq_payloads[_TARGET_DOMAINS]
            domains = layout.row_domains(*told)
        signal = next_domain_signal(
            self._xd_tape, self._xd_target_domain_emb, *layout.transitions(domains)
        )
        if signal is not None:
            x = x + (signal * ~layout.is_context.unsqueeze(1)).to(x.dtype)
        self._plan(layout, domains, times)
        return *sizes, lengths, offsets, times, x, num_targets, payloads

    def _plan(self, layout: RequestLayout, domains: Tensor, times: Tensor) -> None:
        """Find which rows the layers see together, and which states they read."""
        settings = self._cross_domain.settings
        if settings.domain_mask or self._cross_domain.in_buckets:
            self._groups = DomainGroups.build(
                layout,
                domains if settings.domain_mask else torch.zeros_like(domains),
                settings.num_domains,
                # States of all domains are read, so all of them are computed.
                with_unasked=settings.ddsr,
                shortest_first=self._cross_domain.in_buckets,
            )
        if settings.ddsr:
            self._states = RequestStates.build(layout, domains, times, settings, self._groups)

    def _hstu_compute(
        self, *, max_seq_len: int, seq_embeddings: Tensor, num_targets: Tensor, **others: Any
    ) -> Tensor:
        # The whole batch's length, so that scores are divided by what they are without groups.
        norm_length = self._cross_domain.norm_length_for(max_seq_len)
        groups, self._groups = self._groups, None
        states, self._states = self._states, None
        with nullcontext() if states is None else self._stu_module.reading(states):
            if groups is None:
                return super()._hstu_compute(
                    max_seq_len=norm_length,
                    seq_embeddings=seq_embeddings,
                    num_targets=num_targets,
                    **others,
                )
            grouped = super()._hstu_compute(
                max_seq_len=norm_length,
                seq_embeddings=groups.gather(seq_embeddings),
                num_targets=groups.num_targets,
                **others | {"seq_lengths": groups.lengths, "seq_offsets": groups.offsets},
            )
        return groups.spread_targets(grouped)


class CrossDomainDlrmHSTU(DlrmHSTU):
    """DlrmHSTU whose layers attend inside domains.

    The layers are upstream's own, with its kernels and parameter names: a checkpoint of the stock
    model loads. Every candidate is scored by its user's history of the candidate's domain. With
    an interest, what the shown events say of a candidate is added to its embedding.

    Args:
        hstu_configs, embedding_tables, is_inference, is_dense, bf16_training: as upstream's.
        cross_domain: what is on, and where the domains stand.

    Raises:
        InputError: ``is_inference``, which upstream scripts.

    Attributes:
        transducer: class of the part that runs the layers.
    """

    transducer: type[CrossDomainTransducer] = CrossDomainTransducer

    def __init__(
        self,
        hstu_configs: Any,
        embedding_tables: Any,
        is_inference: bool,
        is_dense: bool = False,
        bf16_training: bool = True,
        *,
        cross_domain: CrossDomain,
    ) -> None:
        if is_inference:
            raise InputError(
                "is_inference = True: upstream's scripted inference does not know domains; score "
                "with is_inference = False and eval()"
            )
        transducer = partial(
            self.transducer,
            cross_domain=cross_domain,
            num_context=sum(hstu_configs.contextual_feature_to_max_length.values()),
        )
        stack: Any = UncachedStack
        if cross_domain.settings.ddsr:
            stack = partial(DomainStateStack, settings=cross_domain.settings)
        rebindings = [
            Rebinding(_MODULE, "HSTUTransducer", lambda original: transducer),
            Rebinding(_MODULE, "STUStack", lambda original: stack),
        ]
        if cross_domain.in_order:
            name = "HSTUPositionalEncoder"
            rebindings.append(Rebinding(_MODULE, name, lambda original: PositionsInOrder))
        if cross_domain.in_buckets:
            rebindings.append(Rebinding(_MODULE, "STULayer", lambda original: BucketedSTULayer))
        with apply(rebindings):
            super().__init__(
                hstu_configs=hstu_configs,
                embedding_tables=embedding_tables,
                is_inference=is_inference,
                is_dense=is_dense,
                bf16_training=bf16_training,
            )
        self._cross_domain = cross_domain
        self._xd_interest = None  # made last, so that all else begins as without it
        if cross_domain.interest is not None:
            self._xd_interest = CandidateInterest(
                hstu_configs.hstu_embedding_table_dim,
                cross_domain.interest,
                most_events=hstu_configs.max_seq_len,
                num_goals=cross_domain.num_goals,
            )

    def preprocess(self, uih_features: Any, candidates_features: Any) -> Any:
        """Look embeddings up as upstream does, and read the domains beside them.

        Where there is an interest, what it says of the candidates is in their embeddings.

        Raises:
            InputError: a feature with domains is missing, or holds an id out of range.
        """
        domains = {}
        if self._cross_domain.reads_domains:
            history, candidates = self._cross_domain.domain_features
            domains[_HISTORY_DOMAINS] = self._read_domains(uih_features, history)
            domains[_TARGET_DOMAINS] = self._read_domains(candidates_features, candidates)
        embeddings, payloads, *lengths = super().preprocess(uih_features, candidates_features)
        if self._xd_interest is not None:
            goals = uih_features[GOAL].values() if self._cross_domain.num_goals else None
            embeddings |= self._with_interest(self._xd_interest, embeddings, payloads, goals)
        return embeddings, payloads | domains, *lengths

    def _with_interest(
        self,
        interest: CandidateInterest,
        embeddings: dict[str, Any],
        payloads: dict[str, Tensor],
        goals: Tensor | None,
    ) -> dict[str, Any]:
        """Return the candidates' embeddings with what the shown events say of them, by name."""
        config = self._hstu_configs
        name = dict(config.merge_uih_candidate_feature_mapping)[config.uih_post_id_feature_name]
        history, candidates = embeddings[config.uih_post_id_feature_name], embeddings[name]
        said = interest(
            history.embedding,
            payloads[config.uih_action_time_feature_name],
            history.lengths,
            candidates.embedding,
            payloads[config.candidates_querytime_feature_name],
            candidates.lengths,
            goals,
        )
        return {name: candidates._replace(embedding=candidates.embedding + said)}

    def _read_domains(self, features: Any, name: str) -> Tensor:
        if name not in tuple(features.keys()):
            raise InputError(
                f"xd_dlrm.domain_features: the batch has no feature {name!r} but "
                f"{', '.join(features.keys())}; name those that hold the domains"
            )
        domains = features[name].values()
        num_domains = self._cross_domain.num_domains
        if domains.numel() and (domains.min() < 0 or domains.max() >= num_domains):
            worst = domains.min() if domains.min() < 0 else domains.max()
            raise InputError(
                f"feature {name!r} holds domain {int(worst)}, outside 0..{num_domains - 1}; "
                "correct the data or xd_dlrm.num_domains"
            )
        return domains
