"""The search stage: which events of a long history say something of a candidate.

``recent`` takes the latest events and is the control, ``hard`` the events nearest in the taxonomy,
over an exact index, ``soft`` those that a model scores highest. All functions take histories laid
end to end and candidates in one row each; padding, -1, appears in results only.
"""

from hstu_xd.search.found import Found
from hstu_xd.search.hard import HardIndex
from hstu_xd.search.recent import search_recent

__all__ = ["Found", "HardIndex", "search_recent"]
