"""What run.json tells of a run, and whether a store is still the one that it was trained on."""

import json
import logging
import shlex
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import torch

from hstu_xd.catalog import CATALOG_FILE
from hstu_xd.data.batches import Split
from hstu_xd.data.store import InteractionStore
from hstu_xd.data.store_files import ITEM_IDS, OFFSETS, TIMESTAMPS, USERS
from hstu_xd.errors import InputError
from hstu_xd.evaluation.baselines import Baseline
from hstu_xd.evaluation.protocol import RANKING, RETRIEVAL, until_of
from hstu_xd.files import LOCK_FILE, check_readable, locked_folder
from hstu_xd.model.hstu import CrossDomainHSTU
from hstu_xd.model.settings import SWITCHES
from hstu_xd.training.distributed import World
from hstu_xd.training.run_features import FEATURES_FILE, save_features
from hstu_xd.training.settings import RunSettings
from hstu_xd.version import __version__

_logger = logging.getLogger(__name__)

CONFIG_FILE = "config.gin"
RUN_FILE = "run.json"
PARTIAL_FILE = "run.partial"
# What a run that is resumed needs to know, beside its checkpoint.
RESUMED_FILES = (RUN_FILE, CONFIG_FILE, FEATURES_FILE)
# Of a ranking run: how many training events every item has.
TRAINED_FILE = "trained_items.npy"
TRAIN_UNTIL = "xd_train.train_until"
# What wrote the folder of a run of each kind.
_TRAINED_BY = {RETRIEVAL: "hstu-xd train", RANKING: "hstu-xd rank"}


def read_run(run: Path) -> dict[str, Any]:
    """Read what run.json says.

    Raises:
        InputError: not a run folder, or its run.json cannot be read.
    """
    check_readable(run / RUN_FILE)
    if not (run / RUN_FILE).is_file():
        raise InputError(f"{run}: not a run folder ({RUN_FILE} is missing); train one first")
    try:
        return json.loads((run / RUN_FILE).read_text())
    except ValueError as error:
        raise InputError(f"{run / RUN_FILE}: not JSON ({error}); restore the file") from error


def kind_of(facts: Mapping[str, Any]) -> str:
    """Return what a run is trained for, RETRIEVAL or RANKING; those of old do not say so."""
    return facts.get("kind", RETRIEVAL)


def read_run_of(kind: str, run: Path) -> dict[str, Any]:
    """Read what run.json says, and refuse a run that is trained for something else.

    Raises:
        InputError: as :func:`read_run`, or a run of the other kind.
    """
    facts = read_run(run)
    if (found := kind_of(facts)) != kind:
        raise InputError(
            f"{run} is a {found} run, written by {_TRAINED_BY[found]}; here a {kind} run is "
            f"needed, written by {_TRAINED_BY[kind]}. evaluate, compare and report take both"
        )
    return facts


def refitted(facts: Mapping[str, Any]) -> str:
    """Return the folder of the run that a run is a refit of; empty where it is none."""
    return (facts.get("refits") or {}).get("run", "")


def check_measurable(run: Path, facts: Mapping[str, Any], split: Split) -> None:
    """Refuse to measure a run on what it was trained on.

    Args:
        run: the run folder.
        facts: what its run.json says.
        split: that is to be measured.

    Raises:
        InputError: the run was trained on the targets of the split.
    """
    until = until_of(facts)
    if split in until.measured():
        return
    mend = "leave it out"
    if until.measured():
        mend = f"measure it on {', '.join(s.value for s in until.measured())}, or leave it out"
    elif of := refitted(facts):
        mend = f"measure the run that it is a refit of, {of}"
    raise InputError(
        f"{run} was trained on the targets of {split.value} ({TRAIN_UNTIL} = {until.value!r}), so "
        f"its numbers there mean nothing; {mend}"
    )


@contextmanager
def held_folder(out: Path, here: World, kind: str, *, resume: bool) -> Iterator[None]:
    """Keep a run folder for the processes of this job, and refuse it for what it holds.

    Args:
        out: the folder.
        here: the process.
        kind: of the run.
        resume: whether it must hold such a run, or must hold nothing.

    Raises:
        InputError: it is not what is needed, or another process trains into it.
    """
    check = partial(read_run_of, kind) if resume else _check_new
    with ExitStack() as held:

        def take() -> None:
            # What is there is refused untouched, unless another process may just be writing it.
            if not (out / LOCK_FILE).exists():
                check(out)
            held.enter_context(locked_folder(out, "trains into"))
            check(out)

        here.in_main(take)
        yield


