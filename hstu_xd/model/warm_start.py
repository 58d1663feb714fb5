"""Continue from a trained HSTU: its parameters under upstream's names, ours as they start."""

from collections.abc import Mapping

from torch import Tensor, nn

from hstu_xd.errors import InputError

# A buffer of upstream's HSTU that every model of its size computes anew.
_ATTENTION_MASK = "_attn_mask"
# Modules and parameters that HSTU does not have.
_OURS = {"_tape", "_target_domain_emb", "_ddsr", "_history_tokens"}


def load_hstu(model: nn.Module, state: Mapping[str, Tensor]) -> list[str]:
    """Load a checkpoint of upstream's HSTU into a cross-domain model.

    Args:
        model: :class:`hstu_xd.model.hstu.CrossDomainHSTU` or the plug-in's ``HSTU_XD``; its
            additions start at zero, so it computes what the checkpoint's model computed.
        state: the checkpoint's state dict; DDP's ``module.`` prefix is allowed.

    Returns:
        Names of the parameters that the checkpoint does not have: this package's alone.

    Raises:
        InputError: sizes differ, a parameter of HSTU is missing, or unknown ones remain.
    """
    own = model.state_dict()
    given = {name.removeprefix("module."): value for name, value in state.items()}
    given.pop(_ATTENTION_MASK, None)
    unknown = sorted(set(given) - set(own))
    absent = sorted(set(own) - set(given) - {_ATTENTION_MASK})
    ours = [name for name in absent if is_cross_domain(name)]
    missing = [name for name in absent if not is_cross_domain(name)]
    if unknown or missing:
        raise InputError(
            f"not a checkpoint of this HSTU: unknown {unknown[:3]}, missing {missing[:3]}; "
            "give the model the checkpoint's num_blocks and bias settings"
        )
    for name, value in given.items():
        if value.shape != own[name].shape:
            raise InputError(
                f"{name} has shape {tuple(value.shape)} in the checkpoint and "
                f"{tuple(own[name].shape)} here; give the model the checkpoint's sizes"
            )
    model.load_state_dict(given, strict=False)
    return ours


def is_cross_domain(name: str) -> bool:
    """Whether a parameter is one that this package adds to HSTU."""
    return not _OURS.isdisjoint(name.split("."))
