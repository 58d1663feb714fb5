"""Run folders: make one by training, continue one, load the model of one."""

import json
import logging
import shlex
import sys
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from hstu_xd.catalog import CATALOG_FILE, DomainCatalog
from hstu_xd.data.store import InteractionStore
from hstu_xd.declaration import labels
from hstu_xd.errors import InputError
from hstu_xd.model.hstu import CrossDomainHSTU
from hstu_xd.model.settings import SWITCHES
from hstu_xd.ops.domain_attention.api import check_impl
from hstu_xd.training.checkpoint import MODEL_FILE, load_checkpoint, load_weights
from hstu_xd.training.distributed import World, world
from hstu_xd.training.settings import RunSettings, TrainSettings, load_settings
from hstu_xd.training.trainer import Trainer
from hstu_xd.version import __version__

_logger = logging.getLogger(__name__)

CONFIG_FILE = "config.gin"
RUN_FILE = "run.json"
_PARTIAL_FILE = "run.partial"


def train(
    data: Path,
    settings: RunSettings | None,
    out: Path,
    *,
    name: str | None = None,
    resume: bool = False,
) -> dict[str, Any]:
    """Train one model into a run folder.

    Args:
        data: a prepared store.
        settings: of :func:`hstu_xd.training.settings.load_settings`; None: the defaults.
        out: the run folder; new, unless ``resume``.
        name: what tables call the run; default: its switches.
        resume: continue ``out`` with its own settings where it stopped; where ``settings`` are
            given and differ, a warning says so.

    Returns:
        The summary, as written to ``summary.json``.

    Raises:
        InputError: ``out`` exists (or does not, to resume), or belongs to other data.
        HstuXdError: the loss became not finite; the last good checkpoint stays.
    """
    store = InteractionStore.open(data)
    with world() as here:
        if resume:
            settings = _settings_to_resume(out, store, settings if here.is_main else None)
        else:
            settings = settings or load_settings([])
            _check_new(out)
        here.barrier()
        torch.manual_seed(settings.train.random_seed)
        encoder = settings.encoder_settings(store.num_domains)
        check_impl(encoder.impl, encoder.normalization)
        model = CrossDomainHSTU(
            store.catalog, encoder, dropout_rate=settings.train.dropout_rate
        ).to(here.device)
        trainer = Trainer(model, store, settings.train, out, here)
        if here.is_main and not resume:
            lay_out(out, store, settings, model, name or variant_name(settings), here)
        here.barrier()
        if resume:
            trainer.resume()
        return trainer.fit()


def _check_new(out: Path) -> None:
    """Refuse a folder that holds anything but the beginning of one that :func:`lay_out` made."""
    found = {file.name for file in out.iterdir()} if out.is_dir() else set()
    if RUN_FILE in found:
        raise InputError(f"{out} exists; resume it with --resume or give another --out")
    if found - {CONFIG_FILE, CATALOG_FILE, _PARTIAL_FILE} or (out.exists() and not out.is_dir()):
        raise InputError(f"{out} exists and is not a run folder; give another --out")


def load(run: Path | str) -> CrossDomainHSTU:
    """The best model of a trained run, in evaluation mode on CPU.

    Args:
        run: a folder written by ``hstu-xd train``.

    Raises:
        InputError: not a run folder, or its files do not belong together.
    """
    run = Path(run)
    if not (run / RUN_FILE).is_file():
        raise InputError(f"{run}: not a run folder ({RUN_FILE} is missing); train one first")
    catalog = DomainCatalog.load(run)
    settings = load_settings([run / CONFIG_FILE])
    model = CrossDomainHSTU(
        catalog,
        settings.encoder_settings(catalog.num_domains),
        dropout_rate=settings.train.dropout_rate,
    )
    weights, _ = load_checkpoint(run / MODEL_FILE)
    load_weights(model, weights, run / MODEL_FILE)
    return model.eval()


def read_run(run: Path) -> dict[str, Any]:
    """What run.json says.

    Raises:
        InputError: not a run folder.
    """
    if not (run / RUN_FILE).is_file():
        raise InputError(f"{run}: not a run folder ({RUN_FILE} is missing); train one first")
    return json.loads((run / RUN_FILE).read_text())


def open_data(run: Path, data: Path | None = None) -> InteractionStore:
    """The store of a run, or another one with the same catalogue.

    Raises:
        InputError: no store there, or its catalogue is not the run's.
    """
    facts = read_run(run)
    store = InteractionStore.open(data or Path(facts["data"]))
    if store.manifest["hashes"][CATALOG_FILE] != facts["data_hashes"][CATALOG_FILE]:
        raise InputError(
            f"{store.path}: its catalogue is not the one {run} was trained on; pass the store of "
            f"the run, {facts['data']}, or train on this one"
        )
    return store


def variant_name(settings: RunSettings) -> str:
    """Name a run after what its model is trained as: "HSTU", "HSTU + mask + TAPE", ...

    Of the training, only where negatives are drawn is told; :meth:`RunSettings.unlike` tells all.
    """
    parts = ["HSTU"]
    if settings.train.negatives != TrainSettings.negatives:
        parts.append(f"{settings.train.negatives} negatives")
    return " + ".join(parts + labels(settings.encoder_settings(num_domains=1)))


def lay_out(
    out: Path,
    store: InteractionStore,
    settings: RunSettings,
    model: CrossDomainHSTU,
    name: str,
    here: World,
) -> None:
    """Make a run folder: config, catalogue, and what the run is; run.json comes last.

    Args:
        out: the folder.
        store: whose catalogue and hashes are noted.
        settings: of the model and the training.
        model: as it starts.
        name: what tables call the run.
        here: the process.
    """
    out.mkdir(parents=True, exist_ok=True)
    (out / CONFIG_FILE).write_text(settings.to_gin())
    store.catalog.save(out / CATALOG_FILE)
    encoder = asdict(model.settings)
    manifest = store.manifest
    facts = {
        "version": __version__,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "data": str(store.path.resolve()),
        "data_hashes": manifest["hashes"],
        "data_summary": {k: manifest[k] for k in _MANIFEST_FACTS if k in manifest},
        "variant_name": name,
        "seed": settings.train.random_seed,
        "parameters": sum(p.numel() for p in model.parameters()),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "processes": here.size,
        "device": str(here.device),
        "switches": {key: encoder[key] for key in SWITCHES},
        "encoder": encoder,
        "train": asdict(settings.train),
        "max_sequence_length": settings.train.max_sequence_length,
    }
    partial = out / _PARTIAL_FILE
    partial.write_text(json.dumps(facts, indent=1) + "\n")
    partial.replace(out / RUN_FILE)


_MANIFEST_FACTS = (
    "users",
    "items",
    "interactions",
    "domains",
    "delta",
    "synthetic",
    "switch_share",
)


def _settings_to_resume(
    out: Path, store: InteractionStore, given: RunSettings | None
) -> RunSettings:
    facts = read_run(out)
    if facts["data_hashes"] != store.manifest["hashes"]:
        raise InputError(
            f"{out} was trained on other data than {store.path} (hashes differ); resume it with "
            f"--data {facts['data']}"
        )
    unlike = given.unlike(facts) if given is not None else []
    if unlike:
        _logger.warning("%s goes on with its own settings: %s", out, "; ".join(unlike))
    return load_settings([out / CONFIG_FILE])