def _check_new(out: Path) -> None:
    """Refuse a folder that holds anything but the beginning of a run."""
    found = {file.name for file in out.iterdir()} if out.is_dir() else set()
    if RUN_FILE in found:
        raise InputError(f"{out} exists; resume it with --resume or give another --out")
    begun = {CONFIG_FILE, CATALOG_FILE, FEATURES_FILE, TRAINED_FILE, LOCK_FILE, PARTIAL_FILE}
    if found - begun or (out.exists() and not out.is_dir()):
        raise InputError(f"{out} exists and is not a run folder; give another --out")


def write_facts(out: Path, facts: Mapping[str, Any]) -> None:
    """Write run.json, which appears whole or not at all."""
    partial = out / PARTIAL_FILE
    partial.write_text(json.dumps(facts, indent=1) + "\n")
    partial.replace(out / RUN_FILE)


def lay_out(
    out: Path,
    store: InteractionStore,
    settings: RunSettings,
    model: CrossDomainHSTU | Baseline,
    name: str,
    here: World,
    more: Mapping[str, Any] | None = None,
) -> None:
    """Make a run folder: config, catalogue, and what the run is; run.json comes last.

    Args:
        out: the folder.
        store: whose catalogue and hashes are noted.
        settings: of the model and the training.
        model: as it starts.
        name: what tables call the run.
        here: the process.
        more: what run.json says of the run that it "continues" or "refits", if it does.
    """
    out.mkdir(parents=True, exist_ok=True)
    (out / CONFIG_FILE).write_text(settings.to_gin())
    store.catalog.save(out / CATALOG_FILE)
    if isinstance(model, CrossDomainHSTU):
        save_features(out, model.item_features)
    encoder = asdict(model.settings)
    facts = {
        **facts_of_start(here),
        **facts_of_data(store),
        "variant_name": name,
        "seed": settings.train.random_seed,
        "parameters": sum(p.numel() for p in model.parameters()),
        "switches": {key: encoder[key] for key in SWITCHES},
        "encoder": encoder,
        "train": asdict(settings.train),
        "item": asdict(settings.item),
        "protocol": settings.protocol.as_json(),
        "max_sequence_length": settings.train.max_sequence_length,
    }
    if settings.parts or settings.foreign.modules:
        facts |= {"parts": settings.parts, "modules": settings.foreign.described()}
    write_facts(out, {**facts, **(more or {})})


def facts_of_start(here: World) -> dict[str, Any]:
    """Describe the process that starts or resumes a run."""
    return {
        "version": __version__,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "processes": here.size,
        "device": str(here.device),
    }


_MANIFEST_FACTS = (
    "users",
    "items",
    "interactions",
    "domains",
    "delta",
    "synthetic",
    "switch_share",
)


def facts_of_data(store: InteractionStore) -> dict[str, Any]:
    """Describe the store that a run is trained on."""
    manifest = store.manifest
    return {
        "data": str(store.path.resolve()),
        "data_hashes": manifest["hashes"],
        "last_time": int(store.timestamps.max()),
        "data_summary": {k: manifest[k] for k in _MANIFEST_FACTS if k in manifest},
    }


def last_time_of(run: Path, facts: Mapping[str, Any]) -> int:
    """Return the time of the last event of the log that a run was trained on.

    Raises:
        InputError: an old run that does not say so, whose store is no more.
    """
    if "last_time" in facts:
        return facts["last_time"]
    folder = Path(facts["data"])
    if not still_holds(folder, facts):
        raise InputError(
            f"{run} does not say up to what time it was trained, and {folder} no longer holds its "
            "log; prepare that log there again, or train without --continue-from"
        )
    return int(InteractionStore.open(folder).timestamps.max())


def note_resumption(out: Path, here: World, *, step: int, batch_size: int) -> None:
    """Record who goes on with a run: "processes" are those of today, "starts" tells of all.

    Args:
        out: the run folder.
        here: the process that goes on.
        step: optimiser steps that were done before.
        batch_size: users that a process takes a step.
    """
    facts = read_run(out)
    now, before = facts_of_start(here), facts.get("processes", 1)
    first = {name: facts.get(name) for name in now} | {"step": 0}
    starts = [*facts.get("starts", [first]), now | {"step": step}]
    write_facts(out, facts | {"processes": here.size, "starts": starts})
    if here.size != before:
        _logger.warning(
            "%s was trained by %d process%s and goes on with %d: a step takes %d users instead of "
            "%d; those who are left of the epoch are trained once each",
            *(out, before, "" if before == 1 else "es", here.size),
            *(batch_size * here.size, batch_size * before),
        )


