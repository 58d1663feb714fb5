"""Continue from a checkpoint that REC's trainer wrote: equal outputs at step 0."""

import logging
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from hstu_xd.errors import InputError
from hstu_xd.model.warm_start import load_hstu

_logger = logging.getLogger(__name__)

KEY = "xd_warm_start"
_BIAS = "._rel_attn_bias."


def check_checkpoint(path: Path) -> None:
    """Refuse what is not a file.

    Raises:
        InputError: no such file, or a folder, which deepspeed writes.
    """
    if path.is_dir():
        raise InputError(
            f"{KEY}: {path} is a folder; give a file, of deepspeed's the one that its "
            "zero_to_fp32.py makes"
        )
    if not path.is_file():
        raise InputError(f"{KEY}: {path}: no such file; give one out of a run's checkpoint_dir")


def read_checkpoint(path: Path) -> Mapping[str, Tensor]:
    """The model's state dict out of a checkpoint of REC's trainer, or a state dict alone.

    REC's checkpoints are pickles that hold its configuration: load only what you trust.

    Raises:
        InputError: no such file, or neither of the two.
    """
    check_checkpoint(path)
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=False)
    except Exception as error:  # torch.load fails in as many ways as there are formats
        raise InputError(f"{KEY}: {path}: not a checkpoint of REC's ({error})") from error
    state = checkpoint.get("model", checkpoint) if isinstance(checkpoint, Mapping) else None
    if not isinstance(state, Mapping) or not all(isinstance(x, Tensor) for x in state.values()):
        raise InputError(f"{KEY}: {path} holds no model; give a file out of a run's checkpoint_dir")
    return state


def start_from(model: nn.Module, path: Path) -> list[str]:
    """Load a trained model of REC's into the one of this package that extends it.

    The relative bias that REC's HSTU holds and never applies is left out where this model has none.

    Args:
        model: HSTU_XD or HLLM_XD, built.
        path: of the checkpoint.

    Returns:
        Names of the parameters that the checkpoint does not have: this package's alone.

    Raises:
        InputError: not a checkpoint, or one of another model or size.
    """
    own = model.state_dict()
    state = {name.removeprefix("module."): value for name, value in read_checkpoint(path).items()}
    state = {name: value for name, value in state.items() if _BIAS not in name or name in own}
    try:
        ours = load_hstu(model, state)
    except InputError as error:
        raise InputError(f"{KEY}: {path}: {error}") from error
    _logger.info("warm start from %s; new parameters: %s", path, ours)
    return ours
