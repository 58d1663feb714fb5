"""The variants an ablation compares, each a list of gin bindings on top of one recipe."""

from collections.abc import Sequence
from pathlib import Path

from hstu_xd.errors import InputError, did_you_mean

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
SWITCHES: dict[str, tuple[str, ...]] = {
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
VARIANTS = SWITCHES | LONG_HISTORIES


def variant_file(name: str) -> Path | None:
    """Tell a user's gin file, which is a variant named after it, from the name of one of ours.

    Raises:
        InputError: no such file, or it would be named as another variant is.
    """
    file = Path(name)
    if file.suffix != ".gin":
        return None
    if not file.is_file():
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
    """Split "a,b,mine.gin" into names and gin files; the switches for None."""
    names = list(SWITCHES) if text is None else [name.strip() for name in text.split(",")]
    for name in names:
        variant_bindings(name)
    return list(dict.fromkeys(names))