# What is another one where a file's hash is another one.
_CONTENTS = {
    CATALOG_FILE: "items or domains",
    USERS: "users",
    OFFSETS: "events",
    ITEM_IDS: "events",
    TIMESTAMPS: "events",
}


def data_changes(facts: Mapping[str, Any], store: InteractionStore) -> str:
    """Say in what a store differs from the one that a run was trained on.

    Args:
        facts: of the run, as :func:`read_run` gives them.
        store: to be compared by the hashes of its files.

    Returns:
        "other users, events; 40 users instead of 60; 900 events instead of 1,200", without counts
        that are equal; empty where the store holds what it held.
    """
    then, now = facts["data_hashes"], store.manifest["hashes"]
    contents = dict.fromkeys(
        content for name, content in _CONTENTS.items() if then.get(name) != now[name]
    )
    if not contents:
        return ""
    summary = facts.get("data_summary") or {}
    counts = [
        f"; {store.manifest[key]:,} {noun} instead of {before:,}"
        for key, noun in _COUNTED.items()
        if (before := summary.get(key)) not in (None, store.manifest[key])
    ]
    return f"other {', '.join(contents)}{''.join(counts)}"


_COUNTED = {"users": "users", "items": "items", "interactions": "events"}


def check_same_data(run: Path, store: InteractionStore) -> None:
    """Refuse to go on with a run on other data than those that it began with.

    Raises:
        InputError: the store holds other data; the message says where those of the run are, or that
            they are no more.
    """
    facts = read_run(run)
    changes = data_changes(facts, store)
    if not changes:
        return
    trained_on = Path(facts["data"])
    if store.path.resolve() == trained_on:
        raise InputError(
            f"{store.path} was prepared again since {run} was trained on it ({changes}); prepare "
            "the old log there again, or train into a new --out"
        )
    mend = f"resume it with --data {trained_on}"
    if not still_holds(trained_on, facts):
        mend = f"{trained_on} no longer holds them: prepare the old log again, or give a new --out"
    raise InputError(f"{run} was trained on other data than {store.path} ({changes}); {mend}")


def check_same_store(store: InteractionStore, here: World) -> None:
    """Refuse a job whose processes read different data, which machines of their own may hold.

    Raises:
        InputError: in all processes.
    """
    first, *others = here.gather((str(store.path.resolve()), store.manifest["hashes"]))
    for rank, (path, hashes) in enumerate(others, start=1):
        if hashes != first[1]:
            raise InputError(
                f"process {rank} reads {path}, which holds other data than {first[0]} of process "
                "0; copy one store to all machines"
            )


def still_holds(folder: Path, facts: Mapping[str, Any]) -> bool:
    """Tell whether a folder has the store, unchanged, that a run was trained on."""
    try:
        return not data_changes(facts, InteractionStore.open(folder))
    except InputError:
        return False


def open_data(
    run: Path, data: Path | None = None, *, verify: bool = False, as_trained: bool = False
) -> InteractionStore:
    """Open the store of a run, or another one with the same catalogue.

    A warning says so where its histories are not those that the run was trained on.

    Args:
        run: the run folder.
        data: the store; None: where the run's own was.
        verify: compare the hash of every file with the store's manifest.
        as_trained: without ``data``, refuse histories that have changed since the training.

    Raises:
        InputError: no store there, a damaged one, or not the catalogue or histories of the run.
    """
    facts = read_run(run)
    store = InteractionStore.open(data or Path(facts["data"]), verify=verify)
    changes = data_changes(facts, store)
    if store.manifest["hashes"][CATALOG_FILE] != facts["data_hashes"][CATALOG_FILE]:
        mend = f"pass the store of the run, {facts['data']}, or train on this one"
        if store.path.resolve() == Path(facts["data"]):
            mend = "it was prepared again since; train on it, or prepare the old log there again"
        raise InputError(
            f"{store.path}: its catalogue is not the one {run} was trained on ({changes}); {mend}"
        )
    if changes and data is None and as_trained:
        raise InputError(
            f"{store.path} was prepared again since {run} was trained on it ({changes}); prepare "
            f"the old log there again, or add --data {store.path} to take it as it is now"
        )
    if changes:
        _logger.warning(
            "%s does not hold the histories that %s was trained on (%s); its held-out events may "
            "be among those",
            *(store.path, run, changes),
        )
    return store
