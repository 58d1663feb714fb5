"""Settings of a ranking run: what of a history is read, how, and the ranker with its training."""

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from hstu_xd.declaration import check, inert, labels, setting, settings_of
from hstu_xd.errors import InputError
from hstu_xd.evaluation.metrics import check_selected
from hstu_xd.interest.settings import KIND_NAMES, InterestSettings
from hstu_xd.model.settings import EncoderSettings
from hstu_xd.search.soft import TABLES
from hstu_xd.training import settings as training_settings
from hstu_xd.training.gin_files import gin_lines, names_in_gin, read_blocks, register
from hstu_xd.training.search_space import BLOCK as TUNE_BLOCK
from hstu_xd.training.search_space import Dimension, TuneSettings, parse_space

_logger = logging.getLogger(__name__)
_HARD, _SOFT = {"kind": "hard"}, {"soft": TABLES}
# Metrics that a better model has higher.
SELECTABLE = ("gauc", "auc", "ndcg@10", "mrr")


@dataclass(frozen=True)
class SearchSettings:
    """What ``xd_search.*`` bindings set.

    Attributes:
        kind: which events of a history ``xd_interest`` reads: "recent" (the latest) or "hard"
            (those nearest to the candidate in the taxonomy, the latest of these first).
        k: how many events.
        levels: levels of the taxonomy that "hard" searches, by name; (): all.
        skip_recent: latest events that "hard" leaves out.
        fill: whether "hard" fills up with the latest events where fewer match.
        quotas: most events that "hard" takes of each level it searches, in their order; 0: any
            number. (): no level has one.
        scope: whether "hard" reads events of all domains or of the candidate's ("target_domain").
        soft: whether the k events of the highest learned score, out of the whole history, are a
            view beside that of ``xd_interest``, and of which tables: "decoupled" (one set finds and
            weighs, another is read), and the controls "shared" (one set), "projection" (one set, of
            which a projection finds) and "four" (candidates and events apart); "none": no soft
            search. With ``xd_interest.kind`` "none" it is the only view.
        width: of what soft search reads of each field.
        attention_width: of what it finds and weighs by; 0: ``width``.
        auxiliary: whether layers of their own learn from all events, too, weighed by the tables
            that find: these learn of events that were not found.
    """

    kind: str = setting("recent", allowed=("recent", "hard"), label={"hard": "hard"})
    k: int = setting(50, at_least=1, label="{k} events", also=("window", "max_len"))
    levels: tuple[str, ...] = setting((), needs=_HARD)
    skip_recent: int = setting(0, at_least=0, needs=_HARD)
    fill: bool = setting(True, needs=_HARD)
    quotas: tuple[int, ...] = setting((), at_least=0, needs=_HARD)
    scope: str = setting("all", allowed=("all", "target_domain"), needs=_HARD)
    soft: str = setting(
        "none",
        allowed=("none", *TABLES),
        label={"decoupled": "soft", ...: "soft {soft}"},
        also=("tables", "dare", "twin"),
    )
    width: int = setting(16, at_least=1, needs=_SOFT)
    attention_width: int = setting(0, at_least=0, needs=_SOFT)
    auxiliary: bool = setting(True, needs=_SOFT, also=("auxiliary loss",))

    def __post_init__(self) -> None:
        check(self, "xd_search.{name} = {value!r}; it must be {needed}")
        if self.soft == "shared" and self.attention_width not in (0, self.width):
            raise InputError(
                f"xd_search.attention_width = {self.attention_width} with xd_search.soft = "
                f"'shared' of xd_search.width = {self.width}: one table has one width; leave it "
                "out, or take other tables"
            )


@dataclass(frozen=True)
class ShortSettings:
    """What ``xd_short.*`` bindings set; the encoder's own are ``xd_encoder.*``, as in training.

    Attributes:
        events: latest events before a request that the encoder reads, which is asked for the domain
            of each candidate: another view of it beside that of ``xd_interest``; 0: none.
        width: of the encoder.
    """

    events: int = setting(
        0,
        at_least=0,
        label="encoder of {events}",
        also=("short branch", "domain branch", "window", "max_sequence_length"),
    )
    width: int = setting(
        32,
        at_least=1,
        needs={"events": ...},
        label="encoder width {width}",
        also=("embedding_dim", "hidden_size", "d_model"),
    )

    def __post_init__(self) -> None:
        check(self, "xd_short.{name} = {value!r}; it must be {needed}")


