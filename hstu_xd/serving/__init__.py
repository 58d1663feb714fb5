"""Serving: states of users, updated by one event at a time, answering for any domain.

A session keeps them in memory; :mod:`hstu_xd.serving.stores` keeps them beyond it.
"""

from hstu_xd.serving.session import EncoderSession

__all__ = ["EncoderSession"]
