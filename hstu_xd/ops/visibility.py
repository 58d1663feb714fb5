"""Who sees whom in domain attention, written once; masks, tiles and counts all follow from it.

The rule: a query sees the keys of its own group (of one user and one domain) whose position is not
after its own. Positions rise in every group, so a query sees a prefix of its group's keys, and an
implementation has to know only where the prefix ends. Kernels have the rule for the pairs of a tile
in ``triton_kernels.sees``; the eager walk reads it off the sign of a difference of positions where
it has one at hand.

A grouping may hold a narrower rule, ``grouping.rule``, by which a query sees fewer keys: a sliding
window, a sink, what a search has found. It is a function of pairs of tokens, written where the
grouping is built; no operator changes. Prefixes are bounds then, "auto" computes it, and
implementations that cannot follow it refuse it.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from hstu_xd.ops.grouping import DomainGrouping, PairRule


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
