"""yaml and command-line keys of the plug-in: ``xd_*`` and ``item_domain_path``, checked once."""

import dataclasses
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from typing import Any, get_type_hints

from hstu_xd.errors import InputError
from hstu_xd.model.settings import EncoderSettings

_logger = logging.getLogger(__name__)

HSTU_MODEL, HLLM_MODEL = "HSTU_XD", "HLLM_XD"
# This package's models -> REC's own that they extend.
MODELS = {HSTU_MODEL: "HSTU", HLLM_MODEL: "HLLM"}
PATH_KEY = "item_domain_path"
PREFIX = "xd_"
NEGATIVES = ("auto", "domain", "catalogue")
CANDIDATES = ("domain", "catalogue")
SWITCHES = ("domain_mask", "tape", "ddsr", "target_domain_embedding", "target_view_heads")
# Settings of the encoder that are keys here; its sizes are REC's own (n_layers, n_heads, ...) or
# the user LLM's.
ENCODER_KEYS = (
    *SWITCHES,
    "full_attention_layers",
    "state_from",
    "combine",
    "query_target_domain",
    "states_per_domain",
    "state_age_bias",
    "normalization",
    "segment_by",
    "segment_length",
    "segment_gap",
    "segment_lookback",
    "history_tokens",
    "impl",
)
_SEGMENTS = (
    "segment_by",
    "segment_length",
    "segment_gap",
    "segment_lookback",
    "history_tokens",
)
# What a user LLM's layers have no place for.
_HSTU_ONLY = (
    "target_view_heads",
    "state_from",
    "combine",
    "normalization",
    "impl",
    "relative_bias",
    *_SEGMENTS,
)
# Names too common for a key of somebody else's to be taken for ours without its prefix.
_COMMON = ("combine", "normalization", "impl", "negatives", "candidates", "warm_start")
_NEEDS_SWITCH = {
    "ddsr": (
        "state_from",
        "combine",
        "query_target_domain",
        "states_per_domain",
        "state_age_bias",
    ),
    "domain_mask": ("full_attention_layers",),
}
# Settings of segments -> ways to cut them that read it.
_NEEDS_CUT = {"segment_length": ("count",), "segment_gap": ("time_gap", "session")}
_DEFAULTS = {field.name: field.default for field in dataclasses.fields(EncoderSettings)} | {
    "relative_bias": False
}


