"""The folder of an export, which appears whole or not at all.

It holds what scores as a torch.export program for any number of users, the weights, the vectors of
all items, the catalogue and a manifest; of a ranker also the levels at which its search matches.
"""

import io
import json
import logging
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from hstu_xd.catalog import DomainCatalog
from hstu_xd.errors import HstuXdError
from hstu_xd.evaluation.protocol import RANKING, Protocol
from hstu_xd.export.encoder import export_encoder
from hstu_xd.export.ranker import export_ranker, how_to_find, inputs_of
from hstu_xd.files import check_output, check_readable, replaced_folder, sha256_of
from hstu_xd.model.hstu import CrossDomainHSTU
from hstu_xd.objectives.objective import DotProduct
from hstu_xd.ranking.run import ServedRanker, open_store
from hstu_xd.ranking.towers import TowerRanker
from hstu_xd.training.checkpoint import MODEL_FILE
from hstu_xd.training.run import load_trained
from hstu_xd.training.run_facts import kind_of, read_run
from hstu_xd.version import __version__

_logger = logging.getLogger(__name__)

# 2: the program takes the time of the request, and refuses times that are out of order.
FORMAT_VERSION = 2
RANKING_FORMAT_VERSION = 1
KIND = "hstu-xd export"
MANIFEST = "manifest.json"
PROGRAM = "encoder.pt2"
RANKER_PROGRAM = "ranker.pt2"
TOWERS_PROGRAM = "towers.pt2"
WEIGHTS = "model.safetensors"
ITEM_VECTORS = "item_vectors.pt"
LEVELS = "levels.pt"
CATALOG = "catalog.json"
PROGRAMS = (PROGRAM, RANKER_PROGRAM, TOWERS_PROGRAM)
FILES = (*PROGRAMS, WEIGHTS, ITEM_VECTORS, LEVELS, CATALOG, MANIFEST)


@dataclass(frozen=True)
class _Export:
    """What is written of a run beside its weights.

    Attributes:
        name: of the program's file.
        program: what scores.
        item_vectors: ids of items to their vectors.
        catalog: of the items.
        levels: (I + 1, H + 1) int64 nodes of the items; None where nothing is searched by them.
        manifest: all but the hashes.
    """

    name: str
    program: ExportedProgram
    item_vectors: Callable[[Tensor], Tensor]
    catalog: DomainCatalog
    levels: Tensor | None
    manifest: dict[str, Any]


