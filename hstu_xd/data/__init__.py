"""Interaction logs: reading, filtering, ordering, and the prepared store that training maps."""

from hstu_xd.data.store import InteractionStore

__all__ = ["InteractionStore"]
