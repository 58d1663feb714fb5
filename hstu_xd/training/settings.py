"""Settings of a training run, read from gin files and bindings and checked before any work."""

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hstu_xd.data.batches import Split
from hstu_xd.data.store import InteractionStore
from hstu_xd.data.window import Window
from hstu_xd.declaration import check, inert, setting
from hstu_xd.errors import InputError
from hstu_xd.evaluation.baselines import BASELINES, NO_BASELINE
from hstu_xd.evaluation.protocol import ALL, Protocol
from hstu_xd.evaluation.protocol import BLOCK as PROTOCOL_BLOCK
from hstu_xd.model.featured_items import BLOCK as ITEM_BLOCK
from hstu_xd.model.featured_items import ItemSettings
from hstu_xd.model.settings import EncoderSettings
from hstu_xd.training.extension import (
    RETRIEVAL,
    ForeignCode,
    check_layer,
    check_metrics,
    check_parts,
    parts_of,
)
from hstu_xd.training.gin_files import gin_lines, names_in_gin, read_blocks, register
from hstu_xd.training.optimization import SCHEDULES
from hstu_xd.training.search_space import BLOCK as TUNE_BLOCK
from hstu_xd.training.search_space import Dimension, TuneSettings, parse_space

_logger = logging.getLogger(__name__)


# Where the users of a step follow from its events: the fewest of them, and the steps of an epoch.
_FEWEST_USERS, _STEPS_OF_EPOCH = 32, 32

# What the settings of this package's objective need, and those of its questions.
_RETRIEVAL = {"objective": RETRIEVAL}
_ASKED = {"asked_domains": ...} | _RETRIEVAL