def write_export(
    run: Path, out: Path, *, force: bool = False, allow_imports: bool = False
) -> dict[str, Any]:
    """Export the best model of a run into a folder, which appears whole or not at all.

    Args:
        run: a folder written by ``hstu-xd train`` or ``hstu-xd rank``.
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
    if kind_of(read_run(run)) == RANKING:
        export = _of_ranking(run)
    else:
        export = _of_retrieval(run, allow_imports=allow_imports)
    program = io.BytesIO()
    torch.export.save(export.program, program)
    with replaced_folder(out, force=force) as folder:
        (folder / export.name).write_bytes(program.getbuffer())
        shutil.copyfile(run / MODEL_FILE, folder / WEIGHTS)
        num_items = export.catalog.num_items
        (folder / ITEM_VECTORS).write_bytes(_item_vectors(export.item_vectors, num_items))
        if export.levels is not None:
            torch.save(export.levels, folder / LEVELS)
        _write_json(folder / CATALOG, describe_catalog(export.catalog))
        written = (name for name in FILES if (folder / name).is_file())
        hashes = {name: sha256_of(folder / name) for name in written}
        if hashes[WEIGHTS] != loaded:
            raise HstuXdError(
                f"{run} is being trained and has saved a better model meanwhile; export it again"
            )
        manifest = export.manifest | {"hashes": hashes}
        _write_json(folder / MANIFEST, manifest)
    return manifest


def _of_retrieval(run: Path, *, allow_imports: bool) -> _Export:
    trained, facts = load_trained(run, allow_imports=allow_imports), read_run(run)
    model, scorer = trained.model, trained.scorer
    manifest = _manifest(model, facts)
    vectors = model.item_vectors
    if isinstance(scorer, DotProduct):
        vectors = scorer.item_vectors
    else:
        _logger.warning(
            "%s: its objective does not score by dot products; the export holds the vectors of "
            "users and items, and scoring them is left to you",
            run,
        )
        manifest["scores"] = (
            f"by {facts['train']['objective']}, which is not exported; "
            + (manifest["scores"].partition("; ")[2])
        )
    return _Export(PROGRAM, export_encoder(model), vectors, model.catalog, None, manifest)


def _of_ranking(run: Path) -> _Export:
    ranker, facts = ServedRanker.of(run, open_store(run)), read_run(run)
    return _Export(
        TOWERS_PROGRAM if isinstance(ranker.model, TowerRanker) else RANKER_PROGRAM,
        export_ranker(ranker),
        ranker.model.items,
        ranker.catalog,
        torch.from_numpy(ranker.levels.paths),
        _ranking_manifest(ranker, facts),
    )


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


def _manifest(model: CrossDomainHSTU, facts: Mapping[str, Any]) -> dict[str, Any]:
    settings = asdict(model.settings)
    del settings["impl"]  # a matter of this package
    longest, width = model.settings.norm_length, model.settings.embedding_dim
    return {
        **_origin(facts, FORMAT_VERSION),
        "window": facts["max_sequence_length"],
        "older_per_domain": (facts.get("train") or {}).get("older_per_domain", 0),
        "exclude_seen": Protocol.from_run(facts).exclude_seen,
        "settings": settings,
        "inputs": {
            "item_ids": f"(B, N) int64, N up to {longest}, oldest first, padded with 0 at the end; "
            "give the latest events, no more than the window, and before them as many of every "
            "domain as older_per_domain says, as in training",
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
    }


def _ranking_manifest(ranker: ServedRanker, facts: Mapping[str, Any]) -> dict[str, Any]:
    settings, model = ranker.settings, ranker.model
    blocks = settings.facts()
    del blocks["rank"]  # a matter of the training
    blocks.get("encoder", {}).pop("impl", None)  # a matter of this package
    manifest = {
        **_origin(facts, RANKING_FORMAT_VERSION),
        "goals": list(ranker.goals),
        "levels": list(ranker.levels.names),
        "settings": blocks,
        "finding": how_to_find(settings, ranker.levels, LEVELS),
        "inputs": {each.name: each.described() for each in inputs_of(ranker)},
    }
    rows, width = len(ranker.levels.paths), model.items.width
    vectors = f"{ITEM_VECTORS}: ({rows}, {width}) float32, row = item id"
    if isinstance(model, TowerRanker):
        goals = len(ranker.goals)
        return manifest | {
            "biases": model.bias.tolist(),
            "outputs": {"user_vectors": f"(R, {goals}, {width}) float32, one for each goal"},
            "scores": "user_vectors[:, goal] @ item_vectors.T orders items, the same vectors for "
            f"all goals; sigmoid(that + biases[goal]) is the chance; {vectors}",
        }
    return manifest | {
        "outputs": {"chances": "(R, C) float64, that each candidate is taken; 0 for padding"},
        "scores": f"chances; {vectors}, which the program holds, too",
    }


def _origin(facts: Mapping[str, Any], format_version: int) -> dict[str, Any]:
    """Say what wrote an export, and of which run."""
    return {
        "kind": KIND,
        "format_version": format_version,
        "version": __version__,
        "torch": torch.__version__,
        "of": kind_of(facts),
        "run": {name: facts[name] for name in ("variant_name", "seed", "data_hashes")},
    }


def _write_json(file: Path, content: dict[str, Any]) -> None:
    text = json.dumps(content, indent=1, ensure_ascii=False)
    file.write_text(text + "\n", encoding="utf-8")
