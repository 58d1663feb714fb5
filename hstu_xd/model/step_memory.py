"""What the new rows of a step read of their users' memories: by plain PyTorch, or by loops in C.

Either computes what :class:`hstu_xd.model.fused_layer.StepMemory` says. The first goes from user to
user; the second takes all users of a step in one call, and works out the biases on the way.
"""

from collections.abc import Iterable, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from hstu_xd.model.ddsr import FusedStates
from hstu_xd.model.fused_layer import Attend, FusedLayer
from hstu_xd.model.incremental_views import BiasTables, NewRows, RowBiases, hidden_states
from hstu_xd.model.settings import EncoderSettings
from hstu_xd.ops.first_use import KernelUse, holds
from hstu_xd.ops.new_rows.native import LIBRARY, READ_ROWS, READ_STATES, USER_FIELDS
from hstu_xd.ops.relative_bias import NUM_TIME_BUCKETS, bucket_edges


class _UserPart:
    """One user's part of a step.

    Attributes:
        rows: of the user.
        memory: (layers, H, dqk + dv, c + r) float32, keys and values of earlier rows and of the new
            ones, which a step writes.
        states: (layers with DDSR, H, D * M + D + r, dqk + dv) float32, DDSR's of states in memory,
            initial ones and those of the new rows, which a step writes; None without it.
    """

    def __init__(self, settings: EncoderSettings, initial: Tensor, rows: NewRows) -> None:
        s, user, count = settings, rows.user, len(rows.item_ids)
        self.rows = rows
        # Memory in half precision is read, and written, through a copy in float32.
        self.memory = user.memory[..., : user.num_rows + count].float()
        self.states: Tensor | None = None
        if s.ddsr:
            room = self.memory.new_empty(len(s.state_layers), s.num_heads, count, s.dqk + s.dv)
            self.states = torch.cat([user.state_memory.float(), initial, room], dim=2)

    def commit(self) -> None:
        """Leave the writers' keys, values and states in the user's memory."""
        user, writers = self.rows.user, self.rows.num_writers
        if user.memory.dtype != self.memory.dtype:
            places = slice(user.num_rows, user.num_rows + writers)
            user.memory[..., places] = self.memory[..., places]
        states = None
        if self.states is not None:
            first = self.states.shape[2] - len(self.rows.item_ids)
            states = self.states[:, :, first : first + writers]
        self.rows.commit(states)


class _KeysAndValues(NamedTuple):
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
    def from_whole(cls, whole: Tensor, rows: int, settings: EncoderSettings) -> "_KeysAndValues":
        """Take views of (layers, H, dqk + dv, n)."""
        keys, values = whole.split_with_sizes((settings.dqk, settings.dv), 2)
        own = whole[..., whole.shape[3] - rows :]
        return cls(keys.unbind(), values.transpose(2, 3).unbind(), own.unbind())


class _EagerPart(_UserPart):
    """A part with its biases.

    Attributes:
        biases: by what its rows may read.
        row_memory: views of ``memory``.
        state_memory: views of ``states``; None without DDSR.
    """

    def __init__(self, tables: BiasTables, initial: Tensor, rows: NewRows) -> None:
        s, count = tables.settings, len(rows.item_ids)
        super().__init__(s, initial, rows)
        self.biases = RowBiases.build(tables, rows)
        self.row_memory = _KeysAndValues.from_whole(self.memory, count, s)
        self.state_memory: _KeysAndValues | None = None
        if self.states is not None:
            self.state_memory = _KeysAndValues.from_whole(self.states.transpose(2, 3), count, s)


_Part = TypeVar("_Part", bound=_UserPart)


class _Memory(Generic[_Part]):
    """The parts of a step's users, layer by layer.

    Attributes:
        layer: number of the layer that reads.
    """

    _users: Sequence[_Part]
    _tables: BiasTables
    layer = 0

    @property
    def _state_layer(self) -> int:
        """Which of the layers with DDSR the present one is."""
        return self._tables.settings.state_layers.index(self.layer)

    def commit(self) -> None:
        """Leave what the writers of all users have left in their memories."""
        for user in self._users:
            user.commit()


