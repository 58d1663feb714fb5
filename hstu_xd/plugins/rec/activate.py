"""Rebind the names that REC looks up, so that its configuration can ask for hstu-xd."""

import importlib.util
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from hstu_xd.plugins.rebinding import Patch, Rebinding, apply
from hstu_xd.plugins.rec.evaluation import domain_scoped, with_groups
from hstu_xd.plugins.rec.factories import with_domains, with_hstu_xd
from hstu_xd.plugins.rec.verified import VERIFIED_COMMITS, unverified_sources

_logger = logging.getLogger(__name__)


def _unrestricted_load(load: Callable[..., Any]) -> Callable[..., Any]:
    """``torch.load`` as before torch 2.6: REC's checkpoints hold its configuration object."""

    def load_rec(*arguments: Any, weights_only: bool | None = None, **others: Any) -> Any:
        return load(*arguments, weights_only=bool(weights_only), **others)

    return load_rec


def _with_effect(init_logger: Callable[..., Any]) -> Callable[..., Any]:
    """HLLM's ``init_logger``, which does nothing once a library has logged to the root."""

    def xd_init_logger(config: Any) -> None:
        for handler in list(logging.root.handlers):
            if type(handler) is logging.StreamHandler:
                logging.root.removeHandler(handler)
        init_logger(config)

    return xd_init_logger


# get_model first: REC's other modules import it by name.
MODELS = tuple(
    Rebinding(module, "get_model", with_hstu_xd, ("model_name",))
    for module in ("REC.utils.utils", "REC.utils")
)
REBINDINGS = (
    Rebinding("REC.data.utils", "bulid_dataloader", with_domains, ("config",)),
    Rebinding("REC.data", "bulid_dataloader", with_domains, ("config",)),
    Rebinding(
        "REC.trainer.trainer",
        "Trainer._full_sort_batch_eval",
        domain_scoped,
        ("batched_data",),
    ),
    Rebinding("REC.evaluator.evaluator", "Evaluator.evaluate", with_groups, ("dataobject",)),
    Rebinding("REC.utils", "init_logger", _with_effect, ("config",)),
    Rebinding("torch", "load", _unrestricted_load),
)

_patches: list[Patch] = []


def warn_if_unverified() -> None:
    """Say so where REC differs from the versions that this was verified with."""
    spec = importlib.util.find_spec("REC")
    folders = list(spec.submodule_search_locations or []) if spec else []
    differing = unverified_sources(Path(folders[0])) if folders else []
    if differing:
        commits = ", ".join(f"{name} {commit}" for name, commit in VERIFIED_COMMITS.items())
        _logger.warning(
            "%s differs from the versions that hstu-xd was verified with (%s): %s",
            folders[0],
            commits,
            "; ".join(differing),
        )


def activate() -> list[Patch]:
    """Rebind REC's names; a second call changes nothing.

    Returns:
        The handles; ``revert()``, last first, puts the identical originals back.

    Raises:
        HstuXdError: a name is missing, or its object lacks a parameter that is relied on.
    """
    if not any(patch.originals for patch in _patches):
        _patches.clear()
        _patches.append(apply(MODELS))
        _patches.append(apply(REBINDINGS))
        if not torch.cuda.is_available():
            from hstu_xd.plugins.rec.cpu import rebindings

            _logger.warning("no GPU is visible: REC runs on CPU")
            _patches.append(apply(rebindings()))
    return _patches
