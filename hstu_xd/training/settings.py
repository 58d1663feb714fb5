"""Settings of a training run, read from gin files and bindings and checked before any work."""

import dataclasses
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any, get_args, get_type_hints

from hstu_xd.errors import InputError
from hstu_xd.evaluation.metrics import METRICS
from hstu_xd.files import gin_folder
from hstu_xd.model.settings import EncoderSettings

_logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class TrainSettings:
    """What ``xd_train.*`` bindings set; names follow upstream's ``train_fn`` where it has them.

    Attributes:
        max_sequence_length: longest history that is read, in events.
        gr_output_length: room for outputs in the padded length; as in upstream, attention is
            divided by ``max_sequence_length + gr_output_length + 1``.
        item_embedding_dim: model width.
        local_batch_size: users per step and process.
        eval_batch_size: users encoded at once in evaluation.
        dropout_rate: dropout on the input features.
        num_negatives: sampled negatives per positive.
        negatives: "domain" (the positive's own domain) or "catalogue" (all items, as upstream).
        temperature: of the softmax over dot products of unit vectors.
        learning_rate: peak rate of AdamW.
        weight_decay: of AdamW.
        num_warmup_steps: steps of linear warm-up.
        num_epochs: passes over the training users at most.
        early_stop_patience: epochs without a better validation ``select_metric`` before stopping.
        select_metric: the validation metric that picks the best epoch.
        checkpoint_every: steps between two saves of the resumable state; epochs end with one.
        main_module_bf16: bfloat16 autocast (CUDA only).
        random_seed: seeds weights, order, dropout and negatives.
    """

    max_sequence_length: int = 100
    gr_output_length: int = 10
    item_embedding_dim: int = 64
    local_batch_size: int = 64
    eval_batch_size: int = 256
    dropout_rate: float = 0.4
    num_negatives: int = 2048
    negatives: str = "domain"
    temperature: float = 0.05
    learning_rate: float = 3e-3
    weight_decay: float = 1e-3
    num_warmup_steps: int = 100
    num_epochs: int = 30
    early_stop_patience: int = 2
    select_metric: str = "ndcg@100"
    checkpoint_every: int = 1000
    main_module_bf16: bool = False
    random_seed: int = 42

    def __post_init__(self) -> None:
        for name in (
            "max_sequence_length", "item_embedding_dim", "local_batch_size", "eval_batch_size",
            "num_negatives", "num_epochs", "early_stop_patience", "checkpoint_every",
        ):  # fmt: skip
            _require(getattr(self, name) >= 1, self, name, "at least 1")
        for name in ("gr_output_length", "num_warmup_steps", "weight_decay", "random_seed"):
            _require(getattr(self, name) >= 0, self, name, "at least 0")
        for name in ("temperature", "learning_rate"):
            _require(getattr(self, name) > 0, self, name, "above 0")
        _require(0 <= self.dropout_rate < 1, self, "dropout_rate", "from 0 to below 1")
        _require(self.random_seed < 1 << 64, self, "random_seed", "at most 2**64 - 1")
        _require(
            self.select_metric in METRICS, self, "select_metric", f"one of {', '.join(METRICS)}"
        )
        _require(
            self.negatives in ("domain", "catalogue"), self, "negatives", "domain or catalogue"
        )

    @property
    def norm_length(self) -> int:
        """The constant ``N`` that upstream divides attention by."""
        return self.max_sequence_length + self.gr_output_length + 1


def _require(holds: bool, settings: TrainSettings, name: str, needed: str) -> None:
    if not holds:
        raise InputError(f"xd_train.{name} = {getattr(settings, name)!r}; it must be {needed}")


# What the trainer derives from the data and from xd_train; gin may not set it.
_DERIVED = ("num_domains", "norm_length", "embedding_dim")
_BLOCKS: dict[str, type] = {"xd_encoder": EncoderSettings, "xd_train": TrainSettings}


