"""What gin files bind, with the parts that users bring: read, checked, and told from what is ours.

:func:`read_bindings` takes gin's state apart, so that a run stores the imports and bindings its
parts need and reads back to the same; :func:`foreign_names` tells what a stored file would import
before gin reads it.
"""

import copy
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import nn

from hstu_xd.errors import InputError
from hstu_xd.evaluation.metrics import check_selected
from hstu_xd.evaluation.protocol import Protocol
from hstu_xd.files import sha256_of
from hstu_xd.objectives.asking import OtherDomains
from hstu_xd.objectives.objective import Metric, Objective, check_objective
from hstu_xd.objectives.retrieval import Retrieval
from hstu_xd.parts import Part, folder_of, is_foreign, module_file

RETRIEVAL = "retrieval"


@dataclass(frozen=True)
class ForeignCode:
    """What a gin file needs beside the settings to read back.

    Attributes:
        modules: that it imports, dotted names.
        imports: the statements.
        bindings: those of the parts themselves, ``my_objective.margin = 0.5``.
    """

    modules: tuple[str, ...] = ()
    imports: tuple[str, ...] = ()
    bindings: tuple[str, ...] = ()

    def described(self) -> dict[str, dict[str, str]]:
        """Say where the modules are now and what is in them."""
        files = {name: module_file(name) for name in self.modules}
        return {
            name: {"folder": str(folder_of(name)), "sha256": sha256_of(file)}
            for name, file in files.items()
            if file is not None
        }


@dataclass(frozen=True)
class Bound:
    """What gin was told.

    Attributes:
        blocks: values of each block of settings by name, parts as :class:`Part`.
        foreign: what these parts need.
        unread: names of bindings that nothing refers to.
    """

    blocks: dict[str, dict[str, Any]]
    foreign: ForeignCode
    unread: list[str] = field(default_factory=list)


def read_bindings(gin: Any, blocks: Mapping[str, Collection[str]]) -> Bound:
    """Take what gin has parsed.

    Args:
        gin: the library, before it forgets.
        blocks: names of the settings' own blocks -> settings there that a part may be bound to.

    Raises:
        InputError: a part is defined in the program itself, where no other command finds it.
        Exception: whatever a part raises that is called, ``@my_objective()``.
    """
    reader = _Reader(gin)
    values = {block: reader.block(block, parts) for block, parts in blocks.items()}
    return Bound(values, reader.foreign(), reader.unread())


