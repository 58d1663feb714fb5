"""Export a trained run to places without this package."""

from hstu_xd.export.encoder import export_encoder
from hstu_xd.export.folder import MANIFEST, describe_catalog, is_export, write_export
from hstu_xd.export.ranker import export_ranker

__all__ = [
    "MANIFEST",
    "describe_catalog",
    "export_encoder",
    "export_ranker",
    "is_export",
    "write_export",
]