@dataclasses.dataclass(frozen=True)
class RunSettings:
    """All bindings of a run: the encoder's, without what the data decide, and the trainer's."""

    encoder: Mapping[str, Any]
    train: TrainSettings

    def encoder_settings(self, num_domains: int) -> EncoderSettings:
        """The encoder's settings for a catalogue of ``num_domains`` domains."""
        return EncoderSettings(
            num_domains=num_domains,
            norm_length=self.train.norm_length,
            embedding_dim=self.train.item_embedding_dim,
            **self.encoder,
        )

    def to_gin(self) -> str:
        """Every setting, defaults included, as a gin file that reads back to the same settings."""
        encoder = dataclasses.asdict(self.encoder_settings(num_domains=1))
        lines = ["import hstu_xd.training.settings", ""]
        for block, values in (
            ("xd_encoder", encoder),
            ("xd_train", dataclasses.asdict(self.train)),
        ):
            names = [name for name in values if name not in _DERIVED]
            lines += [f"{block}.{name} = {values[name]!r}" for name in names] + [""]
        return "\n".join(lines)

    def unlike(self, recorded: Mapping[str, Any]) -> list[str]:
        """Settings that are not a run's, each as ``not xd_train.num_epochs = 5 but 2``.

        Args:
            recorded: the run's ``run.json``; a setting that it does not know is not compared.
        """
        encoder = self.encoder_settings(recorded["encoder"]["num_domains"])
        pairs = (
            ("xd_encoder", encoder, recorded["encoder"]),
            ("xd_train", self.train, recorded["train"]),
        )
        return [
            f"not {block}.{name} = {value!r} but {theirs[name]!r}"
            for block, ours, theirs in pairs
            for name, value in dataclasses.asdict(ours).items()
            if name in theirs and (list(value) if type(value) is tuple else value) != theirs[name]
        ]


