"""The newest rows of some users through all layers, on top of what their earlier ones left."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn.functional import layer_norm, normalize, silu

from hstu_xd.model.settings import EncoderSettings
from hstu_xd.serving.fused_weights import PreparedLayer, PreparedModel, by_head
from hstu_xd.serving.new_rows import Rows
from hstu_xd.serving.visibility_of_rows import Sight

_L2_EPS = 1e-6
_EPS = 1e-6


@dataclass(frozen=True, eq=False)
class _Memory:
    """Keys and values that one user's rows read, and the places for their own; a layer each.

    Attributes:
        keys: (H, dqk, n).
        values: (H, n, dv).
        own: (H, dqk + dv, r), the last r of both.
    """

    keys: Sequence[Tensor]
    values: Sequence[Tensor]
    own: Sequence[Tensor]

    @classmethod
    def of(cls, whole: Tensor, rows: int, settings: EncoderSettings) -> "_Memory":
        """Views of (layers, H, dqk + dv, n)."""
        keys, values = whole.split_with_sizes((settings.dqk, settings.dv), 2)
        own = whole[..., whole.shape[3] - rows :]
        return cls(keys.unbind(), values.transpose(2, 3).unbind(), own.unbind())


class _User:
    """One user's part of a step.

    Attributes:
        rows: of the user.
        sight: what they see.
        events: memory of earlier rows and of the step's.
        states: DDSR's of committed states, initial ones and those of the rows; None without it.
    """

    def __init__(self, prepared: PreparedModel, rows: Rows) -> None:
        s, state, count = prepared.model.settings, rows.state, len(rows.item_ids)
        self.rows = rows
        self.sight = Sight.of(prepared, rows)
        # Memory in half precision is read, and written, through a copy in float32.
        self._memory = state.memory[..., : state.kept + count].float()
        self.events = _Memory.of(self._memory, count, s)
        self.states: _Memory | None = None
        self._state_memory: Tensor | None = None
        if s.ddsr:
            room = self._memory.new_empty(s.num_blocks, s.num_heads, count, s.dqk + s.dv)
            parts = [state.state_memory.float(), prepared.initial_memory, room]
            self._state_memory = torch.cat(parts, dim=2)
            self.states = _Memory.of(self._state_memory.transpose(2, 3), count, s)

    def commit(self) -> None:
        """Leave the first rows' keys, values and states in the user's memory."""
        state, commits = self.rows.state, self.rows.commits
        if state.memory.dtype != self._memory.dtype:
            places = slice(state.kept, state.kept + commits)
            state.memory[..., places] = self._memory[..., places]
        states = None
        if self._state_memory is not None:
            first = self._state_memory.shape[2] - len(self.rows.item_ids)
            states = self._state_memory[:, :, first : first + commits]
        self.rows.commit(states)


@dataclass(frozen=True, eq=False)
class _Step:
    """What the layers share.

    Attributes:
        users: parts of the step.
        sizes: rows of each.
        tokens: (T,) int64, rows that are history tokens, of all users together; None if none are.
    """

    users: Sequence[_User]
    sizes: list[int]
    tokens: Tensor | None


def run_step(prepared: PreparedModel, users: Sequence[Rows]) -> list[Tensor]:
    """Run rows through all layers, exactly as the full encoder would, and commit them.

    What a row goes through alone is one product for the rows of all users; then the rows of each
    user read that user's memory where it lies. All of it is scored and what a head does not read
    then weighs nothing: for a row or two that is faster than to gather a domain's.

    Args:
        prepared: the model.
        users: rows of each user, of different users if any are to commit.

    Returns:
        For each user (V, K) float, unit vectors of the variants.
    """
    with _one_thread():
        parts = [_User(prepared, rows) for rows in users]
        sizes = [len(rows.item_ids) for rows in users]
        x, targets = _input(prepared, users)
        tokens = None
        if prepared.history_tokens is not None:
            x, tokens = _insert_tokens(x, prepared.history_tokens, users, sizes)
        step = _Step(parts, sizes, tokens)
        added = prepared.added.index_select(1, targets).unbind()
        for index, layer in enumerate(prepared.layers):
            x = _layer(layer, x, added[index], step, index)
        for part in parts:
            part.commit()
        vectors = normalize(x.float(), dim=-1, eps=_L2_EPS)
        return [
            rows[user.commits :] for rows, user in zip(vectors.split(sizes), users, strict=True)
        ]


def _input(prepared: PreparedModel, users: Sequence[Rows]) -> tuple[Tensor, Tensor]:
    """(R, K) items' vectors and positions with the domains' signals, and (R) target domains."""
    stays = len(prepared.sources) - 1
    columns = [
        (item, position, stays if domain == target else domain, target)
        for rows in users
        for item, position, domain, target in zip(
            rows.item_ids, rows.positions, rows.domains, rows.target_domains
        )
    ]
    items, positions, sources, targets = torch.tensor(columns).unbind(1)
    signals = torch.addcmul(
        prepared.requests.index_select(0, targets),
        prepared.destinations.index_select(0, targets),
        prepared.sources.index_select(0, sources),
    )
    model = prepared.model
    x = model._input_features_preproc(model._embedding_module(items), positions, signals)
    return x, targets


def _insert_tokens(
    x: Tensor, vectors: Tensor, users: Sequence[Rows], sizes: list[int]
) -> tuple[Tensor, Tensor | None]:
    """(R, K) rows with the (., K) vectors of history tokens in their places, and these places."""
    starts = accumulate(sizes[:-1], initial=0)
    laid = [
        (start + row, number)
        for start, rows in zip(starts, users)
        for row, number in rows.tokens.items()
    ]
    if not laid:
        return x, None
    places, numbers = torch.tensor(laid).unbind(1)
    return x.index_copy(0, places, vectors.index_select(0, numbers)), places


def _layer(prepared: PreparedLayer, x: Tensor, added: Tensor, step: _Step, index: int) -> Tensor:
    """(R, K) -> (R, K)."""
    layer = prepared.layer
    u, q, kv, query, states = prepared.project(layer_norm(x, x.shape[-1:], eps=_EPS), added)
    # The norm undoes a division by N, but for its eps: so the eps is multiplied instead.
    read = _attend(q, kv, step, index)
    attended = layer_norm(read, read.shape[1:], eps=_EPS * layer._settings.norm_length**2)
    answer = None
    if prepared.state_projection is not None:
        query = by_head(query, q.shape[0])
        written = prepared.states(states, attended)
        answer = _ask_states(query, written.transpose(1, 2), step, index)
    return layer.combine(x, u, attended, answer)


def _attend(q: Tensor, kv: Tensor, step: _Step, index: int) -> Tensor:
    """(R, H dv): N times the rows' attention over earlier rows and one another."""
    read = []
    for user, queries, own in _of_each(step, q, kv):
        memory = user.events
        memory.own[index].copy_(own)
        scores = user.sight.events(index).baddbmm_(queries, memory.keys[index])
        read.append(torch.bmm(silu(scores, inplace=True), memory.values[index]))
    return _heads_together(read)


def _ask_states(query: Tensor, written: Tensor, step: _Step, index: int) -> Tensor:
    """(R, H dv): DDSR's answer; every event is its domain's newest state, history tokens none."""
    answers = []
    for user, queries, own in _of_each(step, query, written):
        memory = user.states
        assert memory is not None
        memory.own[index].copy_(own)
        scores = torch.baddbmm(user.sight.states[index], queries, memory.keys[index])
        answers.append(torch.bmm(scores.softmax(2), memory.values[index]))
    answer = _heads_together(answers)
    return answer if step.tokens is None else answer.index_fill_(0, step.tokens, 0)


def _of_each(step: _Step, queries: Tensor, own: Tensor) -> Iterable[tuple[_User, Tensor, Tensor]]:
    """Every user's part of (H, R, dqk) queries and of (H, dqk + dv, R) keys and values."""
    sizes = step.sizes
    return zip(step.users, queries.split_with_sizes(sizes, 1), own.split_with_sizes(sizes, 2))


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