class EagerMemory(_Memory[_EagerPart]):
    """Reads memories user by user, in plain PyTorch.

    Args:
        tables: biases of all layers.
        initial: (layers with DDSR, H, D, dqk + dv), keys and values of the initial states.
        users: rows of each user of the step.
        tokens: (T,) int64, rows that are history tokens, of all users together; None if none are.
    """

    def __init__(
        self,
        tables: BiasTables,
        initial: Tensor,
        users: Sequence[NewRows],
        tokens: Tensor | None = None,
    ) -> None:
        self._tables = tables
        self._users = [_EagerPart(tables, initial, rows) for rows in users]
        self._sizes = [len(rows.item_ids) for rows in users]
        self._tokens = tokens

    def read_rows(self, queries: Tensor, own: Tensor, attend: Attend) -> Tensor:
        """Let the rows attend to earlier rows and to one another."""
        read = []
        for user, query, new in self._of_each(queries, own):
            memory = user.row_memory
            memory.own[self.layer].copy_(new)
            bias = user.biases.of_rows(self.layer)
            read.append(attend(query, memory.keys[self.layer], memory.values[self.layer], bias))
        return _heads_together(read)

    def read_states(self, queries: Tensor, own: Tensor, attend: Attend) -> Tensor:
        """Ask the domain states; every event is its domain's newest state, history tokens none."""
        answers, layer = [], self._state_layer
        for user, query, new in self._of_each(queries, own):
            memory = user.state_memory
            assert memory is not None
            memory.own[layer].copy_(new)
            bias = user.biases.states[layer]
            answers.append(attend(query, memory.keys[layer], memory.values[layer], bias))
        answer = _heads_together(answers)
        return answer if self._tokens is None else answer.index_fill_(0, self._tokens, 0)

    def _of_each(self, queries: Tensor, own: Tensor) -> Iterable[tuple[_EagerPart, Tensor, Tensor]]:
        """Split (H, R, dqk) queries and (H, dqk + dv, R) keys and values by user."""
        sizes = self._sizes
        return zip(self._users, queries.split_with_sizes(sizes, 1), own.split_with_sizes(sizes, 2))


def _heads_together(parts: list[Tensor]) -> Tensor:
    """Join (H, r, dv) of each user to (R, H * dv)."""
    return torch.cat(parts, dim=1).transpose(0, 1).flatten(1)


class NativeMemory(_Memory[_UserPart]):
    """Reads the memories of all users by one call of a loop in C, users side by side on threads.

    It knows no history tokens. How the rows attend is the loop's own: with SiLU to rows, with
    softmax to states.

    Args:
        tables: biases of all layers.
        initial: (layers with DDSR, H, D, dqk + dv), keys and values of the initial states.
        users: rows of each user of the step.
        threads: how many there are for the users.
    """

    def __init__(
        self, tables: BiasTables, initial: Tensor, users: Sequence[NewRows], *, threads: int
    ) -> None:
        s = self._settings = tables.settings
        self._tables = tables
        self._kept: list[Tensor] = []
        self._users = [_UserPart(s, initial, rows) for rows in users]
        self._hidden = [
            hidden_states(rows, s.num_domains, s.states_per_domain) if s.ddsr else None
            for rows in users
        ]
        self._num_rows = sum(len(rows.item_ids) for rows in users)
        self._arguments = LIBRARY.arguments(
            users=self._laid_out(self._described()),
            rows=self._laid_out([number for rows in users for number in _numbers(rows)]),
            num_users=len(users),
            edges=bucket_edges(initial.device).data_ptr(),
            heads=s.num_heads,
            dqk=s.dqk,
            dv=s.dv,
            never_written=NUM_TIME_BUCKETS,
            threads=min(threads, len(users)),
        )

    def _laid_out(self, numbers: list[int]) -> int:
        """Keep numbers where the loops find them, and return the address."""
        self._kept.append(torch.tensor(numbers))
        return self._kept[-1].data_ptr()

    def _described(self) -> list[int]:
        """Return what the loops have to know of each user, see :data:`USER_FIELDS`."""
        described: list[int] = []
        row = 0
        for part, hidden in zip(self._users, self._hidden):
            rows, count = part.rows, len(part.rows.item_ids)
            states = 0 if part.states is None else part.states.shape[2]
            fields = {
                "memory": part.memory.data_ptr(),
                "times": rows.read[1].data_ptr(),
                "domains": rows.read[2].data_ptr(),
                "states": 0 if part.states is None else part.states.data_ptr(),
                "hidden": 0 if hidden is None else hidden.data_ptr(),
                "state_times": rows.user.state_times.data_ptr(),
                "layer_stride": part.memory.stride(0),
                "capacity": part.memory.stride(2),
                "first": rows.user.num_rows,
                "count": count,
                "writers": rows.num_writers,
                "is_virtual": rows.is_virtual,
                "row": row,
                "num_states": states,
                "states_in_memory": len(rows.user.state_times),
            }
            described += (fields[name] for name in USER_FIELDS)
            row += count
        return described

    def read_rows(self, queries: Tensor, own: Tensor, attend: Attend) -> Tensor:
        """Let the rows attend to earlier rows and to one another."""
        tables, given = self._tables, self._arguments
        given.positions = given.times = 0
        if tables.positions is not None and tables.times is not None:
            given.positions = tables.positions[self.layer].data_ptr()
            given.times = tables.times[self.layer].data_ptr()
            given.origin = tables.positions.shape[1] // 2
        runs = tables.runs.view(-1, self._settings.num_heads)
        given.runs = runs[self.layer if len(runs) > 1 else 0].data_ptr()
        return self._read(READ_ROWS, queries, own, self.layer)

    def read_states(self, queries: Tensor, own: Tensor, attend: Attend) -> Tensor:
        """Ask the domain states; every event is its domain's newest state."""
        ages, layer = self._tables.state_ages, self._state_layer
        self._arguments.ages = 0 if ages is None else ages[layer].data_ptr()
        return self._read(READ_STATES, queries, own, layer)

    def _read(self, function: str, queries: Tensor, own: Tensor, layer: int) -> Tensor:
        s, given = self._settings, self._arguments
        # Heads lie side by side in both; rows lie apart.
        assert queries.stride()[::2] == (s.dqk, 1)
        assert own.stride()[:2] == (s.dqk + s.dv, 1)
        out = queries.new_empty(self._num_rows, s.num_heads * s.dv)
        given.q, given.q_stride = queries.data_ptr(), queries.stride(1)
        given.own, given.own_stride = own.data_ptr(), own.stride(2)
        given.out, given.layer = out.data_ptr(), layer
        LIBRARY.run(function, given)
        return out


