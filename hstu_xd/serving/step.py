"""One token through all layers, on top of what its user's earlier tokens left behind."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import normalize, silu
from torch.nn.utils.rnn import pad_sequence

from hstu_xd.model import CrossDomainHSTU
from hstu_xd.modules.ddsr import DynamicDomainState
from hstu_xd.modules.hstu_layer import HSTULayer
from hstu_xd.modules.relative_attention_bias import NUM_TIME_BUCKETS
from hstu_xd.ops.relative_bias import time_bucket
from hstu_xd.serving.state import UserState

_L2_EPS = 1e-6


@dataclass(frozen=True, eq=False)
class Step:
    """Pending tokens of B users, each seen from V requests; S is the longest committed history.

    A user without events has a virtual token: no item, seen by nobody, at position 0.

    Attributes:
        item_ids: (B,) int64, 0 for a virtual token.
        positions: (B,) int64.
        domains: (B,) int64, -1 for a virtual token.
        timestamps: (B,) int64.
        target_domains: (B, V) int64.
        request_timestamps: (B, V) int64.
        key_domains: (B, S) int64, -2 behind a user's committed events.
        key_timestamps: (B, S) int64.
        keys: (layers, B, S, H * dqk).
        values: (layers, B, S, H * dv).
        state_keys: (layers, B, D, M, H * dqk).
        state_values: (layers, B, D, M, H * dv).
        state_times: (B, D, M) int64.
        state_counts: (B, D) int64.
    """

    item_ids: Tensor
    positions: Tensor
    domains: Tensor
    timestamps: Tensor
    target_domains: Tensor
    request_timestamps: Tensor
    key_domains: Tensor
    key_timestamps: Tensor
    keys: Tensor
    values: Tensor
    state_keys: Tensor
    state_values: Tensor
    state_times: Tensor
    state_counts: Tensor

    @classmethod
    def gather(
        cls, states: Sequence[UserState], target_domains: Tensor, request_timestamps: Tensor
    ) -> "Step":
        """Lay the states of several users side by side; those of one user are not copied."""
        committed = [state.committed for state in states]
        last = [len(state.item_ids) - 1 for state in states]
        pending = [
            (state.item_ids[-1], state.domains[-1], state.timestamps[-1])
            if at >= 0
            else (torch.tensor(0), torch.tensor(-1), torch.tensor(0))
            for state, at in zip(states, last)
        ]
        item_ids, domains, timestamps = (torch.stack(column) for column in zip(*pending))

        def padded(name: str, empty: int) -> Tensor:
            rows = [getattr(state, name)[:n] for state, n in zip(states, committed)]
            return pad_sequence(rows, batch_first=True, padding_value=empty)

        def stacked(name: str) -> Tensor:
            if len(states) == 1:
                kept = getattr(states[0], name)
                return kept[:, : committed[0]].unsqueeze(1)
            rows = [
                getattr(state, name)[:, :n].transpose(0, 1) for state, n in zip(states, committed)
            ]
            return pad_sequence(rows, batch_first=True).permute(2, 0, 1, 3)

        return cls(
            item_ids=item_ids,
            positions=torch.tensor(last).clamp(min=0),
            domains=domains,
            timestamps=timestamps,
            target_domains=target_domains,
            request_timestamps=request_timestamps,
            key_domains=padded("domains", -2),
            key_timestamps=padded("timestamps", 0),
            keys=stacked("keys"),
            values=stacked("values"),
            state_keys=torch.stack([state.state_keys for state in states], dim=1),
            state_values=torch.stack([state.state_values for state in states], dim=1),
            state_times=torch.stack([state.state_times for state in states]),
            state_counts=torch.stack([state.state_counts for state in states]),
        )

    # What all layers share, computed once.

    @cached_property
    def key_distance(self) -> Tensor:
        """(B, S) int64, position of each committed event less the pending one's."""
        events = torch.arange(self.key_domains.shape[1], device=self.positions.device)
        return events - self.positions.unsqueeze(1)

    @cached_property
    def key_age(self) -> Tensor:
        """(B, V, S) int64, bucket of the time from each committed event to the request."""
        age = self.request_timestamps.unsqueeze(2) - self.key_timestamps.unsqueeze(1)
        return time_bucket(age, NUM_TIME_BUCKETS)

    @cached_property
    def own_age(self) -> Tensor:
        """(B, V) int64, the same from the pending event."""
        age = self.request_timestamps - self.timestamps.unsqueeze(1)
        return time_bucket(age, NUM_TIME_BUCKETS)

    def visible(self, masked: bool, num_heads: int, target_heads: int) -> tuple[Tensor, Tensor]:
        """Committed events, and itself, that each head reads: (B, V, H, S), (B, V, H) bool."""
        if masked not in self._masks:
            self._masks[masked] = self._visible(masked, num_heads, target_heads)
        return self._masks[masked]

    def _visible(self, masked: bool, num_heads: int, target_heads: int) -> tuple[Tensor, Tensor]:
        key_domains = self.key_domains.unsqueeze(1)
        shape = self.target_domains.shape
        there = (key_domains != -2).expand(*shape, -1)
        real = (self.domains >= 0).unsqueeze(1).expand(shape)
        own = there & (key_domains == self.domains.view(-1, 1, 1)) if masked else there
        heads, own_heads = [own] * (num_heads - target_heads), [real] * num_heads
        if target_heads:
            heads += [there & (key_domains == self.target_domains.unsqueeze(2))] * target_heads
            same = real & (self.domains.unsqueeze(1) == self.target_domains)
            own_heads[num_heads - target_heads :] = [same] * target_heads
        return torch.stack(heads, dim=2), torch.stack(own_heads, dim=2)

    @cached_property
    def _masks(self) -> dict[bool, tuple[Tensor, Tensor]]:
        return {}

    @cached_property
    def unseen_states(self) -> Tensor:
        """(B, 1, D * M + D + 1, 1) bool: committed states, initial ones, the pending token's."""
        domains, kept = self.state_times.shape[1:]
        pending = torch.arange(domains, device=self.domains.device) == self.domains.unsqueeze(1)
        # What a domain still shows of its committed states: one less where the token writes.
        shown = self.state_counts.clamp(max=kept - pending.long())
        unseen = torch.arange(kept, device=shown.device) >= shown.unsqueeze(2)
        written = (self.state_counts > 0) | pending
        virtual = (self.domains < 0).unsqueeze(1)
        unseen = torch.cat([unseen.flatten(1), written, virtual], dim=1)
        return unseen[:, None, :, None]

    @cached_property
    def state_age(self) -> Tensor:
        """(B, V, D * M + D + 1) int64, bucket of the time from each state to the request."""
        users, variants = self.target_domains.shape
        written = torch.cat([self.state_times.flatten(1), self.timestamps.unsqueeze(1)], dim=1)
        age = self.request_timestamps.unsqueeze(2) - written.unsqueeze(1)
        bucket = time_bucket(age, NUM_TIME_BUCKETS)
        never = bucket.new_full((users, variants, self.state_times.shape[1]), NUM_TIME_BUCKETS)
        return torch.cat([bucket[..., :-1], never, bucket[..., -1:]], dim=2)