@dataclasses.dataclass(frozen=True)
class TrainSettings:
    """What ``xd_train.*`` bindings set; names follow upstream's ``train_fn`` where it has them.

    Attributes:
        max_sequence_length: latest events of a history that are read.
        older_per_domain: events of each domain that are read beside those, the latest ones before
            them: of a rare domain some stay, however much of the others follows.
        gr_output_length: room for outputs in the padded length; as in upstream, attention is
            divided by the most events that are read, and ``gr_output_length + 1``.
        item_embedding_dim: model width.
        domain: name of the only domain that is read, trained on and ranked, as if the log had no
            other; "": all. Such a run is a control, beside one of each other domain: what training
            them together gives or takes.
        train_until: the last split whose targets train. "train": validation picks the epoch.
            "valid": validation targets are trained on, too, so that all of num_epochs are trained
            and the last one is kept. "test": everything is, and nothing is left to measure by.
        local_batch_size: users per step and process; 0: as many as ``events_per_step`` says.
        events_per_step: training events that the users of a process's step have on average; at
            least 32 users, and at most a 32nd of all, so that an epoch of a small log has steps.
        eval_batch_size: users encoded at once in evaluation.
        dropout_rate: dropout on the input features.
        objective: what is minimised and what ranks: "retrieval" (sampled softmax, dot products), or
            one of your own, ``@my_objective()``.
        baseline: "none", or what is counted in the training log and ranks in the place of a model:
            "popularity", "popularity-recent", or "itemknn" (neighbours of the last item).
        recent_share: latest share of the training events that "popularity-recent" counts.
        num_negatives: sampled negatives per positive.
        negatives: where negatives are drawn, "domain" (the positive's own) or "catalogue" (all
            items, as upstream); or a sampler of your own, ``@my_sampler``.
        temperature: what the loss divides the dot products of unit vectors by.
        asked_domains: domains that every position is asked for beside that of its next event: the
            next event of each is a target too, read out for it without a trace in the history. 0:
            none; where more domains come again in the training history, they are drawn.
        asked_weight: what such a target counts in the loss beside a position's own.
        asked_within_events: such a target is one of this many events after the position, at least
            2, as the first is its own target; 0: any.
        asked_within_time: such a target comes at most this much later, in the log's unit of time;
            0: at any time.
        learning_rate: peak rate of AdamW.
        learning_rate_schedule: the way down from the peak over all of num_epochs, "constant" (no
            way down), "linear" or "cosine".
        final_rate_share: what such a schedule leaves of the peak rate at its end.
        weight_decay: weight decay of AdamW.
        embedding_decay_share: what the table of items takes of the weight decay; 0: none.
        num_warmup_steps: steps of linear warm-up.
        average_decay: above 0, an exponential moving average of the weights is evaluated and saved
            in their place; it keeps this much of itself in a step, and in the beginning less,
            (1 + n) / (10 + n) after n steps. 0: none.
        num_epochs: passes over the training users at most.
        early_stop_patience: epochs without a better validation ``select_metric`` before stopping.
        metrics: further functions of ranks of your own, ``(@my_metric,)``.
        select_metric: the validation metric that picks the best epoch, of all targets or of a group
            that evaluate prints: "ndcg@100", "ndcg@100[switch]", "ndcg@100[books]".
        checkpoint_every: steps between two saves of the resumable state; epochs end with one.
        new_items: how items begin that a continued run has not met, "domain-mean" (around the mean
            of their domain's), "co-occurring" (around the mean of those next to them in the
            training histories, where there are some), or "random".
        news_context: events before a user's new ones that a continued run reads, and trains on,
            beside those; more of them cost more and bring the histories closer to whole ones.
        replay_share: share of the users without new events that each epoch of a continued run
            trains on beside all who have some; 1: everybody, as in a first training.
        main_module_bf16: compute in bfloat16 by autocast (CUDA only).
        random_seed: seed of weights, order, dropout and negatives.
    """

    max_sequence_length: int = setting(100, at_least=1, also=("max_len", "window"))
    older_per_domain: int = setting(
        0, at_least=0, also=("hard_search", "domain_window", "max_len_per_domain", "quota")
    )
    gr_output_length: int = setting(10, at_least=0)
    item_embedding_dim: int = setting(128, at_least=1, also=("width", "hidden_size", "d_model"))
    domain: str = setting("", also=("single_domain", "per_domain"))
    train_until: str = setting(
        Split.TRAIN.value,
        allowed=tuple(split.value for split in Split),
        also=("refit", "retrain_with_validation", "train_on"),
    )
    local_batch_size: int = setting(0, at_least=0)
    events_per_step: int = setting(1500, at_least=1, needs={"local_batch_size": 0})
    eval_batch_size: int = setting(256, at_least=1)
    dropout_rate: float = setting(0.5, at_least=0, below=1, also=("dropout",))
    objective: str = setting(RETRIEVAL, part=True, also=("loss",))
    baseline: str = setting(NO_BASELINE, allowed=(NO_BASELINE, *BASELINES))
    recent_share: float = setting(
        0.1,
        above=0,
        at_most=1,
        needs={"baseline": "popularity-recent"},
        also=("popularity_window",),
    )
    num_negatives: int = setting(2048, at_least=1, needs=_RETRIEVAL)
    negatives: str = setting(
        "domain",
        allowed=("domain", "catalogue"),
        part=True,
        needs=_RETRIEVAL,
        also=("negative_sampling", "sampling_strategy"),
    )
    temperature: float = setting(0.1, above=0, needs=_RETRIEVAL)
    asked_domains: int = setting(0, at_least=0, needs=_RETRIEVAL, also=("ask", "auxiliary_targets"))
    asked_weight: float = setting(1.0, above=0, needs=_ASKED)
    asked_within_events: int = setting(0, at_least=0, needs=_ASKED, also=("horizon",))
    asked_within_time: int = setting(0, at_least=0, needs=_ASKED)
    learning_rate: float = setting(2e-3, above=0, also=("lr",))
    learning_rate_schedule: str = setting(
        "constant", allowed=SCHEDULES, also=("lr_schedule", "scheduler")
    )
    final_rate_share: float = setting(
        0.0, at_least=0, at_most=1, needs={"learning_rate_schedule": SCHEDULES[1:]}
    )
    weight_decay: float = setting(1e-2, at_least=0, also=("wd", "l2"))
    embedding_decay_share: float = setting(1.0, at_least=0, needs={"weight_decay": ...})
    num_warmup_steps: int = setting(100, at_least=0)
    average_decay: float = setting(0.998, at_least=0, below=1, also=("ema", "ema_decay"))
    num_epochs: int = setting(40, at_least=1, also=("max_epochs",))
    early_stop_patience: int = setting(5, at_least=1)
    metrics: tuple[str, ...] = setting((), part=True)
    select_metric: str = setting("ndcg@100")
    checkpoint_every: int = setting(1000, at_least=1)
    new_items: str = setting(
        "domain-mean",
        allowed=("domain-mean", "co-occurring", "random"),
        also=("continue", "warm_start"),
    )
    news_context: int = setting(5, at_least=0, also=("continue",))
    replay_share: float = setting(0.1, at_least=0, at_most=1, also=("continue", "rehearsal"))
    main_module_bf16: bool = setting(False, also=("amp", "mixed_precision", "dtype"))
    random_seed: int = setting(42, at_least=0, at_most=2**64 - 1)

    def __post_init__(self) -> None:
        check(self, "xd_train.{name} = {value!r}; it must be {needed}")
        check_parts(self)

    @property
    def until(self) -> Split:
        """The last split whose targets train."""
        return Split(self.train_until)

    @property
    def window(self) -> Window:
        """Which events of a history are read."""
        return Window(self.max_sequence_length, self.older_per_domain)

    def norm_length(self, num_domains: int) -> int:
        """Return the constant ``N`` that upstream divides attention by."""
        return self.window.size(num_domains) + self.gr_output_length + 1

    def users_per_step(self, events: np.ndarray) -> int:
        """Return how many users a process takes in a step.

        Users of some logs have a handful of events and those of others hundreds: a recipe that is
        right for one of them is right for steps of as many events, not of as many users.

        Args:
            events: (users,) int, training events of each user of an epoch.
        """
        if self.local_batch_size:
            return self.local_batch_size
        enough = round(self.events_per_step * events.size / max(1, int(events.sum())))
        return max(1, min(max(_FEWEST_USERS, enough), events.size // _STEPS_OF_EPOCH))


# What earlier runs do not record, as they knew nothing else.
_EARLIER = {"train_until": Split.TRAIN.value}

# What gin files bind: block -> the settings of it.
BLOCKS: dict[str, type] = {
    "xd_encoder": EncoderSettings,
    "xd_train": TrainSettings,
    ITEM_BLOCK: ItemSettings,
    PROTOCOL_BLOCK: Protocol,
    TUNE_BLOCK: TuneSettings,
}


@dataclasses.dataclass(frozen=True)
class RunSettings:
    """All bindings of a run: the encoder's, without what the data decide, the trainer's, and more.

    Attributes:
        encoder: the encoder's, by name.
        train: the trainer's.
        protocol: of its evaluations.
        foreign: what the parts among them need that are not of this package.
        tune: of a search over them, which a run does not store.
        item: what items are told by beside their own row.
    """

    encoder: Mapping[str, Any]
    train: TrainSettings
    protocol: Protocol = dataclasses.field(default_factory=Protocol)
    foreign: ForeignCode = dataclasses.field(default_factory=ForeignCode)
    tune: TuneSettings = dataclasses.field(default_factory=TuneSettings)
    item: ItemSettings = dataclasses.field(default_factory=ItemSettings)

    @property
    def search_space(self) -> list[Dimension]:
        """What a search tries."""
        return parse_space(self.tune.space, BLOCKS)

    @property
    def flat(self) -> dict[str, Any]:
        """Every setting of a run by its full name, ``xd_train.learning_rate``."""
        return {
            f"{block}.{name}": getattr(settings, name)
            for block, settings in self._blocks().items()
            for name in names_in_gin(type(settings))
        }

    def _blocks(self) -> dict[str, Any]:
        return {
            "xd_encoder": self.encoder_settings(num_domains=1),
            "xd_train": self.train,
            ITEM_BLOCK: self.item,
            PROTOCOL_BLOCK: self.protocol,
        }

    def __post_init__(self) -> None:
        check_metrics(self.train, self.protocol)

    @property
    def parts(self) -> dict[str, str]:
        """Names of the parts that are not of this package, by what they are."""
        return parts_of(self.encoder, self.train)

    def encoder_settings(self, num_domains: int) -> EncoderSettings:
        """Build the encoder's settings for a catalogue of ``num_domains`` domains."""
        return EncoderSettings(
            num_domains=num_domains,
            norm_length=self.train.norm_length(num_domains),
            embedding_dim=self.train.item_embedding_dim,
            **self.encoder,
        )

    def on(self, store: InteractionStore) -> "RunSettings":
        """Return the settings with what a store decides, see :meth:`Protocol.on`."""
        return dataclasses.replace(self, protocol=self.protocol.on(store))

    def to_gin(self) -> str:
        """Write every setting, defaults included, as a gin file that reads back the same."""
        lines = ["import hstu_xd.training.settings", *self.foreign.imports, ""]
        for block, settings in self._blocks().items():
            lines += [*gin_lines(block, settings), ""]
        lines += [*self.foreign.bindings, ""] if self.foreign.bindings else []
        return "\n".join(lines)

    def unlike(self, recorded: Mapping[str, Any]) -> list[str]:
        """List settings that are not a run's, each as ``not xd_train.num_epochs = 5 but 2``.

        Args:
            recorded: the run's ``run.json``; a setting that it does not know is not compared.
        """
        encoder = self.encoder_settings(recorded["encoder"]["num_domains"])
        pairs = (
            ("xd_encoder", encoder, recorded["encoder"]),
            ("xd_train", self.train, _EARLIER | recorded["train"]),
            (ITEM_BLOCK, self.item, recorded.get("item") or {}),
            (PROTOCOL_BLOCK, self.protocol, recorded.get("protocol") or {}),
        )
        return [
            f"not {block}.{name} = {value!r} but {theirs[name]!r}"
            for block, ours, theirs in pairs
            for name, value in dataclasses.asdict(ours).items()
            if name in theirs and (list(value) if type(value) is tuple else value) != theirs[name]
        ]


def load_settings(
    files: Sequence[Path], bindings: Sequence[str] = (), *, before: Sequence[str] = ()
) -> RunSettings:
    """Read gin files in order, then bindings; later ones win.

    Args:
        files: gin files; one that is not in the working folder, such as ``gin/standalone/xd.gin``,
            is looked up among those of this package. What they import may lie beside them or in the
            working folder.
        bindings: single settings, ``xd_encoder.ddsr = True``.
        before: single settings that the files may bind otherwise.

    Raises:
        InputError: a file that is not there, a line gin cannot parse, an unknown name (the message
            gives the nearest), a value of the wrong type, or a binding that nothing reads.
    """
    bound = read_blocks(files, bindings, BLOCKS, before=before)
    encoder, train = bound.blocks["xd_encoder"], TrainSettings(**bound.blocks["xd_train"])
    check_layer(encoder.get("layer"))
    protocol = Protocol(**bound.blocks[PROTOCOL_BLOCK])
    tune = TuneSettings(**bound.blocks[TUNE_BLOCK])
    item = ItemSettings(**bound.blocks[ITEM_BLOCK])
    settings = RunSettings(encoder, train, protocol, bound.foreign, tune, item)
    parse_space(tune.space, BLOCKS)
    # Range checks, before any data are read.
    _check_together(settings.encoder_settings(num_domains=1), train, protocol, item)
    return settings


def _check_together(
    encoder: EncoderSettings, train: TrainSettings, protocol: Protocol, item: ItemSettings
) -> None:
    """Refuse settings that exclude one another, and say which do nothing."""
    if train.asked_domains and train.asked_within_events == 1:
        raise InputError(
            "xd_train.asked_within_events = 1 leaves nothing to ask: the first event after a "
            "position is its own target; give at least 2, or 0 for any"
        )
    if train.asked_domains and encoder.normalization != "silu":
        raise InputError(
            f"xd_train.asked_domains = {train.asked_domains} needs xd_encoder.normalization = "
            f"'silu', got {encoder.normalization!r}: a question reads earlier events and itself, "
            "and softmax of both is no sum of two"
        )
    if train.domain and protocol.candidates == ALL:
        raise InputError(
            f"xd_train.domain = {train.domain!r} trains no item of another domain, and "
            "xd_evaluate.candidates = 'all' ranks them; rank among 'domain'"
        )
    if item.features and train.baseline != NO_BASELINE:
        _logger.warning(
            "%s.features = %r does nothing while xd_train.baseline is %r",
            *(ITEM_BLOCK, item.features, train.baseline),
        )
    blocks = (
        ("xd_encoder", encoder),
        ("xd_train", train),
        (ITEM_BLOCK, item),
        (PROTOCOL_BLOCK, protocol),
    )
    for block, settings in blocks:
        for name, needed in inert(type(settings), vars(settings)):
            _logger.warning(
                "%s.%s = %r does nothing while %s.%s is %r",
                *(block, name, getattr(settings, name)),
                *(block, needed, getattr(settings, needed)),
            )
    own_heads = encoder.target_view_heads < encoder.num_heads
    masked = len(set(encoder.full_attention_layers)) < encoder.num_blocks
    if encoder.domain_mask and not encoder.has_segments and not (own_heads and masked):
        _logger.warning(
            "xd_encoder.domain_mask = True does nothing: every %s",
            "layer keeps full attention" if own_heads else "head reads the target domain",
        )


# The settings classes as gin sees them: called, they take what is bound.
CONFIGURABLES = register(BLOCKS)


def refuse_other_blocks(host: str, reads: Sequence[str], mend: str) -> None:
    """Refuse bindings of this package's own trainer where another trainer runs.

    Args:
        host: that one.
        reads: blocks that it reads, of which some are shared.
        mend: what it has in their place.

    Raises:
        InputError: the message names the binding.
    """
    import gin

    *others, last = (f"{block}.*" for block in reads)
    known = f"{', '.join(others)} and {last}" if others else last
    for block in BLOCKS:
        for name, value in () if block in reads else gin.get_bindings(block).items():
            raise InputError(
                f"{block}.{name} = {value!r}: {host} reads {known} only; "
                f"remove the binding ({mend})"
            )
