"""gin settings of the plug-in: ``xd_dlrm.*``, and what it computes of the package's others."""

import dataclasses
import logging
from typing import Any

import torch

import gin
from hstu_xd.data.cuts import TimeCuts, cut_in_time
from hstu_xd.data.store import InteractionStore
from hstu_xd.declaration import check, defaults_of, inert, setting
from hstu_xd.errors import InputError
from hstu_xd.interest import InterestSettings
from hstu_xd.model.settings import EncoderSettings
from hstu_xd.ranking import settings as ranking
from hstu_xd.ranking.settings import SearchSettings
from hstu_xd.training import settings as shared
from hstu_xd.training.gin_files import check_types

_logger = logging.getLogger(__name__)

STORE_PREFIX = "xd:"
# The contextual feature that tells which goal a request was made for.
GOAL = "goal"
# The switches that are computed here; every other setting of the encoder is refused.
KNOWN_SWITCHES = (
    "domain_mask",
    "tape",
    "target_domain_embedding",
    "ddsr",
    "states_per_domain",
    "query_target_domain",
    "state_age_bias",
)
# Of ``xd_interest.*``, and the kinds by which candidates meet events.
KNOWN_INTEREST = (
    "kind",
    "rank_encoding",
    "gap_encoding",
    "target_product",
    "goal_positions",
    "order",
    "form",
    "norm",
    "hidden",
)
_MEETING_KINDS = ("tin", "din", "hstu", "mean")