@dataclass(frozen=True, eq=False)
class StepOutput:
    """What a step computed.

    Attributes:
        vectors: (B, V, K) float, unit vectors.
        keys: (layers, B, V, H * dqk), of the pending tokens.
        values: (layers, B, V, H * dv).
        state_keys: (layers, B, V, H * dqk), of the states they write; empty without DDSR.
        state_values: (layers, B, V, H * dv).
    """

    vectors: Tensor
    keys: Tensor
    values: Tensor
    state_keys: Tensor
    state_values: Tensor


def run_step(model: CrossDomainHSTU, step: Step) -> StepOutput:
    """Run the pending tokens through all layers, exactly as the full encoder would.

    Args:
        model: in evaluation mode.
        step: tokens, requests and states.
    """
    x = _input(model, step)
    written: list[tuple[Tensor, ...]] = []
    for index, layer in enumerate(model._hstu.layers):
        x, left = _layer(layer, x, step, index)
        written.append(left)
    keys, values, state_keys, state_values = (torch.stack(part) for part in zip(*written))
    vectors = normalize(x.float(), dim=-1, eps=_L2_EPS)
    return StepOutput(vectors, keys, values, state_keys, state_values)


def _input(model: CrossDomainHSTU, step: Step) -> Tensor:
    """(B, V, K): the item's vector and position, with the signals of each requested domain."""
    extra = None
    if model._tape is not None:
        # A virtual token comes from no domain: it counts as staying in the requested one.
        source = torch.where(
            step.domains.unsqueeze(1) < 0, step.target_domains, step.domains.unsqueeze(1)
        )
        extra = model._tape(source, step.target_domains)
    if model._target_domain_emb is not None:
        embedded = model._target_domain_emb(step.target_domains)
        extra = embedded if extra is None else extra + embedded
    variants = step.target_domains.shape[1]
    items = model._embedding_module(step.item_ids).unsqueeze(1).expand(-1, variants, -1)
    return model._input_features_preproc(items, step.positions.unsqueeze(1), extra)


