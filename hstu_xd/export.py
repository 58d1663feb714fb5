"""Export a trained encoder to places without this package.

The folder holds the full encoder as one torch.export program for any number of users and any
length, its weights, the vectors of all items, the catalogue and a manifest.
"""

import io
import json
import logging
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from hstu_xd.catalog import DomainCatalog
from hstu_xd.errors import HstuXdError, InputError
from hstu_xd.evaluation.protocol import Protocol
from hstu_xd.files import check_output, check_readable, replaced_folder, sha256_of
from hstu_xd.model.ddsr import attend_states_in_tiles
from hstu_xd.model.hstu import CrossDomainHSTU
from hstu_xd.objectives.objective import DotProduct
from hstu_xd.training.checkpoint import MODEL_FILE
from hstu_xd.training.run import load_trained
from hstu_xd.training.run_facts import read_run
from hstu_xd.version import __version__

_logger = logging.getLogger(__name__)

# The one check that an exported program keeps; torch has no public name for it.
_assert = torch._assert_async  # noqa: SLF001


class EncodeProgram(nn.Module):
    """What is traced: checks of the request that a graph can make, then the model.

    Args:
        model: whose attention implementation can be traced ("reference").
    """

    def __init__(self, model: CrossDomainHSTU) -> None:
        super().__init__()
        self.model = model

    def forward(self, item_ids: Tensor, timestamps: Tensor, target_domains: Tensor) -> Tensor:
        """See :meth:`CrossDomainHSTU.encode`, and :func:`export_encoder` for the inputs.

        Raises:
            RuntimeError: an unknown item or domain, padding before items, more events than the
                model's window, times out of order, or a request before the last event.
        """
        catalog, window = self.model.catalog, self.model.window
        known = _known_items(catalog, item_ids)
        _assert(known, f"item_ids: only 0..{catalog.num_items} that the catalogue has")
        present = item_ids != 0
        lengths = present.sum(1, keepdim=True)
        column = torch.arange(item_ids.shape[1], device=item_ids.device)
        in_place = present == (column < lengths)
        _assert(in_place.all(), "item_ids: padding (0) before a row's last item")
        _assert((lengths <= window).all(), f"item_ids: only the latest {window} events of a row")
        last = catalog.num_domains - 1
        inside = (target_domains >= 0) & (target_domains <= last)
        _assert(inside.all(), f"target_domains: only 0..{last}")
        falls = (timestamps < timestamps.roll(1, 1)) & present & (column > 0)
        _assert(~falls.any(), "timestamps: a row's events oldest first")
        latest = timestamps.gather(1, (lengths - 1).clamp(min=0)).squeeze(1)
        asked = _request_times(timestamps, lengths)
        given = asked != 0
        _assert(
            (~given | (asked >= latest)).all(),
            "timestamps: after a row's last event 0, or the time of the request, no earlier one",
        )
        times = torch.where(given, asked, latest)
        return self.model.encode_padded(item_ids, timestamps, target_domains, times)


def export_encoder(model: CrossDomainHSTU) -> ExportedProgram:
    """Trace a model.

    The program's call is ``encode(item_ids, timestamps, target_domains)``, with (B, N), (B, N) and
    (B,) int64, to (B, K) float32: :meth:`CrossDomainHSTU.encode` for any ``B >= 1`` and
    ``1 <= N <= norm_length``, within rounding. ``timestamps`` has the time of the request, too: in
    the first column of a row's padding, where 0, or no such column, stands for the time of the last
    event. Attention is the dense definition: memory grows with ``B H N^2``. A row without events
    gets zeros.

    Args:
        model: a trained model, with any attention implementation.

    Raises:
        InputError: the model cuts histories into segments.
    """
    settings = model.settings
    if settings.has_segments:
        raise InputError(
            f"the model cuts histories into segments by {settings.segment_by!r}: how many there "
            "are is data, and the sizes of an exported program are not; export a model trained "
            "with xd_encoder.segment_by = 'none'"
        )
    catalog = DomainCatalog(model.catalog.item_domains.cpu(), model.catalog.domain_names)
    traced = CrossDomainHSTU(
        catalog,
        replace(settings, impl="reference"),
        window=model.window,
        features=model.item_features,
    )
    # DDSR's tiles can be traced, too, and need far less memory than the definition.
    attend_states_in_tiles(traced)
    traced.load_state_dict(model.state_dict())
    traced.eval().requires_grad_(False)
    users, events = Dim("users", min=1), Dim("events", min=1, max=settings.norm_length)
    ids = torch.ones(2, min(3, settings.norm_length), dtype=torch.int64)
    with torch.no_grad():
        program = torch.export.export(
            EncodeProgram(traced),
            # Copies: a tensor given twice is traced as one input.
            (ids, ids.clone(), torch.zeros(2, dtype=torch.int64)),
            dynamic_shapes=({0: users, 1: events}, {0: users, 1: events}, {0: users}),
            strict=False,
        )
    for node in program.graph.nodes:
        # Paths of the machine that traced it.
        node.meta.pop("stack_trace", None)
    return program


