"""Serving: states of users, updated by one event at a time, answering for any domain."""

from hstu_xd.serving.session import EncoderSession

__all__ = ["EncoderSession"]
