"""Variants by name: gin bindings on top of a recipe that all share, or a user's own gin file."""

from collections.abc import Sequence
from pathlib import Path

from hstu_xd.errors import InputError, did_you_mean
from hstu_xd.evaluation.baselines import BASELINES, NO_BASELINE
from hstu_xd.model.settings import SWITCHES, EncoderSettings
from hstu_xd.training.gin_files import find_file
from hstu_xd.training.settings import RunSettings

_MASK = ("xd_encoder.domain_mask = True",)
_VIEW = ("xd_encoder.target_view_heads = 2",)
_TAPE = ("xd_encoder.tape = True",)
_DDSR = ("xd_encoder.ddsr = True",)
_ALL = (*_MASK, *_VIEW, *_TAPE, *_DDSR)


def _segments(length: int, tokens: int, lookback: int) -> tuple[str, ...]:
    return (
        'xd_encoder.segment_by = "count"',
        f"xd_encoder.segment_length = {length}",
        f"xd_encoder.history_tokens = {tokens}",
        f"xd_encoder.segment_lookback = {lookback}",
    )


# What an ablation compares unless told otherwise.
COMPARED: dict[str, tuple[str, ...]] = {
    "hstu-catalogue": ('xd_train.negatives = "catalogue"',),
    "hstu": (),
    "hstu+target": ("xd_encoder.target_domain_embedding = True",),
    "mask": _MASK,
    "mask+tape": (*_MASK, *_TAPE),
    "mask+ddsr": (*_MASK, *_DDSR),
    "mask+view": (*_MASK, *_VIEW),
    "all": _ALL,
}
# Long histories: the latest 33 to 64 events of a run alone; tokens for what went before the open
# segment of at most 64; shorter segments, the latest of them read beside their tokens.
_SHORTENED = {
    "recent": _segments(32, 0, 1),
    **{f"tokens{tokens}": _segments(64, tokens, 0) for tokens in (1, 4, 16)},
    "tokens1+lookback": _segments(16, 1, 1),
}
LONG_HISTORIES: dict[str, tuple[str, ...]] = {
    f"{name}+{shortened}": (*switches, *segments)
    for name, switches in (("hstu", ()), ("all", _ALL))
    for shortened, segments in _SHORTENED.items()
}
# Every position is asked for one other domain, too; full attention that is told the domain and
# full attention that is not are the controls.
_ASKED = ("xd_train.asked_domains = 1",)
ASKED: dict[str, tuple[str, ...]] = {
    f"{name}+asked": (*COMPARED[name], *_ASKED) for name in ("hstu", "hstu+target", "all")
}
# Counted instead of trained.
COUNTED: dict[str, tuple[str, ...]] = {
    name: (f'xd_train.baseline = "{name}"',) for name in BASELINES
}
# Other architectures under the same trainer, loss and negatives.
OTHERS: dict[str, tuple[str, ...]] = {
    "sasrec": (
        'xd_encoder.layer = "sasrec"',
        'xd_encoder.normalization = "softmax"',
        "xd_encoder.enable_relative_attention_bias = False",
    ),
}
# One model a domain, each trained on its events alone: what training together gives or takes.
SINGLE = "single"
ALONE: dict[str, tuple[str, ...]] = {SINGLE: ()}
VARIANTS = COMPARED | LONG_HISTORIES | ASKED | COUNTED | OTHERS | ALONE


def variant_file(name: str) -> Path | None:
    """Tell a user's gin file, which is a variant named after it, from the name of one of ours.

    Raises:
        InputError: no such file, or it would be named as another variant is.
    """
    if Path(name).suffix != ".gin":
        return None
    if (file := find_file(Path(name))) is None:
        raise InputError(f"variant {name}: no such file in {Path.cwd()}")
    if file.stem in VARIANTS:
        raise InputError(f"variant {name}: {file.stem!r} is the name of another; rename the file")
    return file


def variant_bindings(name: str) -> tuple[str, ...]:
    """Bindings of a variant; none of a user's gin file, which holds its own.

    Raises:
        InputError: unknown name; the message gives the nearest.
    """
    if name in VARIANTS:
        return VARIANTS[name]
    if variant_file(name) is not None:
        return ()
    raise InputError(
        f"unknown variant {name!r}; known: {', '.join(VARIANTS)}{did_you_mean(name, VARIANTS)}"
    )


def parse_variants(text: str | None) -> Sequence[str]:
    """Split "a,b,mine.gin" into names and gin files; none for None."""
    names = [] if text is None else [name.strip() for name in text.split(",")]
    for name in names:
        variant_bindings(name)
    return list(dict.fromkeys(names))


def recipe_of(
    variant: str, files: Sequence[Path], bindings: Sequence[str]
) -> tuple[list[Path], list[str]]:
    """Lay a variant on top of the recipe that all share: its gin files and bindings, in order.

    Bindings are those of the command line, so they win over a variant's file, too.
    """
    file = variant_file(variant)
    return [*files, *([file] if file else [])], [*bindings, *variant_bindings(variant)]


def check_name(variant: str, settings: RunSettings) -> None:
    """Refuse a recipe that switches on what the variant's name leaves out.

    A gin file is named after nothing that is in it, so it may set what it likes.
    """
    if variant_file(variant) is not None:
        return
    if settings.train.baseline != NO_BASELINE and variant not in COUNTED:
        raise InputError(
            f"variant {variant!r} would have xd_train.baseline = {settings.train.baseline!r} from "
            "the recipe and its row another model's numbers; name the baseline as a variant"
        )
    named = {binding.partition(" = ")[0] for binding in variant_bindings(variant)}
    for switch in SWITCHES:
        default = getattr(EncoderSettings, switch)
        value = settings.encoder.get(switch, default)
        if value != default and f"xd_encoder.{switch}" not in named:
            raise InputError(
                f"variant {variant!r} would have xd_encoder.{switch} = {value!r} from the recipe "
                "and its row another model's numbers; leave switches out of the recipe"
            )
