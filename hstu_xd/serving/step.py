"""The newest tokens of some users through all layers, on top of what their earlier ones left."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import layer_norm, normalize, silu

from hstu_xd.modules.settings import EncoderSettings
from hstu_xd.serving.prepared import PreparedLayer, PreparedModel, by_head
from hstu_xd.serving.sight import Sight, Tokens

_L2_EPS = 1e-6
_EPS = 1e-6


@dataclass(frozen=True, eq=False)
class _Memory:
    """Keys and values that one user's tokens read, and the places for their own; a layer each.

    Attributes:
        keys: (H, dqk, n).
        values: (H, n, dv).
        own: (H, dqk + dv, r), the last r of both.
    """

    keys: Sequence[Tensor]
    values: Sequence[Tensor]
    own: Sequence[Tensor]

    @classmethod
    def of(cls, whole: Tensor, tokens: int, settings: EncoderSettings) -> "_Memory":
        """Views of (layers, H, dqk + dv, n)."""
        keys, values = whole.split_with_sizes((settings.dqk, settings.dv), 2)
        own = whole[..., whole.shape[3] - tokens :]
        return cls(keys.unbind(), values.transpose(2, 3).unbind(), own.unbind())


class _User:
    """One user's part of a step.

    Attributes:
        tokens: of the user.
        sight: what they see.
        events: memory of committed events and of the tokens.
        states: DDSR's of committed states, initial ones and those of the tokens; None without it.
    """

    def __init__(self, prepared: PreparedModel, tokens: Tokens) -> None:
        s, state, count = prepared.model.settings, tokens.state, len(tokens.item_ids)
        self.tokens = tokens
        self.sight = Sight.of(prepared, tokens)
        # Memory in half precision is read, and written, through a copy in float32.
        self._memory = state.memory[..., : state.committed + count].float()
        self.events = _Memory.of(self._memory, count, s)
        self.states: _Memory | None = None
        self._state_memory: Tensor | None = None
        if s.ddsr:
            room = self._memory.new_empty(s.num_blocks, s.num_heads, count, s.dqk + s.dv)
            parts = [state.state_memory.float(), prepared.initial_memory, room]
            self._state_memory = torch.cat(parts, dim=2)
            self.states = _Memory.of(self._state_memory.transpose(2, 3), count, s)

    def commit(self) -> None:
        """Leave the first tokens' keys, values and states in the user's memory."""
        state, commits = self.tokens.state, self.tokens.commits
        if state.memory.dtype != self._memory.dtype:
            places = slice(state.committed, state.committed + commits)
            state.memory[..., places] = self._memory[..., places]
        states = None
        if self._state_memory is not None:
            first = self._state_memory.shape[2] - len(self.tokens.item_ids)
            states = self._state_memory[:, :, first : first + commits]
        state.commit(commits, states)


def run_step(prepared: PreparedModel, users: Sequence[Tokens]) -> list[Tensor]:
    """Run tokens through all layers, exactly as the full encoder would, and commit them.

    What a token goes through alone is one product for the tokens of all users; then the tokens of
    each user read that user's memory where it lies. All events are scored and those of other
    domains then weigh nothing: for a token or two that is faster than to gather a domain's.

    Args:
        prepared: the model.
        users: tokens of each user, of different users if any are to commit.

    Returns:
        For each user (V, K) float, unit vectors of the variants.
    """
    with _one_thread():
        parts = [_User(prepared, tokens) for tokens in users]
        sizes = [len(tokens.item_ids) for tokens in users]
        x, targets = _input(prepared, users)
        added = prepared.added.index_select(1, targets).unbind()
        for index, layer in enumerate(prepared.layers):
            x = _layer(layer, x, added[index], parts, sizes, index)
        for part in parts:
            part.commit()
        vectors = normalize(x.float(), dim=-1, eps=_L2_EPS)
        return [
            rows[tokens.commits :] for rows, tokens in zip(vectors.split(sizes), users, strict=True)
        ]


def _input(prepared: PreparedModel, users: Sequence[Tokens]) -> tuple[Tensor, Tensor]:
    """(R, K) items' vectors and positions with the domains' signals, and (R) target domains."""
    stays = len(prepared.sources) - 1
    rows = [
        (item, position, stays if domain == target else domain, target)
        for tokens in users
        for item, position, domain, target in zip(
            tokens.item_ids, tokens.positions, tokens.domains, tokens.target_domains
        )
    ]
    items, positions, sources, targets = torch.tensor(rows).unbind(1)
    signals = torch.addcmul(
        prepared.requests.index_select(0, targets),
        prepared.destinations.index_select(0, targets),
        prepared.sources.index_select(0, sources),
    )
    model = prepared.model
    x = model._input_features_preproc(model._embedding_module(items), positions, signals)
    return x, targets


def _layer(
    prepared: PreparedLayer,
    x: Tensor,
    added: Tensor,
    users: Sequence[_User],
    sizes: list[int],
    index: int,
) -> Tensor:
    """(R, K) -> (R, K)."""
    layer = prepared.layer
    u, q, kv, query, states = prepared.project(layer_norm(x, x.shape[-1:], eps=_EPS), added)
    # The norm undoes a division by N, but for its eps: so the eps is multiplied instead.
    read = _attend(q, kv, users, sizes, index)
    attended = layer_norm(read, read.shape[1:], eps=_EPS * layer._settings.norm_length**2)
    answer = None
    if prepared.state_projection is not None:
        query = by_head(query, q.shape[0])
        written = prepared.states(states, attended)
        answer = _ask_states(query, written.transpose(1, 2), users, sizes, index)
    return layer.combine(x, u, attended, answer)


def _attend(q: Tensor, kv: Tensor, users: Sequence[_User], sizes: list[int], index: int) -> Tensor:
    """(R, H dv): N times the tokens' attention over committed events and one another."""
    read = []
    for user, queries, own in _of_each(users, q, kv, sizes):
        memory = user.events
        memory.own[index].copy_(own)
        scores = user.sight.events(index).baddbmm_(queries, memory.keys[index])
        read.append(torch.bmm(silu(scores, inplace=True), memory.values[index]))
    return _heads_together(read)


def _ask_states(
    query: Tensor, written: Tensor, users: Sequence[_User], sizes: list[int], index: int
) -> Tensor:
    """(R, H dv): DDSR's answer; every token is its domain's newest state."""
    answers = []
    for user, queries, own in _of_each(users, query, written, sizes):
        memory = user.states
        assert memory is not None
        memory.own[index].copy_(own)
        scores = torch.baddbmm(user.sight.states[index], queries, memory.keys[index])
        answers.append(torch.bmm(scores.softmax(2), memory.values[index]))
    return _heads_together(answers)


def _of_each(
    users: Sequence[_User], queries: Tensor, own: Tensor, sizes: list[int]
) -> Iterable[tuple[_User, Tensor, Tensor]]:
    """Every user's part of (H, R, dqk) queries and of (H, dqk + dv, R) keys and values."""
    return zip(users, queries.split_with_sizes(sizes, 1), own.split_with_sizes(sizes, 2))


def _heads_together(parts: list[Tensor]) -> Tensor:
    """(H, r, dv) of each user -> (R, H * dv)."""
    return torch.cat(parts, dim=1).transpose(0, 1).flatten(1)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Products this small take longer when several threads share them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
