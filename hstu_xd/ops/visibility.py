"""How many query-key pairs an attention computes."""

import torch

from hstu_xd.ops.grouping import DomainGrouping
from hstu_xd.ops.row_tiles import ranks


def num_pairs(grouping: DomainGrouping) -> int:
    """Pairs of a query and a key that it sees: same group, key not after the query.

    Args:
        grouping: of the batch; a target view counts its own queries on its keys.

    Example:
        >>> grouping = DomainGrouping.from_jagged(
        ...     torch.tensor([0, 1, 0]), torch.tensor([0, 3]), 2
        ... )
        >>> num_pairs(grouping)
        4
    """
    keys = grouping.keys
    first = keys.offsets[:-1][grouping.group_of[grouping.permutation]]
    seen = torch.searchsorted(ranks(keys), ranks(grouping), right=True) - first
    return int(seen.clamp(min=0).sum())