def _known_items(catalog: DomainCatalog, item_ids: Tensor) -> Tensor:
    """() bool: every id is padding or an item of the catalogue."""
    nearest = item_ids.clamp(0, catalog.num_items)
    in_use = (catalog.item_domains[nearest] >= 0) | (nearest == 0)
    return ((nearest == item_ids) & in_use).all()


def _request_times(timestamps: Tensor, lengths: Tensor) -> Tensor:
    """(B,) what stands in the first column of each row's padding; 0 where there is none."""
    columns = timestamps.shape[1]
    padding = timestamps.gather(1, lengths.clamp(max=columns - 1))
    return torch.where((lengths > 0) & (lengths < columns), padding, 0).squeeze(1)


# 2: the program takes the time of the request, and refuses times that are out of order.
FORMAT_VERSION = 2
KIND = "hstu-xd export"
MANIFEST = "manifest.json"
PROGRAM = "encoder.pt2"
WEIGHTS = "model.safetensors"
ITEM_VECTORS = "item_vectors.pt"
CATALOG = "catalog.json"
FILES = (PROGRAM, WEIGHTS, ITEM_VECTORS, CATALOG, MANIFEST)


def write_export(
    run: Path, out: Path, *, force: bool = False, allow_imports: bool = False
) -> dict[str, Any]:
    """Export the best model of a run into a folder, which appears whole or not at all.

    Args:
        run: a folder written by ``hstu-xd train``.
        out: folder to write.
        force: replace an existing export; a folder that holds anything else is refused.
        allow_imports: import the modules that the run names beside this package.

    Returns:
        The manifest.

    Raises:
        InputError: not a run folder, a model that cannot be exported, or an existing output folder.
        HstuXdError: the folder cannot be written, or the run saved another model meanwhile.
    """
    check_output(out, force=force, ours=is_export, kind="hstu-xd export", parts=FILES)
    loaded = sha256_of(run / MODEL_FILE) if (run / MODEL_FILE).is_file() else None
    trained, facts = load_trained(run, allow_imports=allow_imports), read_run(run)
    model, scorer = trained.model, trained.scorer
    vectors = scorer.item_vectors if isinstance(scorer, DotProduct) else model.item_vectors
    if not isinstance(scorer, DotProduct):
        _logger.warning(
            "%s: its objective does not score by dot products; the export holds the vectors of "
            "users and items, and scoring them is left to you",
            run,
        )
    program = io.BytesIO()
    torch.export.save(export_encoder(model), program)
    with replaced_folder(out, force=force) as folder:
        (folder / PROGRAM).write_bytes(program.getbuffer())
        shutil.copyfile(run / MODEL_FILE, folder / WEIGHTS)
        (folder / ITEM_VECTORS).write_bytes(_item_vectors(vectors, model.catalog.num_items))
        _write_json(folder / CATALOG, describe_catalog(model.catalog))
        hashes = {name: sha256_of(folder / name) for name in FILES if name != MANIFEST}
        if hashes[WEIGHTS] != loaded:
            raise HstuXdError(
                f"{run} is being trained and has saved a better model meanwhile; export it again"
            )
        manifest = _manifest(model, facts, hashes)
        if not isinstance(scorer, DotProduct):
            manifest["scores"] = (
                f"by {facts['train']['objective']}, which is not exported; "
                + (manifest["scores"].partition("; ")[2])
            )
        _write_json(folder / MANIFEST, manifest)
    return manifest


def is_export(folder: Path) -> bool:
    """Whether a folder holds what :func:`write_export` wrote.

    Raises:
        InputError: the permission to read its manifest is denied.
    """
    check_readable(folder / MANIFEST)
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
def _item_vectors(item_vectors: Callable[[Tensor], Tensor], num_items: int) -> bytes:
    vectors = io.BytesIO()
    torch.save(item_vectors(torch.arange(num_items + 1)), vectors)
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
        "exclude_seen": Protocol.from_run(facts).exclude_seen,
        "settings": settings,
        "inputs": {
            "item_ids": f"(B, N) int64, N up to {longest}, oldest first, padded with 0 at the end; "
            "give the latest events, no more than the window, as in training",
            "timestamps": "(B, N) int64, in the log's unit, never falling from event to event; in "
            "the first column of a row's padding the time of the request, not before the last "
            "event, or 0 for that of the last event; anything in later columns",
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