@dataclass(frozen=True)
class RankSettings:
    """What ``xd_rank.*`` bindings set.

    Attributes:
        item_width: width of the items' vectors.
        level_width: width of the vectors of each level's nodes.
        goal_width: width of the goals' vectors.
        hidden: widths of the layers that read all of it.
        init_std: of the tables' beginning; too small, likeness is not seen (0.1 left the AUC at
            0.56 where 0.5 gave 0.75).
        min_item_count: items with fewer training events have no vector of their own.
        table_learning_rate: rate of AdamW for the tables.
        learning_rate: rate of AdamW for the rest.
        weight_decay: of the rest; tables have none.
        batch_requests: requests in a step.
        num_epochs: passes over the training requests at most.
        early_stop_patience: epochs without a better ``select_metric`` before stopping.
        select_metric: the validation metric that picks the best epoch, of all candidates or of a
            group that evaluate prints: "gauc", "gauc[books]", "ndcg@10[deal=true]".
        random_seed: seed of weights and order.
    """

    item_width: int = setting(16, at_least=1)
    level_width: int = setting(16, at_least=1)
    goal_width: int = setting(8, at_least=1)
    hidden: tuple[int, ...] = setting((64, 32))
    init_std: float = setting(0.5, above=0, also=("initialisation",))
    min_item_count: int = setting(5, at_least=1)
    table_learning_rate: float = setting(0.02, above=0)
    learning_rate: float = setting(3e-3, above=0, also=("lr",))
    weight_decay: float = setting(1e-4, at_least=0)
    batch_requests: int = setting(64, at_least=1, also=("batch_size",))
    num_epochs: int = setting(3, at_least=1, also=("max_epochs",))
    early_stop_patience: int = setting(1, at_least=1)
    select_metric: str = setting("gauc")
    random_seed: int = setting(42, at_least=0, at_most=2**64 - 1)

    def __post_init__(self) -> None:
        check(self, "xd_rank.{name} = {value!r}; it must be {needed}")
        check_selected("xd_rank.select_metric", self.select_metric, SELECTABLE, "unseen")
        if any(width < 1 for width in self.hidden):
            raise InputError(f"xd_rank.hidden = {self.hidden!r}; it must be widths of at least 1")


BLOCKS: dict[str, type] = {
    "xd_search": SearchSettings,
    "xd_interest": InterestSettings,
    "xd_rank": RankSettings,
    "xd_short": ShortSettings,
    "xd_encoder": EncoderSettings,
}
# What a search tries unless told otherwise.
SPACE = (
    "xd_rank.table_learning_rate = (5e-3, 0.05, 'log')",
    "xd_rank.learning_rate = (1e-3, 0.01, 'log')",
    "xd_rank.init_std = (0.2, 1.0, 'log')",
    "xd_rank.weight_decay = (1e-5, 1e-2, 'log')",
    "xd_rank.item_width, xd_rank.level_width = [8, 16, 32]",
)


