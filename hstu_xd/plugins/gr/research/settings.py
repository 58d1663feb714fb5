"""gin settings of the plug-in: ``xd_upstream.*``, and ``xd_encoder.*`` over ``hstu_encoder.*``."""

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import gin
from hstu_xd.declaration import check, setting, settings_of
from hstu_xd.errors import InputError
from hstu_xd.model.settings import EncoderSettings
from hstu_xd.plugins.gr.research.dataset import SPLITS
from hstu_xd.training import settings as shared
from hstu_xd.training.gin_files import check_types


@gin.configurable("xd_upstream", module="hstu_xd")
@dataclasses.dataclass(frozen=True)
class UpstreamSettings:
    """What ``xd_upstream.*`` bindings set.

    Attributes:
        item_domain_path: item -> domain file for upstream's own data sets; "xd:" data sets bring
            their own. Empty: no domains are known and upstream's behaviour stays.
        split: how events are held out, "upstream" (train on all but the last event, evaluate on the
            last), or a three-way split that trains on all but the last two: "valid" evaluates on
            the one before the last, "test" on the last.
        negatives: where negatives are drawn, "domain" (the positive's own) or "catalogue".
        candidates: whom the target is ranked against in evaluation: its "domain", the whole
            "catalogue", or "upstream" for upstream's own function.
        warm_start: checkpoint of an HSTU to start from; empty: none.
        seed: seed of PyTorch's random numbers, so that a run can be repeated; upstream's own
            ``train_fn.random_seed`` does not reach them. None: another run every time.

    Raises:
        InputError: a value that is not one of those named above.
    """

    item_domain_path: str = setting("")
    split: str = setting("upstream", allowed=tuple(SPLITS))
    negatives: str = setting("domain", allowed=("domain", "catalogue"))
    candidates: str = setting("domain", allowed=("domain", "catalogue", "upstream"))
    warm_start: str = setting("", also=("checkpoint",))
    seed: int | None = setting(None, also=("random_seed",))

    def __post_init__(self) -> None:
        check(self, "xd_upstream.{name} = {value!r}; known: {known}")


def encoder_settings(
    hstu_encoder: Callable[..., Any], num_domains: int, norm_length: int, embedding_dim: int
) -> EncoderSettings:
    """Build the settings of HSTU_XD: ``xd_encoder.*`` where bound, else what ``hstu_encoder`` has.

    So a team that switches ``main_module`` keeps the sizes of its HSTU.

    Args:
        hstu_encoder: upstream's configurable.
        num_domains: of the catalogue.
        norm_length: upstream's ``max_sequence_length + max_output_length``.
        embedding_dim: width of the item table.

    Raises:
        InputError: a binding of the wrong type or out of range, one of another trainer, or an HSTU
            that HSTU_XD cannot be.
    """
    shared.refuse_other_blocks(
        "generative-recommenders' trainer",
        ("xd_upstream", "xd_encoder"),
        "its own are train_fn.*, what it ranks among is xd_upstream.candidates",
    )
    bound = dict(gin.get_bindings("xd_encoder"))
    check_types(shared.BLOCKS["xd_encoder"], "xd_encoder", bound)
    theirs = bound_arguments(hstu_encoder)
    for name, needed in (("normalization", "rel_bias"), ("linear_config", "uvqk")):
        if theirs[name] != needed:
            raise InputError(
                f"hstu_encoder.{name} = {theirs[name]!r}: HSTU_XD computes {needed!r} only; remove "
                'the binding, or stay with train_fn.main_module = "HSTU"'
            )
    return shared.CONFIGURABLES["xd_encoder"](
        num_domains=num_domains,
        norm_length=norm_length,
        embedding_dim=embedding_dim,
        **{
            name: theirs[name]
            for name, each in settings_of(EncoderSettings).items()
            if each.upstream and name not in bound
        },
    )


def bound_arguments(configurable: Callable[..., Any]) -> dict[str, Any]:
    """Return every argument of a gin configurable that has a default, as bound or by default."""
    parameters = inspect.signature(configurable).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
    return defaults | dict(gin.get_bindings(inspect.unwrap(configurable).__name__))