@gin.configurable("xd_dlrm", module="hstu_xd")
@dataclasses.dataclass(frozen=True)
class DlrmSettings:
    """What ``xd_dlrm.*`` bindings set; ``hstu_*`` are named as in upstream's configuration.

    Attributes:
        hstu_attn_num_layers: number of layers; None, as in all of these: what upstream's file says.
        hstu_num_heads: attention heads of a layer.
        hstu_attn_qk_dim: width of each head's queries and keys.
        hstu_attn_linear_dim: width of each head's values.
        hstu_transducer_embedding_dim: model width.
        hstu_embedding_table_dim: width of the embedding tables, a multiple of 4.
        hstu_preprocessor_hidden_dim: width between the two layers of the preprocessor.
        hstu_input_dropout_ratio: dropout on the layers' input.
        hstu_linear_dropout_rate: dropout before each layer's output projection.
        causal_multitask_weights: factor of the loss.
        max_seq_len: rows of the longest sequence that upstream's data sets give; that of a prepared
            store follows from max_history.
        table_rows: rows that an embedding table has at most; 0: as many as upstream says. The data
            sets of upstream that hash ids hash them into so many.
        domain_features: names of the features with the domain of every history event and of every
            candidate.
        num_domains: number of domains; 0: that of the prepared store.
        norm_length: what attention is divided by in the place of the batch's longest history, so
            that a user's scores do not depend on who else is in the batch; 0: as upstream.
        positions: "recency" as upstream, which counts positions and times back from the request, or
            "order", which tells of an event its place in the history and the time since the event
            before it: a session keeps what it has computed when events are appended.
        kernel: "triton" or "pytorch" for the layers, both upstream's own; "auto": Triton where
            there is a GPU, else PyTorch, with groups of like length padded together under
            domain_mask or with a norm_length.
        bf16: whether layers compute in bfloat16 where there is a GPU.
        max_history: latest events of a user that a request of a prepared store reads; under hard
            search (``xd_search.kind``, for requests of ``hstu-xd requests``) of those it finds.
        cut_points: latest events of a user that become training requests; 0: all. Requests of
            ``hstu-xd requests`` have their own, and candidates.
        num_candidates: the next item and how many drawn from its domain, together.
        split: whom evaluation reads: "valid", the last event but one, or "test", the last, or
            those periods of a log that is cut in time. Training reads neither.
        valid_from: when validation begins, for all users alike: a date such as "2020-01-30", a time
            of the log, or the share of the events before it, 0.8; what is earlier trains, and
            evaluation asks for a user's last event of its period. Empty: leave-one-out.
        test_from: when test begins, told alike.
        ranked_requests: requests of evaluation, spread evenly, whose next item is ranked among all
            items of its domain, in chunks of norm_length - max_history (- 1 for user_token); 0:
            none.
        user_token: put a token with the user's own embedding before the history.
        domain_as_feature: embed the domain of events and candidates; the honest control.
        interest: add to each candidate's embedding what ``xd_interest.*`` makes of the events that
            its request shows, of which hard search finds the ones that matter; zero at first.
        warm_start: folder of a checkpoint of the stock model to start from, unless
            load_dmp_checkpoint.path names one to continue from; empty: none.
        seed: of PyTorch's random numbers and of the candidates.

    Raises:
        InputError: a value out of range.
    """

    hstu_attn_num_layers: int | None = setting(None, also=("num_blocks", "layers"))
    hstu_num_heads: int | None = setting(None, also=("num_heads",))
    hstu_attn_qk_dim: int | None = setting(None, also=("dqk",))
    hstu_attn_linear_dim: int | None = setting(None, also=("dv",))
    hstu_transducer_embedding_dim: int | None = setting(None, also=("embedding_dim",))
    hstu_embedding_table_dim: int | None = setting(None, also=("item_embedding_dim",))
    hstu_preprocessor_hidden_dim: int | None = setting(None)
    hstu_input_dropout_ratio: float | None = setting(None, also=("dropout_rate",))
    hstu_linear_dropout_rate: float | None = setting(None, also=("linear_dropout_rate",))
    causal_multitask_weights: float | None = setting(None)
    max_seq_len: int | None = setting(None)
    table_rows: int = setting(0, at_least=0, also=("hash_size",))
    domain_features: tuple[str, ...] = setting(("uih_domain", "item_domain"))
    num_domains: int = setting(0, at_least=0)
    norm_length: int = setting(0, at_least=0)
    positions: str = setting("recency", allowed=("recency", "order"))
    kernel: str = setting("auto", allowed=("auto", "triton", "pytorch"))
    bf16: bool = setting(True)
    max_history: int = setting(200, at_least=1, also=("max_sequence_length",))
    cut_points: int = setting(0, at_least=0)
    num_candidates: int = setting(10, at_least=2, also=("max_num_candidates", "num_negatives"))
    split: str = setting("valid", allowed=("valid", "test"))
    valid_from: str | int | float = setting("", also=("cut", "temporal_split", "time_split"))
    test_from: str | int | float = setting("", also=("cut", "temporal_split", "time_split"))
    ranked_requests: int = setting(0, at_least=0)
    user_token: bool = setting(True)
    domain_as_feature: bool = setting(False)
    interest: bool = setting(False, also=("xd_interest", "tin", "din", "target attention"))
    warm_start: str = setting("", also=("checkpoint",))
    seed: int = setting(42, also=("random_seed",))

    def __post_init__(self) -> None:
        check(self, "xd_dlrm.{name} = {value!r}; {needed} is needed")
        for name, value in self.sizes.items():
            if isinstance(value, bool) or not isinstance(value, int | float) or value < 0:
                raise InputError(f"xd_dlrm.{name} = {value!r}; a number above 0 is needed")
        if len(self.domain_features) != 2:
            raise InputError(
                f"xd_dlrm.domain_features = {self.domain_features!r}; two names are needed, of the "
                "history's and of the candidates' domains"
            )
        if (self.valid_from == "") != (self.test_from == ""):
            raise InputError(
                f"xd_dlrm.valid_from = {self.valid_from!r}, xd_dlrm.test_from = "
                f"{self.test_from!r}; a cut in time needs both"
            )
        if self.ranked_requests and self.chunk_length < 1:
            raise InputError(
                f"xd_dlrm.ranked_requests = {self.ranked_requests} needs xd_dlrm.norm_length above "
                f"max_history = {self.max_history}, got {self.norm_length}: scores of several "
                "chunks of candidates compare only where all are divided by the same"
            )
        if (self.hstu_embedding_table_dim or 0) % 4:
            raise InputError(
                f"xd_dlrm.hstu_embedding_table_dim = {self.hstu_embedding_table_dim}; a multiple "
                "of 4 is needed by the tables' kernels"
            )

    def cuts(self, store: InteractionStore) -> TimeCuts | None:
        """Find where a store's log is cut in time; None under leave-one-out.

        Raises:
            InputError: what is no date, time or share, or does not cut this log.
        """
        if self.valid_from == "":
            return None
        told = [f"xd_dlrm.{name} = {getattr(self, name)!r}" for name in ("valid_from", "test_from")]
        return cut_in_time(
            store.timestamps, self.valid_from, self.test_from, told=(told[0], told[1])
        )

    @property
    def chunk_length(self) -> int:
        """Candidates that fit behind the longest history within ``norm_length``."""
        return self.norm_length - self.max_history - int(self.user_token)

    @property
    def sizes(self) -> dict[str, Any]:
        """What takes the place of the numbers in upstream's configuration of the model."""
        found = {
            name: getattr(self, name)
            for name, default in defaults_of(type(self)).items()
            if default is None
        }
        return {name: value for name, value in found.items() if value is not None}


