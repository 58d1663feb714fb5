"""Interaction logs on disk, one class a file type, and the choice between them."""

from hstu_xd.data.sources.base import Record, Source
from hstu_xd.data.sources.detect import FORMATS, open_sources

__all__ = ["FORMATS", "Record", "Source", "open_sources"]