def load_settings(files: Sequence[Path], bindings: Sequence[str] = ()) -> RunSettings:
    """Read gin files in order, then bindings; later ones win.

    Args:
        files: gin files; one that is not in the working folder, such as ``gin/standalone/xd.gin``,
            is looked up among those of this package.
        bindings: single settings, ``xd_encoder.ddsr = True``.

    Raises:
        InputError: a file that is not there, a line gin cannot parse, an unknown name (the message
            gives the nearest), a value of the wrong type, or a binding that nothing reads.
    """
    files = [_found(file) for file in files]
    gin = _gin()
    gin.clear_config()
    try:
        for file in files:
            with _neighbours_first(gin, file):
                gin.parse_config_file(str(file.resolve()))
        gin.parse_config_files_and_bindings([], list(bindings))
        _refuse_unread(gin.config_str())
        blocks = {name: dict(gin.get_bindings(name)) for name in _BLOCKS}
    except (ValueError, TypeError, SyntaxError, OSError, ImportError, NameError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(_explain(error, files, bindings)) from error
    finally:
        gin.clear_config()
    for name, values in blocks.items():
        check_types(name, values)
    settings = RunSettings(blocks["xd_encoder"], TrainSettings(**blocks["xd_train"]))
    _warn_inert(settings.encoder_settings(num_domains=1))  # range checks, before any data are read
    return settings


def _found(file: Path) -> Path:
    if file.is_file():
        return file
    shipped = gin_folder().parent
    if (shipped / file).is_file():
        return shipped / file
    recipes = sorted(
        x.relative_to(shipped).as_posix() for x in shipped.glob("gin/standalone/*.gin")
    )
    raise InputError(
        f"--gin_config_file {file}: no such file in {Path.cwd()} (of hstu-xd: {', '.join(recipes)})"
    )


# A setting, values of it, and others that act only while it has one of these.
_NEEDED = (
    (
        "ddsr",
        (True,),
        ("state_from", "combine", "query_target_domain", "states_per_domain", "state_age_bias"),
    ),
    ("domain_mask", (True,), ("full_attention_layers",)),
    ("segment_by", ("count",), ("segment_length",)),
    ("segment_by", ("time_gap", "session"), ("segment_gap",)),
)


def _warn_inert(encoder: EncoderSettings) -> None:
    defaults = {field.name: field.default for field in dataclasses.fields(EncoderSettings)}
    for needed, values, names in _NEEDED:
        found = getattr(encoder, needed)
        for name in names if found not in values else ():
            if getattr(encoder, name) != defaults[name]:
                _logger.warning(
                    "xd_encoder.%s = %r does nothing while xd_encoder.%s is %r",
                    *(name, getattr(encoder, name), needed, found),
                )
    own_heads = encoder.target_view_heads < encoder.num_heads
    masked = len(set(encoder.full_attention_layers)) < encoder.num_blocks
    if encoder.domain_mask and not encoder.has_segments and not (own_heads and masked):
        _logger.warning(
            "xd_encoder.domain_mask = True does nothing: every %s",
            "layer keeps full attention" if own_heads else "head reads the target domain",
        )


def _gin() -> Any:
    import gin

    # Run from a folder that has a subfolder gin/, an absent gin-config would import as that folder.
    if not hasattr(gin, "parse_config_files_and_bindings"):
        raise InputError("gin-config is not installed; pip install gin-config")
    return gin


@contextmanager
def _neighbours_first(gin: Any, file: Path) -> Iterator[None]:
    """Let a file include its neighbours, ahead of their namesakes where the command runs.

    gin can only be told of places to look in after those, and logs an error for each it misses.
    """
    places = gin.config._LOCATION_PREFIXES
    places.insert(0, str(file.parent.resolve()))
    try:
        yield
    finally:
        places.pop(0)


def _register() -> dict[str, Any]:
    register = _gin().external_configurable
    return {
        name: register(settings, name=name, module="hstu_xd", allowlist=_names(name))
        for name, settings in _BLOCKS.items()
    }


def _names(block: str) -> list[str]:
    fields = [f.name for f in dataclasses.fields(_BLOCKS[block])]
    return [name for name in fields if name not in _DERIVED]


def _explain(error: Exception, files: Sequence[Path], bindings: Sequence[str]) -> str:
    """One line for gin's error, with the nearest name where a name is unknown."""
    text = " ".join(str(error).split())
    if "named" not in text and "matching" not in text:
        # A syntax error gives a line number and no text.
        text = f"{', '.join([*map(str, files), *bindings])}: {text}"
    known = [f"{block}.{name}" for block in _BLOCKS for name in _names(block)]
    wrong = re.search(r"Configurable '([\w.]+)' doesn't have a parameter named '(\w+)'", text)
    if wrong:
        near = get_close_matches(f"{wrong[1]}.{wrong[2]}", known, n=1, cutoff=0.4)
    else:
        wrong = re.search(r"matching '([\w./]+)'", text)
        near = get_close_matches(wrong[1], _BLOCKS, n=1, cutoff=0.4) if wrong else []
    if near:
        return f"gin: {text} Did you mean {near[0]}?"
    return f"gin: {text}"


def _refuse_unread(config: str) -> None:
    """Macros and bindings, scoped or of somebody else's, that no setting refers to are inert."""
    macros = re.findall(r"^(\w+)\s*=", config, re.MULTILINE)
    unread = [name for name in macros if not re.search(rf"%{name}\b", config)]
    unread += re.findall(r"^([\w.]+/[\w./]+)\s*=", config, re.MULTILINE)
    bound = re.findall(r"^((?:\w+\.)*(\w+)\.\w+)\s*=", config, re.MULTILINE)
    unread += [name for name, block in bound if block not in _BLOCKS]
    if unread:
        raise InputError(f"gin: nothing reads the binding {unread[0]!r}; remove it or its scope")


def check_types(block: str, values: dict[str, Any]) -> None:
    """Bring bound values to their declared types in place, lists to tuples and ints to floats.

    Raises:
        InputError: a value of another type.
    """
    hints = get_type_hints(_BLOCKS[block])
    for name, value in values.items():
        wanted = getattr(hints[name], "__origin__", hints[name])
        if wanted is tuple and isinstance(value, list | tuple):
            values[name] = tuple(value)
            member = get_args(hints[name])[0]
            for each in value:
                if type(each) is not member:
                    raise InputError(
                        f"gin: {block}.{name} = {value!r}: {each!r} is a {type(each).__name__}; "
                        f"a {member.__name__} is needed"
                    )
        elif wanted is float and type(value) is int:
            values[name] = float(value)
        elif type(value) is not wanted:
            raise InputError(
                f"gin: {block}.{name} = {value!r} is a {type(value).__name__}; "
                f"a {wanted.__name__} is needed"
            )


# The settings classes as gin sees them: called, they take what is bound.
CONFIGURABLES = _register()