@dataclasses.dataclass(frozen=True)
class CrossDomain:
    """What a model of this plug-in computes beyond the stock one.

    Attributes:
        settings: the switches.
        domain_features: names of the features with the domains of history and candidates.
        norm_length: what attention is divided by; 0: the batch's longest sequence.
        in_buckets: pad groups of like length together, on a CPU; without domain_mask a user is a
            group.
        in_order: positions and times are told in the order of events.
        interest: how candidates meet the events that their request shows; None: not at all.
        num_goals: that requests are made for, where a feature tells which; else 0.
    """

    settings: EncoderSettings
    domain_features: tuple[str, str] = ("uih_domain", "item_domain")
    norm_length: int = 0
    in_buckets: bool = False
    in_order: bool = False
    interest: InterestSettings | None = None
    num_goals: int = 0

    @property
    def num_domains(self) -> int:
        """Number of domains ``D``."""
        return self.settings.num_domains

    @property
    def reads_domains(self) -> bool:
        """Whether anything is on that needs the domains of the rows."""
        return self.settings.is_cross_domain

    @property
    def is_stock(self) -> bool:
        """Whether the stock model computes the same."""
        return not (self.reads_domains or self.norm_length or self.in_order or self.interest)

    def norm_length_for(self, longest: int) -> int:
        """Return what attention is divided by in a batch with a longest sequence.

        Raises:
            InputError: the sequence is longer than ``norm_length``.
        """
        if not self.norm_length:
            return longest
        if longest > self.norm_length:
            raise InputError(
                f"xd_dlrm.norm_length = {self.norm_length}, but a batch's longest sequence with "
                f"its candidates has {longest} rows; raise it"
            )
        return self.norm_length


