"""The interest stage: what the found events of a history say of a candidate, as a vector.

Events that all candidates of a request share are read once: N groups of C candidates and K events.
Where every candidate has its own events, C is 1. A user without events gets zeros.
"""

from hstu_xd.interest.din import DIN, MeanPool
from hstu_xd.interest.hstu_pooling import HSTUPooling
from hstu_xd.interest.settings import InterestSettings
from hstu_xd.interest.side_information import SideInformationTIN
from hstu_xd.interest.tin import TIN

__all__ = ["DIN", "TIN", "HSTUPooling", "InterestSettings", "MeanPool", "SideInformationTIN"]
