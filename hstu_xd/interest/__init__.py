"""The interest stage: what the found events of a history say of a candidate, as a vector.

Events that all candidates of a request share are read once: N groups of C candidates and K events.
Where every candidate has its own events, C is 1. A user without events gets zeros.
"""

from collections.abc import Mapping

from hstu_xd.interest.din import DIN, MeanPool
from hstu_xd.interest.hstu_pooling import HSTUPooling
from hstu_xd.interest.settings import InterestSettings
from hstu_xd.interest.side_information import SideInformationTIN
from hstu_xd.interest.tin import TIN

__all__ = [
    "DIN",
    "TIN",
    "HSTUPooling",
    "InterestSettings",
    "MeanPool",
    "SideInformationTIN",
    "interest_of",
]


def interest_of(
    settings: InterestSettings,
    fields: Mapping[str, int],
    *,
    places: int,
    goals: int,
    std: float,
) -> MeanPool | DIN | HSTUPooling | TIN | SideInformationTIN | None:
    """Make what reads the events; None where none are read.

    Args:
        settings: of the stage.
        fields: width of each field of an event's vector, in order.
        places: most events.
        goals: number of goals.
        std: of the tables' beginning.
    """
    width = sum(fields.values())
    if settings.kind == "none":
        return None
    if settings.kind == "mean":
        return MeanPool(width)
    if settings.kind == "din":
        return DIN(width, settings.hidden)
    if settings.kind == "hstu":
        return HSTUPooling(width, settings, places=places, std=std)
    if settings.groups:
        return SideInformationTIN(fields, settings, places=places, goals=goals, std=std)
    return TIN(width, settings, places=places, goals=goals, std=std)
