"""The regrouping plan of a batch, and who sees whom in it: masks, tiles and counts follow from it.

One stable sort makes every (user, domain) run contiguous. Plain causal attention inside each run
*is* the domain-masked attention, at a cost of ``sum_d s_d^2`` instead of ``S^2``. The plan is built
once a batch and shared by all layers.

The rule of visibility is written here once: a query sees the keys of its own group (of one user and
one domain) whose position is not after its own. Positions rise in every group, so a query sees a
prefix of its group's keys, and an implementation has to know only where the prefix ends. Kernels
have the rule for the pairs of a tile in ``triton_kernels.sees``; the eager walk reads it off the
sign of a difference of positions where it has one at hand.

A grouping may hold a narrower rule, ``grouping.rule``, by which a query sees fewer keys: a sliding
window, a sink, what a search has found. It is a function of pairs of tokens, written where the
grouping is built; no operator changes. Prefixes are bounds then, "auto" computes it, and
implementations that cannot follow it refuse it.

A grouping may ask for some tokens alone, ``grouping.asking(...)``: its queries are then those
tokens, numbered from 0, and its keys are those of the groups that they read, numbered likewise.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from hstu_xd.errors import InputError

T = TypeVar("T")

# Of keys, the share that is worth taking alone; to leave a few out costs more than they do.
_MOST_READ = 0.9

# Tokens of queries and of keys, int64 of shapes that broadcast -> bool, whether the query may see
# the key. Later keys and those of other groups stay hidden, whatever it says of them.
PairRule = Callable[[Tensor, Tensor], Tensor]


class lazy_property(Generic[T]):
    """``functools.cached_property`` that ``torch.compile`` can trace.

    The standard one takes a lock before Python 3.12. While a graph is traced nothing is kept, as a
    graph cannot hand frozen dataclasses on; what it then computes twice its compiler merges. What
    is first asked for in inference mode serves a later training, too.
    """

    def __init__(self, compute: Callable[[Any], T]) -> None:
        self._compute = compute
        self._name = compute.__name__
        self.__doc__ = compute.__doc__

    def __get__(self, instance: Any, owner: type | None = None) -> T:
        if torch.compiler.is_dynamo_compiling():
            return self._compute(instance)
        with outside_inference_mode():
            value = self._compute(instance)
        # Kept in the instance, where the next look-up finds it before this descriptor.
        instance.__dict__[self._name] = value
        return value


def outside_inference_mode() -> AbstractContextManager[object]:
    """Return where to compute what is kept: autograd saves no tensors of inference mode."""
    return torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext()


@dataclass(frozen=True)
class DomainGrouping:
    """Tokens of a jagged batch, grouped by (user, domain), positions rising in every group.

    Group ``g = user * num_domains + domain`` holds the grouped tokens
    ``offsets[g]:offsets[g + 1]``; grouped token ``r`` is token ``permutation[r]`` of the batch.

    Attributes:
        permutation: (L,) int64, grouped order -> batch order.
        offsets: (B * num_domains + 1,) int64.
        positions: (L,) int64, each batch token's position in its user's history, from 0.
        batch_offsets: (B + 1,) int64, the batch's own offsets.
        num_domains: number of domains ``D``.
        key_grouping: for a target view, and where some tokens alone are queries, the grouping of
            the keys that these queries read; None when queries and keys are grouped alike.
        padded_length: tokens of every user where all have as many, so that sizes follow from shapes
            alone; else None.
        rule: narrows what a query sees of its group, see :mod:`hstu_xd.ops.grouping`; None where
            it sees all keys that are not later.
        asked: where it groups some of the batch's tokens alone, which; else None. ``L`` above is
            then their number, and a "token" is a place among them, see :meth:`asking`.
    """

    permutation: Tensor
    offsets: Tensor
    positions: Tensor
    batch_offsets: Tensor
    num_domains: int
    key_grouping: "DomainGrouping | None" = None
    padded_length: int | None = None
    rule: PairRule | None = None
    asked: "AskedTokens | None" = None

    @classmethod
    def from_jagged(
        cls, domains: Tensor, offsets: Tensor, num_domains: int, padded_length: int | None = None
    ) -> "DomainGrouping":
        """Group the tokens of each user by domain.

        Args:
            domains: (L,) int64, domain id of every token, ``0..num_domains - 1``.
            offsets: (B + 1,) int64, user ``b`` owns tokens ``offsets[b]:offsets[b + 1]``.
            num_domains: number of domains ``D``.
            padded_length: tokens of every user, if all have as many and that is known.

        Returns:
            The plan. Nothing in it loops over users or domains.

        Raises:
            InputError: wrong shape or dtype, offsets that do not rise from 0 to L, or a domain
                id out of range (the last two are checked on CPU only, where it costs no
                synchronisation, and not in compiled code).

        Example:
            >>> domains, offsets = torch.tensor([1, 0, 1, 0]), torch.tensor([0, 3, 4])
            >>> DomainGrouping.from_jagged(domains, offsets, 2).permutation.tolist()
            [1, 0, 2, 3]

        Source: arXiv 2508.20945, intra-domain attention; the exact regrouping is this project's.
        """
        _check(domains, offsets, num_domains)
        length, users = domains.numel(), offsets.numel() - 1
        owner = torch.repeat_interleave(
            torch.arange(users, device=domains.device), offsets.diff(), output_size=length
        )
        positions = torch.arange(length, device=domains.device) - offsets[owner]
        group = owner * num_domains + domains
        counts = torch.zeros(users * num_domains, dtype=torch.int64, device=domains.device)
        counts.scatter_add_(0, group, torch.ones_like(group))
        return cls(
            permutation=torch.argsort(group, stable=True),
            offsets=pad(counts.cumsum(0), (1, 0)),
            positions=positions,
            batch_offsets=offsets,
            num_domains=num_domains,
            padded_length=padded_length,
        )

    @classmethod
    def single(
        cls, offsets: Tensor, length: int, padded_length: int | None = None
    ) -> "DomainGrouping":
        """Put all domains of a user into one group: the full attention of plain HSTU."""
        domains = torch.zeros(length, dtype=torch.int64, device=offsets.device)
        return cls.from_jagged(domains, offsets, 1, padded_length)

    def target_view(self, target_domains: Tensor) -> "DomainGrouping":
        """Build the grouping under which every query reads its *target* domain's run.

        Query ``i`` attends to the keys ``{j <= i : d_j = target_domains[i]}``.

        Args:
            target_domains: (L,) int64, the domain of each token's next item.
        """
        queries = DomainGrouping.from_jagged(target_domains, self.batch_offsets, self.num_domains)
        return DomainGrouping(
            permutation=queries.permutation,
            offsets=queries.offsets,
            positions=queries.positions,
            batch_offsets=queries.batch_offsets,
            num_domains=self.num_domains,
            key_grouping=self,
            padded_length=self.padded_length,
            rule=self.rule,
        )

    def asking(self, tokens: Tensor) -> "DomainGrouping":
        """Build the grouping in which some tokens alone are queries, and what they read is keys.

        Args:
            tokens: (Q,) int64, in any order, each once: query ``i`` of operators is token
                ``tokens[i]``, and row ``i`` of what they return is its. Key ``j`` is token
                ``keys.asked.tokens[j]``, or token ``j`` where nearly all are read.

        Raises:
            InputError: a token twice (checked on CPU only, where it costs no wait).

        Example:
            >>> domains, offsets = torch.tensor([1, 0, 1]), torch.tensor([0, 3])
            >>> asked = DomainGrouping.from_jagged(domains, offsets, 2).asking(torch.tensor([2]))
            >>> asked.offsets.tolist(), asked.positions.tolist(), asked.keys.of_tokens(domains)
            ([0, 0, 1], [2], tensor([1, 1]))
        """
        if tokens.device.type == "cpu" and tokens.unique().numel() != tokens.numel():
            raise InputError(
                f"{tokens.numel()} tokens are asked for, {tokens.unique().numel()} different ones; "
                "name each once, and index what comes back"
            )
        queries, keys = self.some(tokens), self.keys
        (read,) = torch.nonzero((queries.lengths > 0)[keys.group_of], as_tuple=True)
        if read.numel() <= _MOST_READ * keys.num_tokens:
            keys = keys.some(read)
        rule = self.rule and _rule_of(self.rule, queries, keys)
        return replace(queries, key_grouping=keys, rule=rule)

    def some(self, tokens: Tensor) -> "DomainGrouping":
        """Group some of the tokens alone: (n,) int64, each once, which are numbered from 0."""
        group, positions = self.group_of[tokens], self.positions[tokens]
        counts = torch.zeros_like(self.lengths).scatter_add_(0, group, torch.ones_like(group))
        return replace(
            self,
            permutation=torch.argsort(self._rank(group, positions), stable=True),
            offsets=pad(counts.cumsum(0), (1, 0)),
            positions=positions,
            asked=AskedTokens(tokens, self),
        )

    @property
    def keys(self) -> "DomainGrouping":
        """The grouping of the keys: this one, or ``key_grouping`` where it is another one."""
        return self if self.key_grouping is None else self.key_grouping

    def of_tokens(self, values: Tensor) -> Tensor:
        """Take what its tokens have of what all tokens of the batch have: (L, ...) -> (Q, ...)."""
        return values if self.asked is None else values[self.asked.tokens]

    @property
    def num_tokens(self) -> int:
        """Number of tokens ``L`` in the batch, or of those of them that are grouped."""
        return self.permutation.numel()

    @lazy_property
    def longest(self) -> int:
        """Tokens of the longest history; unless all are padded to it, the host reads lengths."""
        if self.padded_length is not None:
            return self.padded_length
        lengths = self.batch_offsets.diff()
        return int(lengths.max()) if lengths.numel() else 0

    @lazy_property
    def inverse(self) -> Tensor:
        """(L,) int64, batch order -> grouped order."""
        inverse = torch.empty_like(self.permutation)
        inverse[self.permutation] = torch.arange(self.num_tokens, device=inverse.device)
        return inverse

    @lazy_property
    def lengths(self) -> Tensor:
        """(B * num_domains,) int64, tokens in every group; 0 where a user never met a domain."""
        return self.offsets.diff()

    @lazy_property
    def group_of(self) -> Tensor:
        """(L,) int64, the group of every batch token."""
        groups = torch.arange(self.lengths.numel(), device=self.offsets.device)
        grouped = torch.repeat_interleave(groups, self.lengths, output_size=self.num_tokens)
        return grouped[self.inverse]

    @lazy_property
    def domains(self) -> Tensor:
        """(L,) int64, the domain of every batch token."""
        return self.group_of % self.num_domains

    def first_row(self, group: Tensor, position: Tensor) -> Tensor:
        """Return the first row, in grouped order, of a group's tokens from a position on.

        Args:
            group: (n,) int64.
            position: (n,) int64, from 0 to the number of tokens.

        Returns:
            (n,) int64, the group's end where it has no such token.
        """
        return torch.searchsorted(self._ranks, self._rank(group, position))

    @lazy_property
    def _ranks(self) -> Tensor:
        """Give rows in grouped order numbers that rise by group, then by position: (L,) int64."""
        groups = torch.arange(self.lengths.numel(), device=self.offsets.device)
        owner = torch.repeat_interleave(groups, self.lengths, output_size=self.num_tokens)
        return self._rank(owner, self.positions[self.permutation])

    def _rank(self, group: Tensor, position: Tensor) -> Tensor:
        # No position of the batch is larger, whichever of its tokens are here.
        bound = (self if self.asked is None else self.asked.whole).num_tokens
        return group * (bound + 1) + position.clamp(0, bound)


class AskedTokens(NamedTuple):
    """Which tokens are grouped: (Q,) int64 ``tokens``, and the grouping ``whole`` of all."""

    tokens: Tensor
    whole: DomainGrouping


def _rule_of(rule: PairRule, queries: DomainGrouping, keys: DomainGrouping) -> PairRule:
    """Let a rule of all tokens know those of two groupings by their places in them."""
    asking, read = (
        torch.arange(x.num_tokens, device=x.permutation.device)
        if x.asked is None
        else x.asked.tokens
        for x in (queries, keys)
    )
    return lambda query, key: rule(asking[query], read[key])


def _check(domains: Tensor, offsets: Tensor, num_domains: int) -> None:
    for name, tensor in (("domains", domains), ("offsets", offsets)):
        if tensor.ndim != 1 or tensor.dtype != torch.int64:
            raise InputError(
                f"{name} is {tensor.dtype} of shape {tuple(tensor.shape)}; a vector of "
                f"torch.int64 is needed: call {name}.long() or flatten it"
            )
    if num_domains < 1:
        raise InputError(f"num_domains is {num_domains}; at least 1 is needed")
    if offsets.numel() < 1:
        raise InputError("offsets is empty; B + 1 entries are needed, beginning with 0")
    if domains.device.type != "cpu" or torch.compiler.is_compiling():
        return
    if offsets[0] != 0 or offsets[-1] != domains.numel() or bool((offsets.diff() < 0).any()):
        raise InputError(
            f"offsets must rise from 0 to the number of tokens ({domains.numel()}), got "
            f"{offsets[:4].tolist()}...{offsets[-2:].tolist()}"
        )
    if domains.numel() and (int(domains.min()) < 0 or int(domains.max()) >= num_domains):
        raise InputError(
            f"domains holds ids {int(domains.min())}..{int(domains.max())}; with "
            f"num_domains={num_domains} they must lie in 0..{num_domains - 1}"
        )


def is_later(query_position: Tensor, key_position: Tensor) -> Tensor:
    """Return where a key comes after the query, so that the query must not see it."""
    return key_position > query_position


def pair_rule(grouping: DomainGrouping) -> PairRule:
    """Build the function that tells whether queries see keys, pair by pair.

    Args:
        grouping: of the batch; in a target view queries and keys are grouped differently.

    Returns:
        Of tokens of queries and of keys, int64 of shapes that broadcast -> bool.

    Example:
        >>> sees = pair_rule(DomainGrouping.single(torch.tensor([0, 2]), 2))
        >>> sees(torch.arange(2).unsqueeze(1), torch.arange(2))
        tensor([[ True, False],
                [ True,  True]])
    """
    query_groups, query_positions = grouping.group_of, grouping.positions
    key_groups, key_positions = grouping.keys.group_of, grouping.keys.positions
    narrower = grouping.rule

    def sees(query: Tensor, key: Tensor) -> Tensor:
        seen = (query_groups[query] == key_groups[key]) & ~is_later(
            query_positions[query], key_positions[key]
        )
        return seen if narrower is None else seen & narrower(query, key)

    return sees


def seen_end(grouping: DomainGrouping, group: Tensor, query_position: Tensor) -> Tensor:
    """Return the end of the prefix of keys that a query at ``query_position`` of ``group`` sees.

    It is a row of the keys in grouped order; the prefix begins at ``keys.offsets[group]``.
    """
    return grouping.keys.first_row(group, query_position + 1)


def seeing_start(grouping: DomainGrouping, group: Tensor, key_position: Tensor) -> Tensor:
    """Return the first row of ``group``'s queries that see a key at ``key_position``.

    All later queries of the group see that key, too: this is :func:`seen_end` from the other side.
    """
    return grouping.first_row(group, key_position)


def seen_keys(grouping: DomainGrouping) -> Tensor:
    """Return the length of the prefix of keys that each token sees as a query: (L,) int64."""
    group = grouping.group_of
    return seen_end(grouping, group, grouping.positions) - grouping.keys.offsets[group]


def num_pairs(grouping: DomainGrouping) -> int:
    """Count the pairs of a query and a key that it sees.

    Args:
        grouping: of the batch; a target view counts its own queries on its keys.

    Example:
        >>> grouping = DomainGrouping.from_jagged(
        ...     torch.tensor([0, 1, 0]), torch.tensor([0, 3]), 2
        ... )
        >>> num_pairs(grouping)
        4
    """
    seen = seen_keys(grouping)
    if grouping.rule is None:
        return int(seen.sum())
    # Every pair inside a prefix, one by one.
    query = torch.repeat_interleave(seen)
    keys = grouping.keys
    start = keys.offsets[grouping.group_of[query]]
    rank = torch.arange(query.numel(), device=query.device) - (seen.cumsum(0) - seen)[query]
    return int(grouping.rule(query, keys.permutation[start + rank]).sum())


def replacements(grouping: DomainGrouping, states_per_domain: int) -> Tensor:
    """Return the first token that no longer sees each token's state in DDSR.

    A state is seen from the token that writes it until the ``M``-th visit after its own.

    Args:
        grouping: the batch by (user, domain).
        states_per_domain: latest states ``M`` of each domain that a token sees.

    Returns:
        (L,) int64; the end of the user's history where no visit replaces a state.
    """
    length, num_domains = grouping.num_tokens, grouping.num_domains
    rows = torch.arange(length, device=grouping.permutation.device)
    groups = torch.arange(grouping.offsets.numel() - 1, device=rows.device)
    group = torch.repeat_interleave(groups, grouping.offsets.diff(), output_size=length)
    visit = rows + states_per_domain
    token = pad(grouping.permutation, (0, 1))[visit.clamp(max=length)]
    end = grouping.batch_offsets[group // num_domains + 1]
    token = torch.where(visit < grouping.offsets[group + 1], token, end)
    return torch.empty_like(token).scatter_(0, grouping.permutation, token)