class _Reader:
    """Gin's bindings, resolved by hand: uncalled references keep what is bound to them.

    Gin itself would look that up when they are called, which is long after another file was read.
    """

    def __init__(self, gin: Any) -> None:
        self._gin = gin
        self._macros: dict[str, Any] = {}
        self._bindings: dict[tuple[str, str], dict[str, Any]] = {}
        self._imports: dict[str, str] = {}  # module -> statement
        self._written: dict[tuple[str, str], str] = {}  # as the user may have written it
        self._read: set[tuple[str, str]] = set()
        self._read_macros: set[str] = set()
        for statement in self._parsed(gin.config_str()):
            if isinstance(statement, gin.config_parser.ImportStatement):
                if is_foreign(statement.module):
                    self._imports[statement.module] = statement.format()
            elif isinstance(statement, gin.config_parser.BindingStatement):
                self._take(statement)

    def block(self, block: str, parts: Collection[str]) -> dict[str, Any]:
        """Return the values bound to one of the settings' blocks."""
        key = ("", f"hstu_xd.{block}")
        self._read.add(key)
        return {
            name: self._part(raw) if name in parts else self._value(raw)
            for name, raw in self._bindings.get(key, {}).items()
        }

    def foreign(self) -> ForeignCode:
        """Collect what was met on the way that is not of this package."""
        called = {
            (s.scope, self._full(s.selector))
            for s in self._parsed(self._gin.operative_config_str())
            if isinstance(s, self._gin.config_parser.BindingStatement) and s.arg_name
        }
        self._read |= called & self._bindings.keys()
        lines = [
            f"{_scoped(scope, selector)}.{name} = {self._text(raw)}"
            for scope, selector in self._bindings
            if (scope, selector) in self._read and is_foreign(selector)
            for name, raw in self._bindings[scope, selector].items()
        ]
        modules = sorted(self._imports)
        return ForeignCode(tuple(modules), tuple(self._imports[m] for m in modules), tuple(lines))

    def unread(self) -> list[str]:
        """Name the macros and bindings that nothing has referred to."""
        names = [name for name in self._macros if name not in self._read_macros]
        return names + [
            f"{self._written[key]}.{name}"
            for key, values in self._bindings.items()
            if key not in self._read
            for name in values
        ]

    def _parsed(self, text: str) -> Any:
        return self._gin.config_parser.ConfigParser(text, self._gin.config.ParserDelegate())

    def _take(self, statement: Any) -> None:
        if not statement.arg_name:
            name = _scoped(statement.scope, statement.selector)
            self._macros[name] = statement.value
            return
        key = (statement.scope, self._full(statement.selector))
        self._bindings.setdefault(key, {})[statement.arg_name] = statement.value
        self._written[key] = _scoped(statement.scope, statement.selector)

    def _full(self, selector: str) -> str:
        return self._gin.config.ConfigurableReference(selector, False).configurable.selector

    def _behind_macros(self, raw: Any) -> Any:
        """Return what a macro stands for, through any number of them."""
        while self._is_reference(raw) and raw.configurable.selector == "gin.macro":
            name = "/".join(raw.scopes)
            self._read_macros.add(name)
            raw = self._macros[name]
        return raw

    def _is_reference(self, raw: Any) -> bool:
        return isinstance(raw, self._gin.config.ConfigurableReference)

    def _part(self, raw: Any) -> Any:
        raw = self._behind_macros(raw)
        if isinstance(raw, list | tuple):
            return tuple(map(self._part, raw))
        if not self._is_reference(raw):
            return raw
        return Part(self._name(raw), self._value(raw), self._text(raw))

    def _value(self, raw: Any) -> Any:
        """Resolve references inside a value, calling those that are written with ()."""
        raw = self._behind_macros(raw)
        if isinstance(raw, list | tuple):
            return type(raw)(map(self._value, raw))
        if isinstance(raw, dict):
            return {self._value(key): self._value(each) for key, each in raw.items()}
        if not self._is_reference(raw):
            return raw
        if raw.configurable.selector == "gin.constant":
            return copy.deepcopy(raw)  # gin's way to look it up
        self._note_module(raw)
        with self._gin.config_scope(raw.scopes or self._gin.current_scope()):
            given = {name: self._value(each) for name, each in self._arguments(raw).items()}
            make = partial(raw.configurable.wrapper, **given) if given else raw.configurable.wrapper
            return make() if raw.evaluate else make

    def _arguments(self, raw: Any) -> dict[str, Any]:
        """Find what is bound to a reference's parameters, in its scope and those around it."""
        scopes = raw.scopes or self._gin.current_scope()
        found: dict[str, Any] = {}
        for depth in range(len(scopes) + 1):
            key = ("/".join(scopes[:depth]), raw.configurable.selector)
            if key in self._bindings:
                self._read.add(key)
                found |= self._bindings[key]
        return found

    def _note_module(self, raw: Any) -> None:
        module = raw.configurable.wrapped.__module__
        if module == "__main__":
            raise InputError(
                f"{self._text(raw)} is defined in the program itself, where no other command finds "
                "it; put it into a module and import that: import my_parts"
            )
        if is_foreign(module) and module.partition(".")[0] != "gin":
            self._imports.setdefault(module, f"import {module}")

    def _name(self, raw: Any) -> str:
        """Write a reference as tables show it: without @, with what is bound to it."""
        raw = self._behind_macros(raw)
        if not self._is_reference(raw) or raw.configurable.selector == "gin.constant":
            return self._text(raw)
        given = [f"{name}={self._name(each)}" for name, each in self._arguments(raw).items()]
        called = f"({', '.join(sorted(given))})" if given else ""
        return _scoped("/".join(raw.scopes), raw.configurable.selector) + called

    def _text(self, raw: Any) -> str:
        """Write a value so that gin reads it anywhere: without macros or short names."""
        raw = self._behind_macros(raw)
        if isinstance(raw, list):
            return f"[{', '.join(map(self._text, raw))}]"
        if isinstance(raw, tuple):
            return f"({''.join(f'{self._text(each)}, ' for each in raw).rstrip()})"
        if isinstance(raw, dict):
            return f"{{{', '.join(f'{self._text(k)}: {self._text(v)}' for k, v in raw.items())}}}"
        if not self._is_reference(raw) or raw.configurable.selector == "gin.constant":
            return repr(raw)
        scoped = _scoped("/".join(raw.scopes), raw.configurable.selector)
        return f"@{scoped}{'()' if raw.evaluate else ''}"


def _scoped(scope: str, selector: str) -> str:
    return f"{scope}/{selector}" if scope else selector


def foreign_names(gin: Any, text: str) -> list[str]:
    """Tell what a gin file would import or include, without importing anything.

    Args:
        gin: the library.
        text: of the file.

    Returns:
        Modules that are not of this package; files that it includes, as ``file NAME``.

    Raises:
        SyntaxError: gin cannot parse it either.
    """
    parser = gin.config_parser.ConfigParser(text, _References())
    names = []
    for statement in parser:
        if isinstance(statement, gin.config_parser.IncludeStatement):
            names.append(f"file {statement.filename}")
        # With gin's dynamic registration a file reaches whatever an allowed module has imported.
        elif isinstance(statement, gin.config_parser.ImportStatement) and is_foreign(
            statement.module
        ):
            names.append(statement.module)
    return list(dict.fromkeys(names))


