"""yaml and command-line keys of the plug-in: ``xd_*`` and ``item_domain_path``, checked once."""

import dataclasses
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from hstu_xd.declaration import (
    Setting,
    check,
    defaults_of,
    inert,
    requirements,
    setting,
    settings_of,
)
from hstu_xd.errors import InputError, nearest
from hstu_xd.model.settings import PER_DOMAIN, EncoderSettings

_logger = logging.getLogger(__name__)

HSTU_MODEL, HLLM_MODEL = "HSTU_XD", "HLLM_XD"
PERSONALIZED_HSTU_MODEL, PERSONALIZED_HLLM_MODEL = "PersonalizedHSTU_XD", "PersonalizedHLLM_XD"
# This package's models -> REC's own that they extend. The last two are in PerSRec alone.
MODELS = {
    HSTU_MODEL: "HSTU",
    HLLM_MODEL: "HLLM",
    PERSONALIZED_HSTU_MODEL: "PersonalizedHSTU",
    PERSONALIZED_HLLM_MODEL: "PersonalizedHLLM",
}
# Settings that a history with user tokens in it leaves no room for, as this package's own history
# tokens leave none: where it is cut is said by PerSRec's keys.
_NOT_WITH_USER_TOKENS = (
    "full_attention_layers",
    "segment_by",
    "segment_lookback",
    "history_tokens",
    "normalization",
    "relative_bias",
)
PATH_KEY = "item_domain_path"
PREFIX = "xd_"
# Settings of the encoder that are keys here; its sizes are REC's own (n_layers, n_heads, ...) or
# the user LLM's.
_ENCODER = {
    name: each
    for name, each in settings_of(EncoderSettings).items()
    if each.is_own and not each.part
}
ENCODER_KEYS = tuple(_ENCODER)
_DEFAULTS = defaults_of(EncoderSettings)
# Names too common for a key of somebody else's to be taken for ours without its prefix.
_COMMON = ("combine", "normalization", "impl", "negatives", "candidates", "warm_start")


