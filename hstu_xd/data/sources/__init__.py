"""Interaction logs on disk, one class a file type, and the choice between them."""

from hstu_xd.data.sources.base import Record, Source
from hstu_xd.data.sources.detect import FORMATS, ReadOptions, open_sources

__all__ = ["FORMATS", "ReadOptions", "Record", "Source", "open_sources"]