@dataclasses.dataclass(frozen=True)
class RecSettings:
    """What the keys of a run ask for.

    Attributes:
        model: REC's key ``model``.
        item_domain_path: item -> domain file; empty: no domains are known.
        encoder: ``xd_<name>`` for the names of :data:`ENCODER_KEYS`, only those that were given.
        relative_bias: ``xd_relative_bias``; apply the relative attention bias, which REC builds
            and never applies; HSTU_XD only.
        negatives: ``xd_negatives``; "domain" (the positive's own), "catalogue" (as REC), or "auto":
            "domain" where a switch of the encoder is on, so that all off is REC's own model.
        candidates: ``xd_candidates``; whom the target is ranked against, "domain" (its own) or
            "catalogue" (as REC); for every model.
        warm_start: ``xd_warm_start``; a checkpoint of REC's trainer to continue from. Empty: none.

    Raises:
        InputError: a value that is not one of those named, a switch without domains, or a setting
            that the model does not have.
    """

    model: str
    item_domain_path: str = ""
    encoder: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    relative_bias: bool = False
    negatives: str = "auto"
    candidates: str = "domain"
    warm_start: str = ""

    def __post_init__(self) -> None:
        for name, known in (("negatives", NEGATIVES), ("candidates", CANDIDATES)):
            if getattr(self, name) not in known:
                raise InputError(
                    f"{PREFIX}{name}: {getattr(self, name)!r}; known: {', '.join(known)}"
                )
        if self.is_cross_domain and not self.item_domain_path:
            on = next(name for name in (*SWITCHES, "negatives") if self._asks(name))
            raise InputError(
                f"{PREFIX}{on} needs to know every item's domain; name a file with columns item "
                f"and domain: --{PATH_KEY} FILE"
            )
        if self.model == HLLM_MODEL:
            self._refuse_hstu_only()

    def _refuse_hstu_only(self) -> None:
        given = {**self.encoder, "relative_bias": self.relative_bias}
        for name in _HSTU_ONLY:
            if name in given and given[name] != _DEFAULTS[name]:
                raise InputError(
                    f"{PREFIX}{name}: {given[name]!r}; {HLLM_MODEL} has no such setting, leave it "
                    f"at {_DEFAULTS[name]!r}"
                )

    @property
    def is_ours(self) -> bool:
        """The model is one of this package's."""
        return self.model in MODELS

    @property
    def is_cross_domain(self) -> bool:
        """A model of this package is asked for something that needs domains."""
        return self.is_ours and any(map(self._asks, (*SWITCHES, "negatives")))

    @property
    def scopes_negatives(self) -> bool:
        """Negatives come out of the positive's own domain."""
        if self.negatives == "auto":
            return any(map(self._asks, SWITCHES))
        return self.negatives == "domain"

    @property
    def is_plain(self) -> bool:
        """Everything off: REC's own model, its own code included."""
        return not (
            any(map(self._asks, SWITCHES))
            or self.relative_bias
            or self.scopes_negatives
            or any(map(self._differs, ("normalization", "segment_by", "impl")))
            or any(map(self._differs, ("history_tokens", "segment_lookback")))
        )

    def _differs(self, name: str) -> bool:
        return self.encoder.get(name, _DEFAULTS[name]) != _DEFAULTS[name]

    def _asks(self, name: str) -> bool:
        if name == "negatives":
            return self.negatives == "domain"
        return bool(self.encoder.get(name))

    @property
    def reads_time(self) -> bool:
        """The model needs the times of the events."""
        ages = self.encoder.get("state_age_bias", EncoderSettings.state_age_bias)
        return (
            self.relative_bias
            or bool(self.encoder.get("ddsr") and ages)
            or self.encoder.get("segment_by") in ("time_gap", "session")
        )

    def encoder_settings(self, sizes: Mapping[str, Any], num_domains: int) -> EncoderSettings:
        """The encoder's settings.

        Args:
            sizes: of :mod:`hstu_xd.plugins.rec.sizes`.
            num_domains: of the catalogue.

        Raises:
            InputError: a value out of range, or an implementation that is not available.
        """
        from hstu_xd.ops import available_impls

        normalization = self.encoder.get("normalization", "silu")
        impls = ("auto", *available_impls(normalization))
        impl = self.encoder.get("impl", "auto")
        if impl not in impls:
            raise InputError(f"{PREFIX}impl: {impl!r}; available here: {', '.join(impls)}")
        try:
            return EncoderSettings(
                num_domains=num_domains,
                enable_relative_attention_bias=self.relative_bias,
                **sizes,
                **self.encoder,
            )
        except InputError as error:
            raise InputError(f"the keys of {self.model}: {error}") from error

    @classmethod
    def read(cls, config: Mapping[str, Any]) -> "RecSettings":
        """Take the keys of this package out of REC's configuration.

        Args:
            config: REC's ``Config.final_config_dict``, the command line's keys included.

        Raises:
            InputError: an unknown key (the message names the nearest), a value of another type.
        """
        _refuse_unknown(config)
        types = _key_types()
        given = {
            key.removeprefix(PREFIX): _typed(key, config[key], types[key])
            for key in types
            if config.get(key) is not None
        }
        encoder = {name: given.pop(name) for name in ENCODER_KEYS if name in given}
        path = config.get(PATH_KEY)
        settings = cls(
            model=str(config.get("model", "")),
            item_domain_path="" if path is None else str(path),
            encoder=encoder,
            **given,
        )
        if config.get(f"{PREFIX}candidates") == "domain" and path is None:
            _logger.warning("%scandidates: 'domain' does nothing without %s", PREFIX, PATH_KEY)
        settings._warn_inert()
        return settings

    def _warn_inert(self) -> None:
        if not self.is_ours:
            unused = [f"{PREFIX}{name}" for name in self.encoder if self.encoder[name]]
            unused += [f"{PREFIX}relative_bias"] * self.relative_bias
            unused += [f"{PREFIX}negatives"] * (self.negatives == "domain")
            unused += [f"{PREFIX}warm_start"] * bool(self.warm_start)
            if unused:
                _logger.warning("%s: no effect on model %s", ", ".join(unused), self.model)
            return
        for switch, names in _NEEDS_SWITCH.items():
            for name in names:
                if not self.encoder.get(switch) and self._differs(name):
                    self._warn_beside(name, switch, False)
        cut = self.encoder.get("segment_by", "none")
        for name, cuts in _NEEDS_CUT.items():
            if cut not in cuts and self._differs(name):
                self._warn_beside(name, "segment_by", cut)

    def _warn_beside(self, name: str, other: str, value: object) -> None:
        _logger.warning(
            "%s%s: %r does nothing while %s%s is %s",
            PREFIX,
            name,
            self.encoder[name],
            PREFIX,
            other,
            value,
        )


def _key_types() -> dict[str, type]:
    """Every key of this package but the path, with its type."""
    encoder = get_type_hints(EncoderSettings)
    own = {"relative_bias": bool, "negatives": str, "candidates": str, "warm_start": str}
    types = {name: getattr(encoder[name], "__origin__", encoder[name]) for name in ENCODER_KEYS}
    return {PREFIX + name: type_ for name, type_ in (types | own).items()}


def _refuse_unknown(config: Mapping[str, Any]) -> None:
    known = [*_key_types(), PATH_KEY]
    for key in config:
        wanted = PREFIX + key if PREFIX + key in known and key not in _COMMON else key
        if key in known or not wanted.startswith((PREFIX, "item_domain")):
            continue
        near = get_close_matches(wanted, known, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}"
        raise InputError(f"unknown key {key}; {hint}")


def _typed(key: str, value: Any, wanted: type) -> Any:
    if wanted is tuple and isinstance(value, list):
        return tuple(value)
    if type(value) is not wanted:
        needed = "list of layer numbers" if wanted is tuple else wanted.__name__
        raise InputError(f"{key}: {value!r} is a {type(value).__name__}; a {needed} is needed")
    return value


@contextmanager
def as_theirs(config: Any) -> Iterator[None]:
    """A configuration that names REC's own model which ours extends, for REC to look it up by."""
    name = config["model"]
    config["model"] = MODELS.get(name, name)
    try:
        yield
    finally:
        config["model"] = name