def _numbers(rows: NewRows) -> list[int]:
    """Return domain, target domain, position and next time of each row, one after the other."""
    count = len(rows.item_ids)
    times = rows.next_times + rows.next_times[-1:] * (count - len(rows.next_times))
    every = zip(rows.domains, rows.target_domains, rows.positions, times)
    return [number for row in every for number in row]


def loops_suit(settings: EncoderSettings) -> bool:
    """Return whether a model's memories are read by the loops in C: they hold, and can.

    Raises:
        HstuXdError: they do not hold, and the settings insist on them.
    """
    s = settings
    if s.impl not in ("auto", "native") or s.has_segments or LIBRARY.problem() is not None:
        return False
    use = KernelUse(
        "new_rows", torch.device("cpu"), torch.float32, s.num_heads, s.dqk, s.dv, True, "native"
    )
    return holds(use, _trial, insists=s.impl == "native")


def _trial(use: KernelUse, exact: bool) -> dict[str, Tensor]:
    """Let new rows of two users read drawn memories."""
    draw = torch.Generator().manual_seed(0)
    normal = partial(torch.randn, generator=draw)
    s = EncoderSettings(
        num_domains=2,
        norm_length=64,
        num_blocks=1,
        num_heads=use.heads,
        dqk=use.dqk,
        dv=use.dv,
        domain_mask=True,
        target_view_heads=use.heads // 2,
        ddsr=True,
    )
    tables = BiasTables.build(
        s,
        positions=normal(1, 127),
        times=normal(1, NUM_TIME_BUCKETS + 1),
        state_ages=normal(1, use.heads, NUM_TIME_BUCKETS + 1),
    )
    width, places = use.dqk + use.dv, s.num_domains * s.states_per_domain
    users = []
    for known in (37, 0):
        user = SimpleNamespace(
            memory=normal(1, use.heads, width, known + 3),
            num_rows=known,
            state_memory=normal(1, use.heads, places, width),
            state_times=torch.arange(places),
            state_counts=torch.tensor([min(known, 5), 0]),
        )
        read = torch.stack([torch.arange(known + 3) * step % limit for step, limit in _READ])
        read[:, -1] = read[:, -2]  # of two readers
        rows = NewRows(
            user, 1, [1, 1, 1], [known, known + 1, known + 1], read[2, known:].tolist(),
            [1, 0, 1], [9000, 9000], read,
        )  # fmt: skip
        users.append(rows)
    initial = normal(1, use.heads, 2, width)
    queries = normal(6, use.heads, use.dqk).transpose(0, 1)
    own = normal(6, use.heads, width).permute(1, 2, 0)
    kind = EagerMemory if exact else partial(NativeMemory, threads=1)
    memory = kind(tables, initial, users)
    return {
        "rows": memory.read_rows(queries, own, FusedLayer.attend),
        "states": memory.read_states(queries, own, FusedStates.attend),
    }


# Items, times and domains of the trial's rows: how each rises, and where it starts again.
_READ = ((1, 100), (100, 10_000), (1, 2))
