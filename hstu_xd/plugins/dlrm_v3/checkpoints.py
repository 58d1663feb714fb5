"""Upstream's checkpoints with what they lack: the state of the tables' fused optimiser."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from generative_recommenders.dlrm_v3.checkpoint import is_sparse_key as is_sparse
from generative_recommenders.dlrm_v3.checkpoint import load_sparse_checkpoint
from torch.distributed import checkpoint

from hstu_xd.errors import InputError
from hstu_xd.plugins.dlrm_v3.settings import DlrmSettings, bound_value

_logger = logging.getLogger(__name__)

# The folder beside upstream's own files of a checkpoint.
FUSED = "xd_fused_optimizer"
# Upstream's file of all but the tables.
_DENSE = "non_sparse.ckpt"
# In the name of every parameter that upstream's model does not have.
_OURS = "_xd_"


def with_fused_state_saved(upstream: Callable[..., Any]) -> Callable[..., Any]:
    """Let ``save_dmp_checkpoint`` save what the tables' optimiser has accumulated, too.

    Upstream leaves it out, so that a run which continues from its checkpoint takes other steps
    than one that was never interrupted.
    """

    def xd_save_dmp_checkpoint(*, model: Any, batch_idx: int, **others: Any) -> None:
        upstream(model=model, batch_idx=batch_idx, **others)
        path = others.get("path") or bound_value("save_dmp_checkpoint.path")
        state = _state(model)
        if path and state:
            folder = Path(path) / str(batch_idx) / FUSED
            checkpoint.save(state, storage_writer=checkpoint.FileSystemWriter(folder))

    return xd_save_dmp_checkpoint


def with_fused_state_loaded(upstream: Callable[..., Any]) -> Callable[..., Any]:
    """Let ``load_dmp_checkpoint`` restore that state where a checkpoint has it, or start warm.

    Raises:
        InputError: no such checkpoint.
    """

    def xd_load_dmp_checkpoint(*, model: Any, **others: Any) -> None:
        path = others.get("path") or bound_value("load_dmp_checkpoint.path")
        if not path:
            if DlrmSettings().warm_start:
                warm_start(model, Path(DlrmSettings().warm_start))
            return
        _check("load_dmp_checkpoint.path", Path(path))
        upstream(model=model, **others)
        folder = Path(path) / FUSED
        if not folder.is_dir():
            _logger.warning(
                "%s holds no state of the tables' optimiser, which starts anew: the run differs "
                "from one that was not interrupted",
                path,
            )
            return
        state = _state(model)
        # In place: the tensors of the state are those that the tables' kernels update.
        checkpoint.load(state, storage_reader=checkpoint.FileSystemReader(folder))

    return xd_load_dmp_checkpoint


def warm_start(model: Any, folder: Path) -> None:
    """Take the parameters of a trained stock model; what is this package's alone starts at zero.

    Args:
        model: as upstream has sharded it.
        folder: of a step, out of upstream's ``save_dmp_checkpoint.path``.

    Raises:
        InputError: no checkpoint, or one of another model.
    """
    new = _load(model, folder, "xd_dlrm.warm_start")
    _logger.info("warm start from %s; new parameters: %s", folder, new)


def load_model(model: Any, folder: Path) -> None:
    """Load all parameters of a trained model, in this process alone.

    Args:
        model: not sharded.
        folder: of a step, out of upstream's ``save_dmp_checkpoint.path``.

    Raises:
        InputError: no checkpoint, or one of another model.
    """
    missing = _load(model, folder, "checkpoint")
    if missing:
        raise InputError(
            f"checkpoint = {str(folder)!r}: it has no {missing[0]}; switch on what the model was "
            "trained with and no more"
        )


def _load(model: Any, folder: Path, setting: str) -> list[str]:
    """Load what a checkpoint has, and return the parameters of this package's that it has not."""
    _check(setting, folder)
    saved = torch.load(folder / _DENSE, map_location="cpu")["dense_dict"]
    own = {name: value for name, value in model.state_dict().items() if not is_sparse(name, value)}
    saved = {name: value for name, value in saved.items() if not is_sparse(name, value)}
    new = sorted(set(own) - set(saved))
    foreign = sorted(set(saved) - set(own)) + [name for name in new if _OURS not in name]
    foreign += [name for name in set(own) & set(saved) if own[name].shape != saved[name].shape]
    if foreign:
        raise InputError(
            f"{setting} = {str(folder)!r}: a checkpoint of another model, which differs "
            f"in {foreign[0]}; give the sizes and features that it was trained with"
        )
    load_sparse_checkpoint(model=model, path=str(folder))
    for name, value in saved.items():
        own[name].copy_(value)
    return new


def _check(setting: str, folder: Path) -> None:
    if not (folder / _DENSE).is_file():
        raise InputError(
            f"{setting} = {str(folder)!r}: no checkpoint there; name the folder of a step, which "
            f"holds {_DENSE}"
        )


def _state(model: Any) -> dict[str, Any]:
    """Return what the fused optimiser keeps, flat; empty for one that keeps nothing, as SGD."""
    kept = model.fused_optimizer.state_dict()["state"]
    return {
        f"{parameter}/{name}": value
        for parameter, values in kept.items()
        for name, value in values.items()
    }
