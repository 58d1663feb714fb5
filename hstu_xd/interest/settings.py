"""Settings of the interest stage."""

from dataclasses import dataclass

from hstu_xd.declaration import check, setting
from hstu_xd.errors import InputError

# Ways to read events, and what people call them.
KIND_NAMES = {
    "none": "no events",
    "mean": "mean",
    "din": "DIN",
    "tin": "TIN",
    "hstu": "HSTU pooling",
    "towers": "towers",
}
_TIN, _TOWERS = {"kind": "tin"}, {"kind": "towers"}
_PLACED = {"kind": ("tin", "hstu", "towers")}
_ASKED = {"kind": ("mean", "din", "tin", "hstu")}


@dataclass(frozen=True)
class InterestSettings:
    """What ``xd_interest.*`` bindings set.

    Attributes:
        kind: how found events are read: "tin" (temporal interest network), "din" (an MLP weighs
            them), "hstu" (HSTU's attention and gate), "mean" (all alike), "none" (no events are
            read) or "towers" (they are encoded without the candidate, whose score is a dot product,
            so that an index finds the best of a whole catalogue).
        counts: whether the ranker gets, of every level of the taxonomy, how often the user met the
            candidate's node and how long ago; no found events are needed for it.
        rank_encoding: whether events and candidate carry a vector of their place in what was found.
        gap_encoding: whether events carry a vector of the time since then, on a scale of powers of
            two.
        target_product: whether the interest is also multiplied with the candidate (the
            target-aware representation).
        goal_positions: "shared" (one table of places for all goals) or "additive" (each goal adds
            one of its own, which begins as zero).
        order: how many times the candidate is crossed with its interest, 1 to 4; 1 is TIN.
        form: how orders above 1 are made: "hop" (the candidate moves on with what it found) or
            "dense" (the events are crossed with the candidate before they are read again).
        norm: whether layers above the first normalise what they read.
        groups: fields whose likeness weighs the events, a TIN for each group, as
            ``("item+type", "all")``: levels by name, or "all". (): one TIN of all. As many "all"
            are the control of several TINs that are alike.
        tape: whether a candidate is told, to the vector that reads the events, which switch of
            domains it would be after the latest event; nothing is told at first.
        domain_states: whether the last hidden state of the encoder (``xd_short.events``) in each
            domain is read as one more event.
        hidden: width of the MLP of DIN.
        readout: how towers tell goals apart: "goal" (a read-out of one encoded history for each
            goal), "layer" (each has a last layer of its own, too), "tower" (each has an encoder of
            its own), and the controls "embedding" (one read-out, to which each goal adds a vector)
            and "shared" (one read-out for all goals).
        layers: of the encoder of towers.
        heads: of its attention.
    """

    kind: str = setting("tin", allowed=tuple(KIND_NAMES))
    counts: bool = setting(False, label="counts", also=("hand-made counts",))
    rank_encoding: bool = setting(True, needs=_PLACED, also=("tte",))
    gap_encoding: bool = setting(True, needs=_PLACED, also=("time",))
    target_product: bool = setting(True, needs=_TIN, also=("tr",))
    goal_positions: str = setting(
        "shared", allowed=("shared", "additive"), needs=_TIN, also=("target-decoupled",)
    )
    order: int = setting(1, at_least=1, at_most=4, needs=_TIN, also=("stacked",))
    form: str = setting("hop", allowed=("hop", "dense"), needs=_TIN)
    norm: bool = setting(True, needs=_TIN)
    groups: tuple[str, ...] = setting(
        (), needs={"kind": "tin", "order": 1}, also=("side information", "heads")
    )
    tape: bool = setting(False, needs=_ASKED, label="TAPE of candidates", also=("switch",))
    domain_states: bool = setting(False, needs=_ASKED, label="domain states", also=("ddsr",))
    hidden: int = setting(32, at_least=1, needs={"kind": "din"})
    readout: str = setting(
        "goal",
        allowed=("goal", "layer", "tower", "embedding", "shared"),
        needs=_TOWERS,
        label={...: "read-out {readout}"},
        also=("target-decoupled", "sasrec"),
    )
    layers: int = setting(2, at_least=1, needs=_TOWERS, also=("num_blocks",))
    heads: int = setting(2, at_least=1, needs=_TOWERS, also=("num_heads",))

    def __post_init__(self) -> None:
        check(self, "xd_interest.{name} = {value!r}; it must be {needed}")
        if self.groups and self.order > 1:
            raise InputError(
                f"xd_interest.groups = {self.groups!r} and xd_interest.order = {self.order}: a "
                "stack has one TIN a layer; leave one of them out"
            )