@dataclass(frozen=True)
class RankingSettings:
    """All bindings of a ranking run.

    Attributes:
        search: which events are read.
        interest: how they are read.
        rank: the ranker and its training.
        tune: of a search over them, which a run does not store.
        short: the domain branch.
        encoder: its encoder, but for what :meth:`encoder_settings` decides.
    """

    search: SearchSettings = field(default_factory=SearchSettings)
    interest: InterestSettings = field(default_factory=InterestSettings)
    rank: RankSettings = field(default_factory=RankSettings)
    tune: TuneSettings = field(default_factory=lambda: TuneSettings(SPACE))
    short: ShortSettings = field(default_factory=ShortSettings)
    encoder: EncoderSettings = field(default_factory=lambda: EncoderSettings(1, 1))

    def __post_init__(self) -> None:
        if self.short.events:
            self._check_encoder()
        elif self.interest.domain_states:
            raise InputError(
                "xd_interest.domain_states = True with xd_short.events = 0: there is no encoder "
                "whose states could be read; give xd_short.events, or leave it out"
            )
        if self.interest.kind == "towers":
            self._check_towers()

    def _check_encoder(self) -> None:
        encoder = self.encoder_settings(num_domains=1)
        if encoder.layer != "hstu":
            raise InputError(
                f"xd_encoder.layer = {encoder.layer!r} with xd_short.events = {self.short.events}: "
                "a ranker encodes with HSTU's layers alone; leave xd_encoder.layer out"
            )
        if encoder.normalization != "silu":
            raise InputError(
                f"xd_encoder.normalization = {encoder.normalization!r} with xd_short.events = "
                f"{self.short.events}: the encoder is asked for several domains of one history, "
                "which needs 'silu'; leave xd_encoder.normalization out"
            )

    def _check_towers(self) -> None:
        for name, value, off in (
            ("xd_search.kind", self.search.kind, "recent"),
            ("xd_search.soft", self.search.soft, "none"),
            ("xd_interest.counts", self.interest.counts, False),
            ("xd_short.events", self.short.events, 0),
        ):
            if value != off:
                raise InputError(
                    f"{name} = {value!r} with xd_interest.kind = 'towers', which reads the history "
                    f"without the candidate; give {name} = {off!r}, or another kind"
                )

    def encoder_settings(self, num_domains: int) -> EncoderSettings:
        """Complete the encoder's settings for a catalogue of ``num_domains`` domains."""
        return replace(
            self.encoder,
            num_domains=num_domains,
            norm_length=self.short.events,
            embedding_dim=self.short.width,
        )

    @property
    def latest(self) -> int:
        """How many of the latest events are read beside those that a search finds.

        What is told of a switch needs one.
        """
        return max(self.short.events, int(self.interest.tape))

    @property
    def search_space(self) -> list[Dimension]:
        """What a search tries."""
        return parse_space(self.tune.space, BLOCKS)

    @property
    def flat(self) -> dict[str, Any]:
        """Every setting of a run by its full name, ``xd_rank.learning_rate``."""
        return {
            f"{block}.{name}": getattr(each, name)
            for block, each in self.blocks.items()
            for name in names_in_gin(type(each))
        }

    @property
    def blocks(self) -> dict[str, Any]:
        """The settings by the name of their block."""
        return {block: getattr(self, block.removeprefix("xd_")) for block in BLOCKS}

    def to_gin(self) -> str:
        """Write every setting, defaults included, as a gin file that reads back the same."""
        blocks = ["\n".join(gin_lines(*each)) for each in self.blocks.items()]
        return "\n\n".join(["import hstu_xd.ranking.settings", *blocks]) + "\n"

    def facts(self) -> dict[str, Any]:
        """Return what ``run.json`` records of them, of an encoder where there is one."""
        facts = {block.removeprefix("xd_"): asdict(each) for block, each in self.blocks.items()}
        encoder = facts.pop("encoder")
        if self.short.events:
            facts["encoder"] = {name: encoder[name] for name in names_in_gin(EncoderSettings)}
        return facts

    def unlike(self, other: "RankingSettings") -> list[str]:
        """List settings that are not another's, each as ``not xd_search.k = 5 but 2``."""
        return [
            f"not {name} = {value!r} but {theirs!r}"
            for name, value in self.flat.items()
            if value != (theirs := other.flat[name])
        ]


def variant_name(settings: RankingSettings) -> str:
    """Name a run after its model: "TIN", "TIN + hard", "no events + counts", ..."""
    interest = settings.interest
    named = [*labels(settings.search), *labels(replace(interest, kind=InterestSettings.kind))]
    if settings.short.events:
        named += [*labels(settings.short), *labels(settings.encoder)]
    return " + ".join([KIND_NAMES[interest.kind], *named])


def load_ranking_settings(files: Sequence[Path], bindings: Sequence[str] = ()) -> RankingSettings:
    """Read gin files in order, then bindings; later ones win.

    Args:
        files: as :func:`hstu_xd.training.settings.load_settings` takes them.
        bindings: single settings, ``xd_search.k = 50``.

    Raises:
        InputError: as there.
    """
    bound = read_blocks(files, bindings, BLOCKS | {TUNE_BLOCK: TuneSettings}).blocks
    bound[TUNE_BLOCK].setdefault("space", SPACE)
    settings = RankingSettings(
        SearchSettings(**bound["xd_search"]),
        InterestSettings(**bound["xd_interest"]),
        RankSettings(**bound["xd_rank"]),
        TuneSettings(**bound[TUNE_BLOCK]),
        short := ShortSettings(**bound["xd_short"]),
        EncoderSettings(
            num_domains=1,
            norm_length=max(1, short.events),
            embedding_dim=short.width,
            **bound["xd_encoder"],
        ),
    )
    parse_space(settings.tune.space, BLOCKS)
    _warn_of_inert(settings)
    return settings


def _warn_of_inert(settings: RankingSettings) -> None:
    """Say which settings do nothing."""
    blocks = settings.blocks
    if not settings.short.events:
        encoder = blocks.pop("xd_encoder")
        for name in names_in_gin(EncoderSettings):
            if (value := getattr(encoder, name)) != settings_of(EncoderSettings)[name].default:
                _logger.warning(
                    "xd_encoder.%s = %r does nothing while xd_short.events is 0", name, value
                )
    for block, each in blocks.items():
        for name, needed in inert(type(each), vars(each)):
            _logger.warning(
                "%s.%s = %r does nothing while %s.%s is %r",
                *(block, name, getattr(each, name)),
                *(block, needed, getattr(each, needed)),
            )


# The settings classes as gin sees them; some are the same for all kinds of runs.
_SHARED = {name: training_settings.CONFIGURABLES[name] for name in ("xd_encoder", TUNE_BLOCK)}
CONFIGURABLES = _SHARED | register({k: v for k, v in BLOCKS.items() if k not in _SHARED})