def cross_domain(settings: DlrmSettings, num_domains: int, config: Any) -> CrossDomain:
    """Build what the bindings of ``xd_encoder.*`` and ``xd_dlrm.*`` switch on.

    Args:
        settings: of ``xd_dlrm.*``.
        num_domains: of the data set; 0: it is not known.
        config: upstream's DlrmHSTUConfig, with the sizes of the layers.

    Raises:
        InputError: a setting of another trainer, a switch that is not computed here, or one that is
            on while no domains are known.
    """
    shared.refuse_other_blocks(
        "the host dlrm_v3",
        ("xd_dlrm", "xd_encoder", "xd_search", "xd_interest"),
        "cuts in time are xd_dlrm.valid_from and .test_from",
    )
    for name, value in gin.get_bindings("xd_rank").items():
        raise InputError(
            f"xd_rank.{name} = {value!r}: the host dlrm_v3 trains by upstream's own settings; "
            "remove the binding"
        )
    has_goals = GOAL in config.contextual_feature_to_max_length
    num_goals = len(config.action_weights or ()) if has_goals else 0
    _check_computed("xd_encoder", EncoderSettings, KNOWN_SWITCHES, " (sizes are xd_dlrm.hstu_*)")
    known = settings.num_domains or num_domains
    switches = shared.CONFIGURABLES["xd_encoder"](
        num_domains=known or 1,
        norm_length=1,
        embedding_dim=config.hstu_transducer_embedding_dim,
        num_heads=config.hstu_num_heads,
        dqk=config.hstu_attn_qk_dim,
        dv=config.hstu_attn_linear_dim,
    )
    if switches.is_cross_domain and not known:
        raise InputError(
            "xd_encoder has switches on but no domains are known; open a prepared store with "
            'dataset = "xd:<folder>", or set xd_dlrm.num_domains'
        )
    first, second = settings.domain_features
    in_buckets = settings.kernel == "auto" and not torch.cuda.is_available()
    in_buckets = in_buckets and (switches.domain_mask or settings.norm_length > 0)
    return CrossDomain(
        switches,
        (first, second),
        settings.norm_length,
        in_buckets=in_buckets,
        in_order=settings.positions == "order",
        interest=_bound_interest(num_goals) if settings.interest else _no_interest(),
        num_goals=num_goals,
    )


def _check_computed(block: str, cls: type, known: tuple[str, ...], more: str = "") -> None:
    """Refuse what a block binds beyond what is computed here.

    Args:
        block: of gin.
        cls: of its settings.
        known: those that are computed; others may have their default.
        more: what the message ends with.

    Raises:
        InputError: a value of another type, or another setting.
    """
    bound = dict(gin.get_bindings(block))
    check_types(cls, block, bound)
    defaults = defaults_of(cls)
    for name, value in bound.items():
        if name not in known and value != defaults[name]:
            raise InputError(
                f"{block}.{name} = {value!r}: the host dlrm_v3 computes {', '.join(known)} only; "
                f"remove the binding{more}"
            )


def _no_interest() -> None:
    for name, value in gin.get_bindings("xd_interest").items():
        raise InputError(
            f"xd_interest.{name} = {value!r} does nothing while xd_dlrm.interest is False; bind "
            "xd_dlrm.interest = True, or remove the binding"
        )


def _bound_interest(num_goals: int) -> InterestSettings:
    """Return what ``xd_interest.*`` binds: how candidates meet the events of their request."""
    _check_computed("xd_interest", InterestSettings, KNOWN_INTEREST)
    settings = ranking.CONFIGURABLES["xd_interest"]()
    if settings.kind not in _MEETING_KINDS:
        raise InputError(
            f"xd_interest.kind = {settings.kind!r} with xd_dlrm.interest = True: no candidate "
            f"meets an event; one of {', '.join(_MEETING_KINDS)} is needed"
        )
    if settings.goal_positions == "additive" and not num_goals:
        raise InputError(
            "xd_interest.goal_positions = 'additive': the requests tell of no goals; remove the "
            "binding, or make requests with goals (hstu-xd requests --goal)"
        )
    for name, needed in inert(InterestSettings, vars(settings)):
        _logger.warning(
            "xd_interest.%s = %r does nothing while xd_interest.%s is %r",
            *(name, getattr(settings, name), needed, getattr(settings, needed)),
        )
    return settings


def bound_search() -> SearchSettings:
    """Return what ``xd_search.*`` binds: which events requests with candidates of their own show.

    Raises:
        InputError: a value of another type or out of range.
    """
    check_types(SearchSettings, "xd_search", dict(gin.get_bindings("xd_search")))
    return ranking.CONFIGURABLES["xd_search"]()


def bound_value(name: str) -> Any:
    """Return what a parameter is bound to, ``make_model.dataset``; None where it is not bound."""
    try:
        value = gin.query_parameter(name)
    except ValueError:
        return None
    # A macro, %dataset, is bound as a reference to what the file says of it.
    reference = getattr(value, "scoped_configurable_fn", None)
    return reference() if reference else value
