"""DDSR: the last hidden state of every domain, queried by a small cross-domain attention."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, pad

from hstu_xd.model.settings import EncoderSettings
from hstu_xd.ops import state_attention
from hstu_xd.ops.relative_bias import NUM_TIME_BUCKETS
from hstu_xd.ops.state_attention.eager import eager_state_attention
from hstu_xd.ops.state_attention.state_reads import QuestionReads, StateReads


class DynamicDomainState(nn.Module):
    """Cross-domain attention over the states of all domains, ``O(D L)``.

    ``C_i = sum_s softmax_s(<Wq h_i, Wk S_i[s]> / sqrt(dqk) + age bias) Wv S_i[s]`` over the latest
    ``M`` hidden states of each domain, a learned initial state where a domain has not occurred
    yet. ``Wv`` starts at zero, so the layer starts as the HSTU layer it extends.

    Args:
        embedding_dim: model width ``K``.
        num_domains: number of domains ``D``.
        num_heads: heads ``H``.
        dqk: width of queries and keys a head.
        dv: width of values a head.
        states_per_domain: latest states ``M`` kept per domain; the paper keeps one.
        query_target_domain: let the query know the domain of the next event.
        age_bias: add a learned bias on the log-bucketed time since the state was written.
        impl: "auto" or a name of :func:`hstu_xd.ops.available_state_impls`.

    Source: arXiv 2508.20945, dynamic domain state representation; several states, the query's
    target domain and the age bias are this project's.
    """

    def __init__(
        self,
        embedding_dim: int,
        num_domains: int,
        num_heads: int,
        dqk: int,
        dv: int,
        *,
        states_per_domain: int = 1,
        query_target_domain: bool = True,
        age_bias: bool = True,
        impl: str = "auto",
    ) -> None:
        super().__init__()
        self._heads, self._dqk, self._dv = num_heads, dqk, dv
        self._states_per_domain, self.impl = states_per_domain, impl
        self._query = nn.Linear(embedding_dim, num_heads * dqk, bias=False)
        self._key = nn.Linear(embedding_dim, num_heads * dqk, bias=False)
        self._value = nn.Linear(embedding_dim, num_heads * dv, bias=False)
        self._initial_state = nn.Parameter(
            torch.empty(num_domains, embedding_dim).normal_(std=0.02)
        )
        self._target_emb = (
            nn.Embedding(num_domains, num_heads * dqk) if query_target_domain else None
        )
        self._age_w = (
            nn.Parameter(torch.zeros(NUM_TIME_BUCKETS + 1, num_heads)) if age_bias else None
        )
        nn.init.xavier_uniform_(self._query.weight)
        nn.init.xavier_uniform_(self._key.weight)
        nn.init.zeros_(self._value.weight)
        if self._target_emb is not None:
            nn.init.normal_(self._target_emb.weight, std=0.02)

    @classmethod
    def from_settings(cls, settings: EncoderSettings) -> "DynamicDomainState":
        """Build it as the settings have it, whether they switch it on or not."""
        # "flex" is an implementation of domain attention alone.
        impl = "eager" if settings.impl == "flex" else settings.impl
        return cls(
            settings.embedding_dim,
            settings.num_domains,
            settings.num_heads,
            settings.dqk,
            settings.dv,
            states_per_domain=settings.states_per_domain,
            query_target_domain=settings.query_target_domain,
            age_bias=settings.state_age_bias,
            impl=impl,
        )

    def forward(
        self,
        hidden: Tensor,
        states: Tensor,
        reads: StateReads,
        target_domains: Tensor,
        *,
        questions: QuestionReads | None = None,
    ) -> Tensor:
        """Query the domain states.

        Args:
            hidden: (Q + R, K) float, what the queries of Q tokens and R questions are made of; all
                L tokens ask, unless ``reads`` names some.
            states: (L + R, K) float, the state that each token writes for its domain, or those that
                ``reads`` has; a question's is read by itself alone.
            reads: which states each token reads.
            target_domains: (Q + R,) int64, domain of each token's next event, and of the questions.
            questions: which states each question reads; None without.

        Returns:
            (Q + R, H * dv) float.
        """
        assert reads.states_per_domain == self._states_per_domain
        written = torch.cat([states, self._initial_state.to(states.dtype)])
        if hidden is states:
            query, key, value = self._projected(written)
            query = self._scaled(query[: hidden.shape[0]], target_domains)
        else:
            query, (key, value) = self.queries(hidden, target_domains), self.memory(written)
        q, k, v = (x.unflatten(1, (self._heads, -1)) for x in (query.to(key.dtype), key, value))
        if questions is None:
            return state_attention(q, k, v, reads, bias=self._age_w, impl=self.impl).flatten(1)
        # Tokens read the states of tokens and the initial ones.
        num_tokens, last = reads.num_states, len(states)
        own_k, own_v = (torch.cat([x[:num_tokens], x[last:]]) for x in (k, v))
        of_tokens, of_questions = q[: reads.num_queries], q[reads.num_queries :]
        tokens = state_attention(of_tokens, own_k, own_v, reads, bias=self._age_w, impl=self.impl)
        # Questions are rows behind all tokens.
        q = q if reads.asked is None else pad(of_questions, (0, 0, 0, 0, num_tokens, 0))
        asked = eager_state_attention(q, k, v, questions, bias=self._age_w)
        return torch.cat([tokens, asked]).flatten(1)

    def answers(
        self,
        hidden: Tensor,
        own: tuple[Tensor, Tensor],
        written: tuple[Tensor, Tensor],
        questions: QuestionReads,
        target_domains: Tensor,
    ) -> Tensor:
        """Answer questions alone, about states whose keys and values are at hand.

        Args:
            hidden: (R, K) float, what the queries are made of.
            own: keys and values of the questions' own states, see :meth:`memory`.
            written: keys and values of the states of the L events.
            questions: which states each question reads.
            target_domains: (R,) int64, the domain that each query knows.

        Returns:
            (R, H * dv) float.
        """
        initial = self.memory(self._initial_state)
        key, value = (torch.cat(parts) for parts in zip(written, own, initial))
        query = pad(self.queries(hidden, target_domains), (0, 0, len(written[0]), 0))
        q, k, v = (x.unflatten(1, (self._heads, -1)) for x in (query, key, value))
        return eager_state_attention(q, k, v, questions, bias=self._age_w).flatten(1)

    def fused(self) -> "FusedStates":
        """Lay the weights out for rows that arrive one at a time; later changes are not seen."""
        scale = self._dqk**-0.5
        memory = side_by_side(self._key.weight.T, self._value.weight.T, self._heads)
        return FusedStates(
            num_heads=self._heads,
            query=self._query.weight.T * scale,
            memory=memory,
            initial=by_head(self._initial_state @ memory, self._heads),
            targets=None if self._target_emb is None else self._target_emb.weight * scale,
            ages=None if self._age_w is None else self._age_w.T,
        )

    def queries(self, hidden: Tensor, target_domains: Tensor) -> Tensor:
        """Make scaled queries: (..., K) float, (...) int64 -> (..., H * dqk) float."""
        return self._scaled(self._query(hidden), target_domains)

    def _scaled(self, query: Tensor, target_domains: Tensor) -> Tensor:
        """Tell queries the domain that is asked for, and scale them: (..., H * dqk) float."""
        if self._target_emb is not None:
            query = query + self._target_emb(target_domains)
        return query * self._dqk**-0.5

    def _projected(self, states: Tensor) -> tuple[Tensor, ...]:
        """Make queries, keys and values of the same rows by one product: (..., K) each."""
        parts = [self._query.weight, self._key.weight, self._value.weight]
        return linear(states, torch.cat(parts)).split([x.shape[0] for x in parts], dim=-1)

    def memory(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """Make keys and values of states: (..., K) -> (..., H * dqk), (..., H * dv)."""
        parts = [self._key.weight, self._value.weight]
        key, value = linear(states, torch.cat(parts)).split([x.shape[0] for x in parts], dim=-1)
        return key, value


@dataclass(frozen=True, eq=False)
class FusedStates:
    """DDSR's weights as a step for a few new rows multiplies with them.

    Attributes:
        num_heads: heads ``H``.
        query: (K, H * dqk), of scaled queries.
        memory: (K, H * (dqk + dv)), of each head's key and value of a state, side by side.
        initial: (H, D, dqk + dv), keys and values of the initial states.
        targets: (D, H * dqk), what a target domain adds to scaled queries; None without.
        ages: (H, buckets + 1), the age bias; None without.
    """

    num_heads: int
    query: Tensor
    memory: Tensor
    initial: Tensor
    targets: Tensor | None
    ages: Tensor | None

    def memory_of(self, states: Tensor) -> Tensor:
        """Make keys and values of states: (R, K) -> (H, R, dqk + dv)."""
        return by_head(states @ self.memory, self.num_heads)

    @staticmethod
    def attend(query: Tensor, keys: Tensor, values: Tensor, bias: Tensor) -> Tensor:
        """Ask states: (H, r, dqk), (H, dqk, n), (H, n, dv), (H, r, n) -> (H, r, dv)."""
        return torch.bmm(torch.baddbmm(bias, query, keys).softmax(2), values)


def attend_states_in_tiles(model: nn.Module) -> None:
    """Let DDSR take its tiles in a model whose attention is the dense definition."""
    for part in model.modules():
        if isinstance(part, DynamicDomainState):
            part.impl = "eager"


def by_head(x: Tensor, heads: int) -> Tensor:
    """View (R, H * d) as (H, R, d)."""
    return x.view(x.shape[0], heads, -1).transpose(0, 1)


def columns_by_head(x: Tensor, heads: int) -> Tensor:
    """View (R, H * d) as (H, d, R)."""
    return x.view(x.shape[0], heads, -1).permute(1, 2, 0)


def side_by_side(keys: Tensor, values: Tensor, heads: int) -> Tensor:
    """Lay each head's key before its value: (R, H * dqk), (R, H * dv) -> (R, H * (dqk + dv))."""
    parts = [x.unflatten(1, (heads, -1)) for x in (keys, values)]
    return torch.cat(parts, dim=2).flatten(1)
