"""DDSR between upstream's layers: rows of a request read the latest states of every domain."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from generative_recommenders.modules.stu import STUStack
from torch import Tensor, nn
from torch.nn.functional import layer_norm, pad

from hstu_xd.errors import InputError
from hstu_xd.model.ddsr import DynamicDomainState
from hstu_xd.model.settings import EncoderSettings
from hstu_xd.ops.grouping import DomainGrouping
from hstu_xd.ops.state_attention.state_reads import QuestionReads, StateReads
from hstu_xd.plugins.dlrm_v3.domain_groups import DomainGroups, RequestLayout
from hstu_xd.plugins.dlrm_v3.user_memory import NewRows, NewStates

_EPS = 1e-6


@dataclass(frozen=True, eq=False)
class RequestStates:
    """Which domain states the rows of a batch read, and where these rows stand.

    History rows write states and read them; a target reads those that the history has left, and its
    own as the newest one of its domain, and leaves none; contextual rows do neither.

    Attributes:
        places: (S,) int64, place among the layers' rows of every history row, then of every target.
        history: what history rows read.
        targets: what targets read.
        asked_domains: (S,) int64, the domain that each row's query knows: of the next event, of a
            target its own. The last history row knows its own alone, and not what is asked.
    """

    places: Tensor
    history: StateReads
    targets: QuestionReads
    asked_domains: Tensor

    @classmethod
    def build(
        cls,
        layout: RequestLayout,
        row_domains: Tensor,
        timestamps: Tensor,
        settings: EncoderSettings,
        groups: DomainGroups | None = None,
    ) -> "RequestStates":
        """Lay out a batch.

        Args:
            layout: which rows are contextual, history and targets.
            row_domains: (L,) int64.
            timestamps: (L,) int64, of history rows when they happened, of targets when they are
                asked for.
            settings: number of domains, and states kept of each.
            groups: the rows as the layers see them; None where they see the batch as it is.
        """
        history, targets = (x.nonzero().squeeze(1) for x in (layout.is_history, layout.is_target))
        num_events = layout.first_targets - layout.offsets[:-1] - layout.num_context
        grouping = DomainGrouping.from_jagged(
            row_domains[history], pad(num_events.cumsum(0), (1, 0)), settings.num_domains
        )
        reads = StateReads(
            grouping,
            timestamps[history],
            layout.following(timestamps)[history],
            settings.states_per_domain,
        )
        users = layout.users[targets]
        questions = QuestionReads(
            reads,
            groups=users * settings.num_domains + row_domains[targets],
            positions=num_events[users],
            written=timestamps[targets],
            timestamps=timestamps[targets],
            apart=True,
        )
        rows = torch.cat([history, targets])
        asked = layout.following(row_domains)[rows]
        return cls(groups.places_of(rows) if groups else rows, reads, questions, asked)


class DomainStateSublayer(nn.Module):
    """``x + Wo DDSR(LN(x))``: rows ask the latest states of all domains, which are rows, too.

    Upstream's kernel computes norm, gate and output of a layer in one, so DDSR stands behind the
    layer and not inside its gate. It starts at zero.

    Args:
        settings: sizes of the layers and DDSR's own.

    Source: arXiv 2508.20945, dynamic domain state representation; the place is this project's.
    """

    def __init__(self, settings: EncoderSettings) -> None:
        super().__init__()
        self._ddsr = DynamicDomainState.from_settings(settings)
        width = settings.num_heads * settings.dv
        self._output = nn.Linear(width, settings.embedding_dim, bias=False)
        nn.init.xavier_uniform_(self._output.weight)

    def forward(self, x: Tensor, states: RequestStates) -> Tensor:
        """Add what the states answer: (R, K) float, rows as the layers see them -> (R, K)."""
        # States are few and small; they are kept in float32, whatever the layers compute in.
        with torch.autocast(x.device.type, enabled=False):
            rows = layer_norm(x[states.places].float(), x.shape[1:], eps=_EPS)
            answer = self._ddsr(
                rows, rows, states.history, states.asked_domains, questions=states.targets
            )
            return x.index_add(0, states.places, self._output(answer).to(x.dtype))

    def extend(self, x: Tensor, states: NewStates) -> Tensor:
        """Add what the states answer to the new rows of a request: (R, K) float -> (R, K)."""
        rows = layer_norm(x[states.places], x.shape[1:], eps=_EPS)
        own = self._ddsr.memory(rows)
        written = states.keep(*(each[: states.num_events] for each in own))
        answer = self._ddsr.answers(rows, own, written, states.reads, states.asked_domains)
        return x.index_add(0, states.places, self._output(answer))


class UncachedStack(STUStack):
    """Upstream's stack without its incremental mode, which knows no domains, but with ours."""

    def extend(self, x: Tensor, users: Sequence[NewRows], norm: int) -> Tensor:
        """Compute the new rows of some users' requests: (R, K) float -> (R, K).

        Args:
            x: what the layers are given of them, user by user.
            users: which rows they are.
            norm: what scores are divided by.
        """
        groups = [group for user in users for group in user.groups.values()]
        for layer in self._stu_layers:
            x = layer.extend(x, groups, norm)
        return x

    def cached_forward(self, *arguments: Any, **others: Any) -> Tensor:
        """Refuse.

        Raises:
            InputError: always.
        """
        raise InputError("cached_forward knows no domains; encode whole histories instead")


class DomainStateStack(UncachedStack):
    """Upstream's stack with DDSR behind each layer; the layers keep their parameter names.

    Args:
        stu_list, is_inference: upstream's.
        settings: sizes of the layers and DDSR's own.
    """

    def __init__(
        self, stu_list: list[Any], is_inference: bool = False, *, settings: EncoderSettings
    ) -> None:
        super().__init__(stu_list=stu_list, is_inference=is_inference)
        self._xd_ddsr = nn.ModuleList(DomainStateSublayer(settings) for _ in stu_list)
        self._states: RequestStates | None = None

    @contextmanager
    def reading(self, states: RequestStates) -> Iterator[None]:
        """Hold what the rows of a batch read, while upstream's transducer calls the stack."""
        self._states = states
        try:
            yield
        finally:
            self._states = None

    def forward(self, x: Tensor, **others: Any) -> Tensor:
        """Run layers and sublayers; ``others`` are upstream's lengths, offsets and targets."""
        assert self._states is not None
        for layer, ddsr in zip(self._stu_layers, self._xd_ddsr):
            x = ddsr(layer(x=x, **others), self._states)
        return x

    def extend(self, x: Tensor, users: Sequence[NewRows], norm: int) -> Tensor:
        """Run layers and sublayers on the new rows of requests, see :class:`UncachedStack`."""
        groups = [group for user in users for group in user.groups.values()]
        sizes = [len(user.rows) for user in users]
        blocks: Any = zip(self._stu_layers, self._xd_ddsr)
        for layer, ddsr in blocks:
            rows = layer.extend(x, groups, norm).split(sizes)
            x = torch.cat([ddsr.extend(own, user.states) for own, user in zip(rows, users)])
        return x