@dataclasses.dataclass(frozen=True)
class RecSettings:
    """What the keys of a run ask for; all but ``model`` and the path stand behind ``xd_``.

    Attributes:
        model: REC's key ``model``.
        item_domain_path: item -> domain file; empty: no domains are known.
        encoder: ``xd_<name>`` for the names of :data:`ENCODER_KEYS`, only those that were given.
        relative_bias: apply the relative attention bias, which REC builds and never applies;
            HSTU_XD only.
        negatives: where negatives come from, "domain" (the positive's own), "catalogue" (as REC),
            or "auto": "domain" where a switch of the encoder is on, so that all off is REC's own
            model.
        candidates: whom the target is ranked against, "domain" (its own) or "catalogue" (as REC);
            for every model.
        warm_start: a checkpoint of REC's trainer to continue from. Empty: none.

    Raises:
        InputError: a value that is not one of those named, a switch without domains, or a setting
            that the model does not have.
    """

    model: str
    item_domain_path: str = setting("", around_llm=True)
    encoder: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    relative_bias: bool = setting(False)
    negatives: str = setting("auto", allowed=("auto", "domain", "catalogue"), around_llm=True)
    candidates: str = setting("domain", allowed=("domain", "catalogue"), around_llm=True)
    warm_start: str = setting("", around_llm=True)

    def __post_init__(self) -> None:
        check(self, PREFIX + "{name}: {value!r}; known: {known}")
        if self.is_cross_domain and not self.item_domain_path:
            on = next(name for name in (*PER_DOMAIN, "negatives") if self._asks(name))
            raise InputError(
                f"{PREFIX}{on} needs to know every item's domain; name a file with columns item "
                f"and domain: --{PATH_KEY} FILE"
            )
        for key, each in keys().items():
            value = self._value(each.name)
            if value != each.default and not self._has(each):
                raise InputError(
                    f"{key}: {value!r}; {self.model} has no such setting, leave it at "
                    f"{each.default!r}"
                )
        if self.model == PERSONALIZED_HSTU_MODEL and self._asks("target_view_heads"):
            self._check_target_view()

    def _has(self, each: Setting) -> bool:
        """Tell whether the model, if it is one of this package's, knows a setting."""
        if self.is_around_llm:
            return each.around_llm
        return self.model != PERSONALIZED_HSTU_MODEL or each.name not in _NOT_WITH_USER_TOKENS

    def _check_target_view(self) -> None:
        if not self._asks("domain_mask"):
            raise InputError(
                f"{PREFIX}target_view_heads: {self._value('target_view_heads')}; {self.model} "
                f"needs {PREFIX}domain_mask: True with it, for without the mask its tokens stand "
                "for no domain's events"
            )

    def _value(self, name: str) -> Any:
        return self.encoder.get(name, _DEFAULTS[name]) if name in _ENCODER else getattr(self, name)

    @property
    def is_ours(self) -> bool:
        """Whether the model is one of this package's."""
        return self.model in MODELS

    @property
    def is_around_llm(self) -> bool:
        """Whether the model is one of this package's around HLLM's user LLM."""
        return self.model in (HLLM_MODEL, PERSONALIZED_HLLM_MODEL)

    @property
    def is_personalized(self) -> bool:
        """Whether the model is one of this package's that PerSRec inserts user tokens into."""
        return self.model in (PERSONALIZED_HSTU_MODEL, PERSONALIZED_HLLM_MODEL)

    @property
    def is_cross_domain(self) -> bool:
        """Whether a model of this package is asked for something that needs domains."""
        return self.is_ours and any(map(self._asks, (*PER_DOMAIN, "negatives")))

    @property
    def scopes_negatives(self) -> bool:
        """Whether negatives come out of the positive's own domain."""
        if self.negatives == "auto":
            return any(map(self._asks, PER_DOMAIN))
        return self.negatives == "domain"

    @property
    def is_plain(self) -> bool:
        """Whether everything is off: it is REC's own model then, its own code included."""
        asked = any(self._differs(name) for name, each in _ENCODER.items() if not each.needs)
        return not (asked or self.relative_bias or self.scopes_negatives)

    def _differs(self, name: str) -> bool:
        return self._value(name) != _DEFAULTS[name]

    def _asks(self, name: str) -> bool:
        if name == "negatives":
            return self.negatives == "domain"
        return bool(self.encoder.get(name))

    @property
    def reads_time(self) -> bool:
        """Whether the model needs the times of the events."""
        return "time" in requirements(EncoderSettings, self._encoder_values)

    @property
    def _encoder_values(self) -> dict[str, Any]:
        bias = {"enable_relative_attention_bias": self.relative_bias}
        return {**_DEFAULTS, **bias, **self.encoder}

    def encoder_settings(self, sizes: Mapping[str, Any], num_domains: int) -> EncoderSettings:
        """Build the encoder's settings.

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
        given = {
            each.name: each.typed(config[key], f"{key}: {config[key]!r}")
            for key, each in keys().items()
            if config.get(key) is not None
        }
        encoder = {name: given.pop(name) for name in ENCODER_KEYS if name in given}
        settings = cls(model=str(config.get("model", "")), encoder=encoder, **given)
        if config.get(f"{PREFIX}candidates") == "domain" and config.get(PATH_KEY) is None:
            _logger.warning("%scandidates: 'domain' does nothing without %s", PREFIX, PATH_KEY)
        settings._warn_inert()
        return settings

    def _warn_inert(self) -> None:
        if not self.is_ours:
            unused = [f"{PREFIX}{name}" for name in self.encoder if self._differs(name)]
            unused += [f"{PREFIX}relative_bias"] * self.relative_bias
            unused += [f"{PREFIX}negatives"] * (self.negatives == "domain")
            unused += [f"{PREFIX}warm_start"] * bool(self.warm_start)
            if unused:
                _logger.warning("%s: no effect on model %s", ", ".join(unused), self.model)
            return
        for name, needed in inert(EncoderSettings, self._encoder_values):
            _logger.warning(
                "%s%s: %r does nothing while %s%s is %s",
                *(PREFIX, name, self.encoder[name], PREFIX, needed, self._value(needed)),
            )


def keys() -> dict[str, Setting]:
    """Return every key of this package, with its setting."""
    declared = [*_ENCODER.values(), *settings_of(RecSettings).values()]
    return {each.name if each.name == PATH_KEY else PREFIX + each.name: each for each in declared}


def _refuse_unknown(config: Mapping[str, Any]) -> None:
    known = keys()
    for key in config:
        wanted = PREFIX + key if PREFIX + key in known and key not in _COMMON else key
        if key in known or not wanted.startswith((PREFIX, "item_domain")):
            continue
        near = nearest(wanted, known)
        hint = f"did you mean {near}?" if near else f"known: {', '.join(known)}"
        raise InputError(f"unknown key {key}; {hint}")


@contextmanager
def as_theirs(config: Any) -> Iterator[None]:
    """Let a configuration name REC's own model that ours extends, for REC to look it up by."""
    name = config["model"]
    config["model"] = MODELS.get(name, name)
    try:
        yield
    finally:
        config["model"] = name
