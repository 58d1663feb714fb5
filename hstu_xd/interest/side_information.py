"""Several TINs side by side, each weighing events by fields of its own (arXiv 2510.21714).

Stated there is that each attends with a subset of the fields and all use the fused value; the rest
is this project's. The control that counts is as many TINs that all attend with all fields: they
have the same parameters.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from hstu_xd.errors import InputError, did_you_mean
from hstu_xd.interest.positions import Positions
from hstu_xd.interest.settings import InterestSettings
from hstu_xd.interest.tin import target_attention

ALL = "all"


class SideInformationTIN(nn.Module):
    """Reads found events once for each group of fields; every TIN has places and gaps of its own.

    ``u_m = attention(q_m, k_m)`` with weights of the group's columns alone; the result is
    ``[u_1, u_1 * q_1, ..., u_M, u_M * q_M, c]``.

    Args:
        fields: width of each field of an event's vector, in order.
        settings: ``groups`` and switches.
        places: most events.
        goals: number of goals.
        std: of the tables' beginning.

    Attributes:
        out_features: width of the result.

    Raises:
        InputError: a group names a field that is not there, or one twice.
    """

    def __init__(
        self,
        fields: Mapping[str, int],
        settings: InterestSettings,
        *,
        places: int,
        goals: int,
        std: float,
    ) -> None:
        super().__init__()
        width = sum(fields.values())
        self._columns = [_columns(group, fields) for group in settings.groups]
        self._products = settings.target_product
        self.positions = nn.ModuleList(
            Positions(
                width,
                places,
                goals=goals if settings.goal_positions == "additive" else 0,
                rank=settings.rank_encoding,
                gap=settings.gap_encoding,
                std=std,
            )
            for _ in settings.groups
        )
        self.out_features = width * (1 + len(settings.groups) * (1 + self._products))

    def forward(
        self, candidates: Tensor, events: Tensor, mask: Tensor, buckets: Tensor, goals: Tensor
    ) -> Tensor:
        """Return what the events say of each candidate, see :meth:`TIN.forward`."""
        parts = []
        for positions, columns in zip(self.positions, self._columns, strict=True):
            assert isinstance(positions, Positions)
            query = positions.of_targets(candidates, goals)
            values = positions(events, buckets, goals)
            found = target_attention(query, values, mask, columns)
            parts += [found, found * query] if self._products else [found]
        return torch.cat([*parts, candidates], -1)


def _columns(group: str, fields: Mapping[str, int]) -> Tensor | None:
    """Return the columns of a group's fields; None for all of them."""
    if group == ALL:
        return None
    names = group.split("+")
    for name in names:
        if name not in fields:
            raise InputError(
                f"xd_interest.groups names {name!r}, which is no field"
                + (did_you_mean(name, fields).replace("; did", " (did") + ")" if name else "")
                + f"; there are {', '.join(fields)}, and {ALL!r}"
            )
        if names.count(name) > 1:
            raise InputError(f"xd_interest.groups: {group!r} names {name!r} twice; name it once")
    if set(names) == set(fields):
        return None
    own = [torch.full((width,), name in names) for name, width in fields.items()]
    return torch.cat(own).nonzero()[:, 0]
