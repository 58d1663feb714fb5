"""Settings of a training run, read from gin files and bindings and checked before any work."""

import dataclasses
import logging
import re
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from io import StringIO
from pathlib import Path
from typing import Any, get_args, get_type_hints

from hstu_xd.errors import InputError
from hstu_xd.files import gin_folder
from hstu_xd.model.settings import EncoderSettings
from hstu_xd.parts import Part, importable_from
from hstu_xd.training.extension import (
    ForeignCode,
    check_layer,
    check_parts,
    parts_of,
    read_bindings,
    warn_inert,
)

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
        objective: what is minimised and what ranks: "retrieval" (sampled softmax, dot products), or
            one of your own, ``@my_objective()``.
        num_negatives: sampled negatives per positive.
        negatives: "domain" (the positive's own domain) or "catalogue" (all items, as upstream), or
            a sampler of your own, ``@my_sampler``.
        temperature: of the softmax over dot products of unit vectors.
        learning_rate: peak rate of AdamW.
        weight_decay: of AdamW.
        num_warmup_steps: steps of linear warm-up.
        num_epochs: passes over the training users at most.
        early_stop_patience: epochs without a better validation ``select_metric`` before stopping.
        metrics: further functions of ranks of your own, ``(@my_metric,)``.
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
    objective: str = "retrieval"
    num_negatives: int = 2048
    negatives: str = "domain"
    temperature: float = 0.05
    learning_rate: float = 3e-3
    weight_decay: float = 1e-3
    num_warmup_steps: int = 100
    num_epochs: int = 30
    early_stop_patience: int = 2
    metrics: tuple[str, ...] = ()
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
        known = isinstance(self.negatives, Part) or self.negatives in ("domain", "catalogue")
        _require(known, self, "negatives", "domain or catalogue, or a sampler: @my_sampler")
        check_parts(self)

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
    """All bindings of a run: the encoder's, without what the data decide, and the trainer's.

    Attributes:
        encoder: the encoder's, by name.
        train: the trainer's.
        foreign: what the parts among them need that are not of this package.
    """

    encoder: Mapping[str, Any]
    train: TrainSettings
    foreign: ForeignCode = dataclasses.field(default_factory=ForeignCode)

    @property
    def parts(self) -> dict[str, str]:
        """Names of the parts that are not of this package, by what they are."""
        return parts_of(self.encoder, self.train)

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
        lines = ["import hstu_xd.training.settings", *self.foreign.imports, ""]
        for block, values in (
            ("xd_encoder", encoder),
            ("xd_train", dataclasses.asdict(self.train)),
        ):
            names = [name for name in values if name not in _DERIVED]
            lines += [f"{block}.{name} = {values[name]!r}" for name in names] + [""]
        lines += [*self.foreign.bindings, ""] if self.foreign.bindings else []
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
            is looked up among those of this package. What they import may lie beside them or in the
            working folder.
        bindings: single settings, ``xd_encoder.ddsr = True``.

    Raises:
        InputError: a file that is not there, a line gin cannot parse, an unknown name (the message
            gives the nearest), a value of the wrong type, or a binding that nothing reads.
    """
    files = [_found(file) for file in files]
    gin = gin_library()
    gin.clear_config()
    try:
        with importable_from([*(file.parent for file in files), Path.cwd()]):
            for file in files:
                _parse_file(gin, (file.absolute(),))
            gin.parse_config_files_and_bindings([], list(bindings))
            bound = read_bindings(gin, _BLOCKS)
        _refuse_unread(bound.unread)
    except (ValueError, TypeError, SyntaxError, OSError, ImportError, NameError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(_explain(error, files, bindings)) from error
    finally:
        gin.clear_config()
    for name, values in bound.blocks.items():
        check_types(name, values)
    encoder, train = bound.blocks["xd_encoder"], TrainSettings(**bound.blocks["xd_train"])
    check_layer(encoder.get("layer"))
    warn_inert(train)
    settings = RunSettings(encoder, train, bound.foreign)
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


def gin_library() -> Any:
    """Import gin-config, or say that it is missing."""
    import gin

    # Run from a folder that has a subfolder gin/, an absent gin-config would import as that folder.
    if not hasattr(gin, "parse_config_files_and_bindings"):
        raise InputError("gin-config is not installed; pip install gin-config")
    return gin


_INCLUDE = re.compile(r"""\s*include\s+(["'])(?P<name>.+?)\1""")


def _parse_file(gin: Any, files: tuple[Path, ...]) -> None:
    """Parse a gin file, and what it includes where it includes it.

    An included file is looked up beside the file that names it, beside those that included that
    one, in the working folder, and among the recipes of this package, ``gin/standalone/xd.gin``;
    gin itself would look into the working folder first.

    Args:
        gin: the library.
        files: the file, behind those that include it.

    Raises:
        InputError: an included file that is not there or that includes itself.
    """
    file = files[-1]
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    begin = 0
    for number, line in enumerate(lines):
        if include := _INCLUDE.match(line):
            _parse_lines(gin, file, lines, begin, number)
            _parse_file(gin, (*files, _included(include["name"], files)))
            begin = number + 1
    _parse_lines(gin, file, lines, begin, len(lines))


def _parse_lines(gin: Any, file: Path, lines: Sequence[str], begin: int, end: int) -> None:
    """Parse a part of a file so that gin's errors name the file and the line."""
    part = StringIO("\n" * begin + "".join(lines[begin:end]))
    part.name = str(file)
    gin.parse_config(part)


def _included(name: str, files: Sequence[Path]) -> Path:
    folders = [*(file.parent for file in reversed(files)), Path.cwd(), gin_folder().parent]
    found = next((folder / name for folder in folders if (folder / name).is_file()), None)
    if found is None:
        raise InputError(
            f"{files[-1]} includes {name!r}: no such file beside it, in {Path.cwd()} or among the "
            "recipes of hstu-xd"
        )
    if found.resolve() in (file.resolve() for file in files):
        raise InputError(f"{files[-1]} includes {name!r}, which includes it in turn")
    return found


def _register() -> dict[str, Any]:
    register = gin_library().external_configurable
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
    if isinstance(error, ImportError):
        text += (
            "; run the command where the module lies, add its folder to PYTHONPATH, or install it"
        )
    elif "matching reference" in text:
        text += " Import its module in the gin file, and register it there with @gin.configurable."
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


def _refuse_unread(unread: Sequence[str]) -> None:
    """Refuse macros and bindings, scoped or of somebody else's, that no setting refers to."""
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
        if isinstance(value, Part):
            values[name] = (value,) if wanted is tuple else value
        elif wanted is tuple and isinstance(value, list | tuple):
            values[name] = tuple(value)
            member = get_args(hints[name])[0]
            for each in value:
                if type(each) is not member and not isinstance(each, Part):
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