def _layer(
    layer: HSTULayer, x: Tensor, step: Step, index: int
) -> tuple[Tensor, tuple[Tensor, ...]]:
    normed, u, v, q, k = layer.project(x)
    attended = layer.normalise(_attend(layer, q, k, v, step, index))
    states = layer.state(normed, attended)
    answer, state_keys, state_values = None, x[..., :0], x[..., :0]
    if layer._ddsr is not None:
        state_keys, state_values = layer._ddsr.memory(states)
        answer = _read_states(layer._ddsr, normed, state_keys, state_values, step, index)
    return layer.combine(x, u, attended, answer), (k, v, state_keys, state_values)


def _attend(layer: HSTULayer, q: Tensor, k: Tensor, v: Tensor, step: Step, index: int) -> Tensor:
    """(B, V, H dv): attention over the committed events and the pending one itself."""
    s = layer._settings
    query, own_key, own_value = (x.unflatten(2, (s.num_heads, -1)) for x in (q, k, v))
    keys, values = (
        x[index].to(q.dtype).unflatten(2, (s.num_heads, -1)) for x in (step.keys, step.values)
    )
    scores = torch.einsum("bvhd,bshd->bvhs", query, keys)
    own_score = (query * own_key).sum(3)
    if layer._rel_attn_bias is not None:
        places, times = layer._rel_attn_bias._pos_w, layer._rel_attn_bias._ts_w
        origin = places.numel() // 2
        bias = places[origin + step.key_distance].unsqueeze(1) + times[step.key_age]
        scores = scores + bias.unsqueeze(2)
        own_score = own_score + (places[origin] + times[step.own_age]).unsqueeze(2)
    visible, own_visible = step.visible(layer._masked, s.num_heads, s.target_view_heads)
    weights = silu(scores) * visible / s.norm_length
    own_weight = silu(own_score) * own_visible / s.norm_length
    read = torch.einsum("bvhs,bshd->bvhd", weights, values)
    return (read + own_weight.unsqueeze(3) * own_value).flatten(2)


def _read_states(
    ddsr: DynamicDomainState,
    normed: Tensor,
    own_keys: Tensor,
    own_values: Tensor,
    step: Step,
    index: int,
) -> Tensor:
    """(B, V, H dv): DDSR's answer; the pending token is its domain's newest state."""
    users, variants = step.target_domains.shape
    initial_keys, initial_values = ddsr.memory(ddsr._initial_state)

    def rows(committed: Tensor, initial: Tensor, own: Tensor) -> Tensor:
        fixed = committed[index].to(own.dtype).flatten(1, 2)
        fixed = torch.cat([fixed, initial.expand(users, -1, -1)], dim=1)
        return torch.cat([fixed.unsqueeze(1).expand(-1, variants, -1, -1), own.unsqueeze(2)], dim=2)

    keys = rows(step.state_keys, initial_keys, own_keys)
    values = rows(step.state_values, initial_values, own_values)
    heads = ddsr._heads
    query = ddsr.queries(normed, step.target_domains).unflatten(2, (heads, -1))
    scores = torch.einsum("bvhd,bvshd->bvsh", query, keys.unflatten(3, (heads, -1)))
    if ddsr._age_w is not None:
        scores = scores + ddsr._age_w[step.state_age]
    scores = scores.masked_fill(step.unseen_states, float("-inf"))
    answer = torch.einsum("bvsh,bvshd->bvhd", scores.softmax(2), values.unflatten(3, (heads, -1)))
    return answer.flatten(2)
