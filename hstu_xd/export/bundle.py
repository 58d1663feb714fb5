"""The folder of an exported run: program, weights, item vectors, catalogue, manifest."""

import io
import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from hstu_xd import __version__
from hstu_xd.catalog import DomainCatalog
from hstu_xd.data.folder import check_output, replaced_folder, sha256_of
from hstu_xd.export.program import export_encoder
from hstu_xd.model import CrossDomainHSTU
from hstu_xd.training.checkpoint import MODEL_FILE
from hstu_xd.training.run import load, read_run

FORMAT_VERSION = 1
KIND = "hstu-xd export"
MANIFEST = "manifest.json"
PROGRAM = "encoder.pt2"
WEIGHTS = "model.safetensors"
ITEM_VECTORS = "item_vectors.pt"
CATALOG = "catalog.json"


def write_export(run: Path, out: Path, *, force: bool = False) -> dict[str, Any]:
    """Export the best model of a run into a folder, which appears whole or not at all.

    Args:
        run: a folder written by ``hstu-xd train``.
        out: folder to write.
        force: replace an existing export.

    Returns:
        The manifest.

    Raises:
        InputError: not a run folder, a model that cannot be exported, or an existing output folder.
        HstuXdError: the folder cannot be written.
    """
    check_output(out, force=force, ours=is_export, kind="hstu-xd export")
    model, facts = load(run), read_run(run)
    program = io.BytesIO()
    torch.export.save(export_encoder(model), program)
    with replaced_folder(out) as folder:
        (folder / PROGRAM).write_bytes(program.getbuffer())
        shutil.copyfile(run / MODEL_FILE, folder / WEIGHTS)
        (folder / ITEM_VECTORS).write_bytes(_item_vectors(model))
        _write_json(folder / CATALOG, describe_catalog(model.catalog))
        files = (PROGRAM, WEIGHTS, ITEM_VECTORS, CATALOG)
        hashes = {name: sha256_of(folder / name) for name in files}
        manifest = _manifest(model, facts, hashes)
        _write_json(folder / MANIFEST, manifest)
    return manifest


def is_export(folder: Path) -> bool:
    """Whether a folder holds what :func:`write_export` wrote."""
    try:
        return json.loads((folder / MANIFEST).read_bytes())["kind"] == KIND
    except (OSError, ValueError, KeyError, TypeError):
        return False


def describe_catalog(catalog: DomainCatalog) -> dict[str, Any]:
    """Domains with the ids of their items as [first, last] ranges, and the token of every id."""
    holes = (catalog.item_domains < 0).tolist()
    return {
        "domains": [
            {"id": domain, "name": name, "items": _ranges(catalog.items_of(domain).tolist())}
            for domain, name in enumerate(catalog.domain_names)
        ],
        "tokens": [None if hole else catalog.token(item) for item, hole in enumerate(holes)],
    }


def _ranges(ids: list[int]) -> list[list[int]]:
    """Rising ids as [first, last] pairs."""
    ranges: list[list[int]] = []
    for item in ids:
        if ranges and ranges[-1][1] == item - 1:
            ranges[-1][1] = item
        else:
            ranges.append([item, item])
    return ranges


@torch.no_grad()
def _item_vectors(model: CrossDomainHSTU) -> bytes:
    vectors = io.BytesIO()
    torch.save(model.item_vectors(torch.arange(model.catalog.num_items + 1)), vectors)
    return vectors.getvalue()


def _manifest(
    model: CrossDomainHSTU, facts: Mapping[str, Any], hashes: dict[str, str]
) -> dict[str, Any]:
    settings = asdict(model.settings)
    del settings["impl"]  # a matter of this package
    longest, width = model.settings.norm_length, model.settings.embedding_dim
    return {
        "kind": KIND,
        "format_version": FORMAT_VERSION,
        "version": __version__,
        "torch": torch.__version__,
        "run": {name: facts[name] for name in ("variant_name", "seed", "data_hashes")},
        "window": facts["max_sequence_length"],
        "settings": settings,
        "inputs": {
            "item_ids": f"(B, N) int64, N up to {longest}, oldest first, padded with 0 at the end; "
            "give the latest events, as many as the window, as in training",
            "timestamps": "(B, N) int64, in the log's unit; anything at padding",
            "target_domains": "(B,) int64, id of the domain to recommend from",
        },
        "outputs": {
            "user_vectors": f"(B, {width}) float32 of length 1; zeros for a row of padding alone",
        },
        "scores": f"user_vectors @ item_vectors.T; {ITEM_VECTORS}: "
        f"({model.catalog.num_items + 1}, {width}) float32, row = item id",
        "hashes": hashes,
    }


def _write_json(file: Path, content: dict[str, Any]) -> None:
    text = json.dumps(content, indent=1, ensure_ascii=False)
    file.write_text(text + "\n", encoding="utf-8")
