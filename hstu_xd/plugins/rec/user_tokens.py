"""PerSRec's user tokens among the events of a history, by domain.

PerSRec's personalised models cut a history at fixed columns and lay learnable tokens there, the
same for all users. Behind a cut the events before it are hidden: the tokens have read them and
speak for them. So they are a user's whole past, and without a rule they would carry what other
domains' events say past the domain mask. The rule here is the one of this package's own history
tokens (:mod:`hstu_xd.model.rows`): under the domain mask a token stands once for each domain. The
copies have the same parameters and the same position. A domain's copy reads that domain's events
since the last cut, its copies before it and itself; that domain's later events read it, and no
others. So a domain's past is compressed inside the domain; what domains say to one another goes
through DDSR, whose states outlive a cut. Without the mask a token stands once and reads all.

A domain without an event before a cut has its tokens all the same, as in PerSRec a user has whose
history is too short to reach the cut: they stand for nothing, and are read. So with one domain, or
without the mask, events see exactly what they see in PerSRec.

Source: arXiv 2601.03479 (personalised tokens); a copy for each domain is this project's.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from hstu_xd.errors import InputError
from hstu_xd.model.settings import EncoderSettings
from hstu_xd.model.views import EncoderRows
from hstu_xd.ops.grouping import DomainGrouping, lazy_property
from hstu_xd.plugins.bridge import UnpaddedBatch
from hstu_xd.plugins.rec.cross_domain_mixin import CrossDomainMixin


@dataclass(frozen=True)
class TokenPlaces:
    """Where PerSRec lays user tokens into a padded history.

    Attributes:
        length: columns ``N`` of the history, without tokens.
        before: (T,) the column of the history that each token stands before, in rising order.
    """

    length: int
    before: tuple[int, ...]

    @classmethod
    def read(cls, config: Any, *, around_llm: bool) -> "TokenPlaces":
        """Read PerSRec's keys, which its models take on trust or assert.

        Args:
            config: REC's configuration, or a mapping like it: None for a key that is not there.
            around_llm: for PersonalizedHLLM, which cuts once and has no ``insert_method``.

        Raises:
            InputError: a key that is missing or out of range.
        """
        length, tokens, pretrained = (
            _count(config, name)
            for name in ("MAX_ITEM_LIST_LENGTH", "number_of_user_tokens", "pretrain_item_num")
        )
        if pretrained >= length:
            raise InputError(
                f"pretrain_item_num: {pretrained}; fewer than MAX_ITEM_LIST_LENGTH ({length}) are "
                "needed, for the tokens stand behind so many events and before at least one"
            )
        method = None if around_llm else config["insert_method"]
        if method is None:
            return cls(length, (pretrained,) * tokens)
        return cls(length, _inserted(method, tokens, length))


def _count(config: Any, name: str) -> int:
    value = config[name]
    if type(value) is not int or value < 1:
        raise InputError(
            f"{name}: {value!r}; PerSRec's personalised models need a whole number from 1 on, as "
            f"in --{name} 4"
        )
    return value


def _inserted(method: Any, tokens: int, length: int) -> tuple[int, ...]:
    """Spell pairs (column, number of tokens) out, one entry a token."""
    pairs = method if isinstance(method, list | tuple) else []
    if not pairs or not all(_is_pair(pair) for pair in pairs):
        raise InputError(
            f"insert_method: {method!r}; leave it out, to insert all tokens behind "
            "pretrain_item_num events (PerSRec's scripts give 0 for that, which its model cannot "
            "read), or give pairs of a column and a number of tokens in a yaml file, as in "
            "insert_method: [[8, 2], [16, 2]]"
        )
    columns, numbers = ([pair[i] for pair in pairs] for i in (0, 1))
    rising = all(low < high for low, high in zip([0, *columns], [*columns, length]))
    if not rising or min(numbers) < 1 or sum(numbers) != tokens:
        raise InputError(
            f"insert_method: {method!r}; columns that rise within 1..{length - 1} "
            "(MAX_ITEM_LIST_LENGTH - 1) and numbers from 1 on that add up to "
            f"number_of_user_tokens ({tokens}) are needed"
        )
    return tuple(column for column, number in pairs for _ in range(number))


def _is_pair(pair: Any) -> bool:
    return isinstance(pair, list | tuple) and [type(x) for x in pair] == [int, int]


class TokenSlots(nn.Module):
    """The columns of a padded history with the tokens in it: S of them, copies side by side.

    Nothing of it is in a state dict.

    Args:
        places: where tokens stand.
        copies: how often each stands: once for each of so many domains.

    Attributes:
        events: (S,) int64, column of the history that a slot holds; 0 for a token.
        tokens: (S,) int64, number of the token; -1 for an event.
        runs: (S,) int64, domain of a token's copy; 0 for an event.
        segments: (S,) int64, cuts before an event, or before the events that a token reads.
        columns: (S,) int64, PerSRec's column of the slot, of N + T: all copies share theirs.
        first: (N + T,) int64, slot of each of PerSRec's columns, of copies the first domain's.
        event_columns: (N,) int64, PerSRec's column of every column of the history.
    """

    events: Tensor
    tokens: Tensor
    runs: Tensor
    segments: Tensor
    columns: Tensor
    first: Tensor
    event_columns: Tensor

    def __init__(self, places: TokenPlaces, copies: int) -> None:
        super().__init__()
        self.copies, self.num_segments = copies, len(set(places.before)) + 1
        before = torch.tensor(places.before)
        cuts = before.unique()
        event, token = torch.arange(places.length), torch.arange(len(before))
        event_columns = event + (before <= event.unsqueeze(1)).sum(1)
        copied = token.repeat_interleave(copies)
        none = torch.zeros_like(event)
        columns = torch.cat([event_columns, (before + token)[copied]])
        order = columns.argsort(stable=True)
        slots = {
            "events": torch.cat([event, torch.zeros_like(copied)]),
            "tokens": torch.cat([none - 1, copied]),
            "runs": torch.cat([none, torch.arange(copies).repeat(len(before))]),
            "segments": torch.cat(
                [(cuts <= event.unsqueeze(1)).sum(1), (cuts < before.unsqueeze(1)).sum(1)[copied]]
            ),
            "columns": columns,
        }
        for name, of_slots in slots.items():
            self.register_buffer(name, of_slots[order], persistent=False)
        first = (self.runs == 0).nonzero().squeeze(1)
        self.register_buffer("first", first, persistent=False)
        self.register_buffer("event_columns", event_columns, persistent=False)

    @property
    def is_token(self) -> Tensor:
        """Tell which slots hold a token: (S,) bool."""
        return self.tokens >= 0

    def insert(self, padded: Tensor, of_tokens: Tensor | int) -> Tensor:
        """Lay what tokens have, (S,) or one value, among a history's columns: (B, N) -> (B, S)."""
        of_tokens = torch.as_tensor(of_tokens, dtype=padded.dtype, device=padded.device)
        return torch.where(self.is_token, of_tokens, padded[:, self.events])

    def rows(self, settings: EncoderSettings, batch: UnpaddedBatch) -> "TokenRows":
        """Build the rows of a batch: its valid events and all tokens of every user."""
        present = self.insert(batch.valid, 1)
        slots = present.flatten().nonzero().squeeze(1) % len(self.tokens)
        tokens = self.tokens[slots]
        event_rows = (tokens < 0).nonzero().squeeze(1)
        runs = self.runs[slots]
        if settings.domain_mask:
            runs = runs.index_copy(0, event_rows, batch.events.domains)
        return TokenRows(
            settings,
            batch.events,
            tokens=tokens,
            runs=runs,
            cut=self.segments[slots],
            event_rows=event_rows,
            offsets=pad(present.sum(1).cumsum(0), (1, 0)),
            num_runs=self.copies,
            num_segments=self.num_segments,
        )


