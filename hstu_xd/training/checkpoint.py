"""Checkpoints: one safetensors file each, written beside and renamed, so never half there."""

import json
import os
import stat
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from hstu_xd.errors import HstuXdError, InputError
from hstu_xd.files import check_readable
from hstu_xd.training.distributed import World

MODEL_FILE = "best.safetensors"
STATE_FILE = "last.safetensors"


def save_checkpoint(path: Path, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
    """Write tensors with JSON metadata; the old file stays whole until the new one is.

    Its mode is that of any new file, by the umask.

    Raises:
        HstuXdError: the disk is full or the file cannot be written.
    """
    partial = path.with_suffix(".partial")
    whole = {name: value.detach().contiguous() for name, value in tensors.items()}
    try:
        partial.unlink(missing_ok=True)
        partial.touch()
        mode = stat.S_IMODE(partial.stat().st_mode)
        # safetensors 0.8 puts a file of its own in the place of the one that is there: mode 0600.
        save_file(whole, partial, metadata={"hstu_xd": json.dumps(metadata)})
        partial.chmod(mode)
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    except (SafetensorError, OSError) as error:
        partial.unlink(missing_ok=True)
        raise HstuXdError(
            f"{path}: cannot be written ({error}); make room and continue with --resume"
        ) from error


def load_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what :func:`save_checkpoint` wrote.

    Raises:
        InputError: no such file, one that may not be read, or not a checkpoint of this package.
    """
    check_readable(path)
    if not path.is_file():
        raise InputError(f"{path}: no checkpoint here; train first")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = (file.metadata() or {}).get("hstu_xd")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise InputError(f"{path}: not a readable checkpoint ({error}); take another") from error
    if metadata is None:
        raise InputError(f"{path}: not a checkpoint of hstu-xd")
    return tensors, json.loads(metadata)


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Name the optimiser's state by parameter: ``optimizer.<slot>.<parameter>``."""
    return {
        f"optimizer.{slot}.{name}": value
        for name, parameter in model.named_parameters()
        for slot, value in optimizer.state.get(parameter, {}).items()
    }


def restore_optimizer(
    model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]
) -> None:
    """Inverse of :func:`optimizer_tensors`."""
    parameters = dict(model.named_parameters())
    for key, value in tensors.items():
        if (name := parameter_of(key)) is not None:
            slot = key.split(".")[1]
            parameter = parameters[name]
            state = value if slot == "step" else value.to(parameter.device)
            optimizer.state[parameter][slot] = state


def save_state(
    run: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    progress: dict[str, Any],
    more: dict[str, Tensor] | None = None,
) -> None:
    """Write what a run resumes with into its folder: weights, optimiser, progress, and ``more``."""
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    tensors |= optimizer_tensors(model, optimizer) | (more or {})
    save_checkpoint(run / STATE_FILE, tensors, {"progress": progress})


def load_state(
    run: Path, model: nn.Module, optimizer: torch.optim.Optimizer, here: World | None = None
) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
    """Restore what :func:`save_state` wrote; None where a run was stopped before that.

    Args:
        run: the run folder.
        model: takes the weights.
        optimizer: takes its state.
        here: this process, of which the first one of the job reads the file; None: it is alone.

    Returns:
        The progress, and all tensors.

    Raises:
        InputError: the file cannot be read or is not of this model.
    """
    file = run / STATE_FILE

    def read() -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        return load_checkpoint(file) if file.exists() else None

    found = read() if here is None else here.from_main(read)
    if found is None:
        return None
    tensors, metadata = found
    load_weights(model, model_tensors(tensors), file)
    restore_optimizer(model, optimizer, tensors)
    return metadata["progress"], tensors


def parameter_of(key: str) -> str | None:
    """Name the parameter that an entry of the optimiser's state is of; None for other entries."""
    kind, _, rest = key.partition(".")
    return rest.partition(".")[2] if kind == "optimizer" else None


def model_tensors(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Take the model's part of a resumable state."""
    return {
        name.removeprefix("model."): value
        for name, value in tensors.items()
        if name.startswith("model.")
    }


def load_weights(model: nn.Module, weights: dict[str, Tensor], source: Path) -> None:
    """Load weights, or say what does not fit.

    Raises:
        InputError: the checkpoint belongs to another catalogue or other settings.
    """
    own = model.state_dict()
    names = sorted(set(own) ^ set(weights))
    if names:
        raise InputError(
            f"{source}: does not fit the model ({names[0]} is on one side only); use its own "
            "run's config.gin"
        )
    for name, value in weights.items():
        if value.shape != own[name].shape:
            raise InputError(
                f"{source}: {name} has shape {tuple(value.shape)}, the model of this catalogue "
                f"and config needs {tuple(own[name].shape)}; use the data it was trained on"
            )
    model.load_state_dict(weights)