def refuse_lost_values(gin: Any, text: str) -> None:
    """Refuse bindings that gin takes and cannot write again: it would leave them out of a run.

    Args:
        gin: the library.
        text: statements that gin has parsed.

    Raises:
        InputError: a number that is not finite, written as ``1e999``.
    """
    for statement in gin.config_parser.ConfigParser(text, _References()):
        if isinstance(statement, gin.config_parser.BindingStatement) and not _finite(
            statement.value
        ):
            name = _scoped(statement.scope, statement.selector)
            name += f".{statement.arg_name}" if statement.arg_name else ""
            raise InputError(f"gin: {name} = {statement.value!r}; it must be a finite number")


def _finite(value: Any) -> bool:
    """Whether no number in a value of gin is infinite."""
    if isinstance(value, dict):
        return all(map(_finite, [*value, *value.values()]))
    if isinstance(value, list | tuple):
        return all(map(_finite, value))
    return not isinstance(value, float) or math.isfinite(value)


class _References:
    """Stands in for gin's delegate, which looks up what references name; here nothing is there."""

    def configurable_reference(self, name: str, evaluate: bool) -> None:
        """Leave a reference alone."""

    def macro(self, name: str) -> None:
        """Leave a macro alone."""


def check_layer(layer: Any) -> None:
    """Refuse a layer that cannot be one, as far as it shows before it is built.

    Raises:
        InputError: it was called, or is a class of something else than a module.
    """
    if not isinstance(layer, Part):
        return
    made = layer.value.func if isinstance(layer.value, partial) else layer.value
    if isinstance(made, nn.Module) or not callable(made):
        raise InputError(
            f"xd_encoder.layer = {layer!r} is a {type(made).__name__}; give the class itself, "
            f"without (): xd_encoder.layer = {layer.reference.removesuffix('()')}"
        )
    if isinstance(made, type) and not issubclass(made, nn.Module):
        raise InputError(
            f"xd_encoder.layer = {layer!r} is no torch.nn.Module; derive it from "
            "hstu_xd.model.encoder.HSTULayer, or from torch.nn.Module"
        )


def check_parts(train: Any) -> None:
    """Refuse parts of a training that cannot do their work.

    Args:
        train: :class:`hstu_xd.training.settings.TrainSettings`.

    Raises:
        InputError: an objective, sampler or metric that is none.
    """
    if isinstance(train.objective, Part):
        check_objective(train.objective.value, train.objective.reference)
    elif train.objective != RETRIEVAL:
        raise InputError(
            f"xd_train.objective = {train.objective!r}; it must be {RETRIEVAL!r} or a reference to "
            "one of your own: xd_train.objective = @my_objective()"
        )
    if isinstance(train.negatives, Part) and not callable(train.negatives.value):
        raise InputError(
            f"xd_train.negatives = {train.negatives!r} is a "
            f"{type(train.negatives.value).__name__}; a function (catalog, num_negatives, "
            "generator) -> list of item ids a domain is needed"
        )
    for metric in train.metrics:
        if not isinstance(metric, Part) or not callable(metric.value):
            raise InputError(
                f"xd_train.metrics holds {metric!r}; functions of ranks are needed, by reference: "
                "xd_train.metrics = (@my_metric,)"
            )


def check_metrics(train: Any, protocol: Protocol) -> None:
    """Refuse metrics of one name, and to pick the epoch by what is not measured.

    Args:
        train: :class:`hstu_xd.training.settings.TrainSettings`.
        protocol: which has metrics of its own.

    Raises:
        InputError: one of the two.
    """
    own = [*objective_of(train).metrics, *(m.short_name for m in train.metrics)]
    names = [*protocol.metrics, *own]
    repeated = [name for name in names if names.count(name) > 1]
    if repeated:
        raise InputError(
            f"xd_train.metrics: {repeated[0]!r} is the name of two metrics; rename yours"
        )
    check_selected("xd_train.select_metric", train.select_metric, names, "switch")


def objective_of(train: Any) -> Objective:
    """Make the objective that a training's settings name."""
    if isinstance(train.objective, Part):
        return train.objective.value
    sampler = train.negatives
    return Retrieval(
        sampler.value if isinstance(sampler, Part) else sampler,
        train.num_negatives,
        train.temperature,
        OtherDomains(
            train.asked_domains,
            train.asked_weight,
            train.asked_within_events,
            train.asked_within_time,
        ),
    )


def metrics_of(train: Any) -> dict[str, Metric]:
    """Collect the metrics beside the usual ones: the objective's own and the settings'."""
    chosen = {metric.short_name: metric.value for metric in train.metrics}
    return {**objective_of(train).metrics, **chosen}


def parts_of(encoder: Mapping[str, Any], train: Any) -> dict[str, str]:
    """Name the foreign parts of a run by the setting they are bound to; several, one by one."""
    found = {
        "layer": encoder.get("layer"),
        "objective": train.objective,
        "negatives": train.negatives,
        **{f"metric {metric.short_name}": metric for metric in train.metrics},
    }
    return {name: str(value) for name, value in found.items() if isinstance(value, Part)}