@dataclass(frozen=True, eq=False, kw_only=True)
class TokenRows(EncoderRows):
    """The events of a batch and the tokens among them, and what each of these rows reads.

    A row reads the events of its own segment and the tokens of all earlier ones, of its run. A
    run is a domain under the domain mask, else everything.

    Attributes:
        tokens: (L',) int64, number of the token that a row is; -1 for an event.
        runs: (L',) int64, run of every row.
        cut: (L',) int64, segment of an event, and of the events that a token reads.
        event_rows: (L,) int64, row of every event.
        offsets: (B + 1,) int64, rows of every user.
        num_runs: of a user.
        num_segments: of a user.
    """

    tokens: Tensor
    runs: Tensor
    cut: Tensor
    event_rows: Tensor
    offsets: Tensor
    num_runs: int
    num_segments: int

    @lazy_property
    def everything(self) -> Sequence[DomainGrouping]:
        """Return the groupings by which every row reads its run, the only one without the mask."""
        return self._reading(self.runs)

    @lazy_property
    def own(self) -> Sequence[DomainGrouping]:
        """Return the groupings by which every row reads the run of its own domain."""
        return self._reading(self.runs)

    @lazy_property
    def target(self) -> Sequence[DomainGrouping]:
        """Return the groupings by which events read the run they predict, tokens their own."""
        return self._reading(self.runs.index_copy(0, self.event_rows, self.events.target_domains))

    def _reading(self, read: Tensor) -> list[DomainGrouping]:
        """Build the groupings by which rows read runs, (L',) int64; the last group is not read."""
        is_token, unread = self.tokens >= 0, self.num_segments * self.num_runs
        base = self.cut * self.num_runs
        events = DomainGrouping.from_jagged(
            (base + self.runs).masked_fill(is_token, unread), self.offsets, unread + 1
        )
        tokens = DomainGrouping.from_jagged(
            self.runs.masked_fill(~is_token, self.num_runs), self.offsets, self.num_runs + 1
        )
        return [events.target_view(base + read), tokens.target_view(read)]

    def lay_out(self, entries: Tensor, history_tokens: Tensor | None) -> Tensor:
        """Bring events and tokens into the order of rows: (L, K), (T, K) float -> (L', K)."""
        assert history_tokens is not None
        rows = history_tokens.to(entries.dtype)[self.tokens.clamp(min=0)]
        return rows.index_copy(0, self.event_rows, entries)

    def take_entries(self, x: Tensor) -> Tensor:
        """Take the rows of the events: (L', W) -> (L, W)."""
        return x.index_select(0, self.event_rows)

    def spread_entries(self, x: Tensor) -> Tensor:
        """Put events into their rows, zeros into those of tokens: (L, W) -> (L', W)."""
        rows = x.new_zeros(len(self.tokens), x.shape[1])
        return rows.index_copy(0, self.event_rows, x)


class UserTokenMixin(CrossDomainMixin):
    """What this package's personalised models share: where tokens stand, and no cached tokens.

    PerSRec can also compress a history into the keys and values of its tokens and predict from
    these. Its trainer never calls that path, and so no metric speaks for it: there HSTU divides
    attention by other lengths than in training, and HLLM adds 1 to the scores of the tokens.
    """

    _xd_places: TokenPlaces
    _xd_slots: TokenSlots

    def _xd_add_slots(self) -> None:
        settings = self._xd_encoder_settings
        copies = settings.num_domains if settings.domain_mask else 1
        self._xd_slots = TokenSlots(self._xd_places, copies)

    def _xd_refuse_cache(self, method: str) -> None:
        """Refuse a method of PerSRec's that reads cached tokens, with anything on.

        Raises:
            InputError: says what to call.
        """
        if not self._xd_is_plain:
            raise InputError(
                f"{method}: {self._xd_model} with a switch on has no cached tokens; call predict, "
                "as PerSRec's trainer does"
            )
