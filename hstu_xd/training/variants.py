"""The variants an ablation compares, each a list of gin bindings on top of one recipe."""

from collections.abc import Sequence
from difflib import get_close_matches

from hstu_xd.errors import InputError

_MASK = ("xd_encoder.domain_mask = True",)
_VIEW = ("xd_encoder.target_view_heads = 2",)
_TAPE = ("xd_encoder.tape = True",)
_DDSR = ("xd_encoder.ddsr = True",)
_ALL = (*_MASK, *_VIEW, *_TAPE, *_DDSR)
_SEGMENTS = ('xd_encoder.segment_by = "count"',)

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
# Long histories in segments of 64 events: the open one alone, or with tokens for those before.
LONG_HISTORIES: dict[str, tuple[str, ...]] = {
    f"{name}+tokens{tokens}" if tokens else f"{name}+recent": (
        *switches,
        *_SEGMENTS,
        f"xd_encoder.history_tokens = {tokens}",
    )
    for name, switches in (("hstu", ()), ("all", _ALL))
    for tokens in (0, 1, 4, 16)
}
VARIANTS = SWITCHES | LONG_HISTORIES


def variant_bindings(name: str) -> tuple[str, ...]:
    """Bindings of a variant.

    Raises:
        InputError: unknown name; the message gives the nearest.
    """
    if name in VARIANTS:
        return VARIANTS[name]
    near = get_close_matches(name, VARIANTS, n=1, cutoff=0.4)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise InputError(f"unknown variant {name!r}; known: {', '.join(VARIANTS)}{hint}")


def parse_variants(text: str | None) -> Sequence[str]:
    """Names out of "a,b,c"; the switches for None."""
    names = list(SWITCHES) if text is None else [name.strip() for name in text.split(",")]
    for name in names:
        variant_bindings(name)
    return list(dict.fromkeys(names))
