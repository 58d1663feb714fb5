"""A setting is declared once, as a field of a dataclass; all else about it is derived from there.

A field that is made by :func:`setting` carries what must be known about it: its range, what it
needs, how it stands in names, and who else has it. Checks, warnings, names of runs and of
checkpoints, keys and the printed list of settings read these declarations and no list of names.
"""

import dataclasses
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from hashlib import blake2b
from inspect import cleandoc
from string import Formatter
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from hstu_xd.errors import InputError, nearest
from hstu_xd.parts import Part

# What a name says of a setting: a template for all values, or one a value and `...` for the others.
# A template takes in the values of settings: "ddsr{states_per_domain}".
Naming = str | Mapping[Any, str] | None
_METADATA = "setting"


@dataclasses.dataclass(frozen=True)
class Setting:
    """One setting: what :func:`setting` declares, completed with what its field says.

    Attributes:
        allowed: the only values, or the only words where there are bounds for a number; empty: any.
        at_least, above, at_most, below: bounds of a number, or of each number of several.
        needs: other settings -> their values, one or a tuple, `...` for all but off (0, False),
            without which this one does nothing.
        reads: what the model must be given while this is on, "time" or "target_domain"; or values
            of this setting -> that.
        tag: how the setting stands in the name of a checkpoint unless it has its default.
        label: the same in the name of a run; None: as the tag.
        per_domain: whether it needs the domain of every item.
        same_model: whether it changes only how the model is computed, never what.
        from_data: whether the data and the trainer decide it, and no user.
        upstream: whether upstream's HSTU has it too, under this name; its own name tells those
            that have no tag here.
        part: whether a part of the user's own may be bound to it; only the trainer of this package
            takes such parts.
        around_llm: whether it also exists where a language model takes the place of the layers.
        also: names by which people look for it.
        name, type, default, meaning: of the field; the meaning is out of the docstring.
    """

    allowed: tuple[Any, ...] = ()
    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None
    needs: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    reads: str | Mapping[Any, str] = ""
    tag: Naming = None
    label: Naming = None
    per_domain: bool = False
    same_model: bool = False
    from_data: bool = False
    upstream: bool = False
    part: bool = False
    around_llm: bool = False
    also: tuple[str, ...] = ()
    name: str = ""
    type: Any = None
    default: Any = None
    meaning: str = ""

    @property
    def is_own(self) -> bool:
        """Whether it is neither a size that upstream has too nor decided by the data."""
        return not (self.from_data or self.upstream)

    @property
    def is_switch(self) -> bool:
        """Whether it alone makes another model of HSTU; a detail of a switch needs that switch."""
        return self.is_own and not self.same_model and not self.needs

    @property
    def type_name(self) -> str:
        """The type as people write it."""
        plain = isinstance(self.type, type) and get_origin(self.type) is None
        return self.type.__name__ if plain else str(self.type)

    def fault(self, value: Any) -> str | None:
        """Say what a value out of range would have to be; None for one in range, and for parts."""
        if self.part and isinstance(value, Part):
            return None
        each = value if isinstance(value, tuple) else (value,)
        if any(not _is_finite(n) for n in each if self.type is float or isinstance(n, float)):
            return "a finite number"
        bounded = {self.at_least, self.above, self.at_most, self.below} != {None}
        if self.allowed and not (bounded and not isinstance(value, str)):
            known = ", ".join(map(str, self.allowed))
            named = f"one of {known}" + ", or a number" * bounded
            return None if value in self.allowed else named
        return next(filter(None, map(self._outside, each)), None)

    def _outside(self, number: Any) -> str | None:
        """Say what a number out of bounds would have to be; None for one inside."""
        if None not in (self.at_least, self.below):
            holds = self.at_least <= number < self.below
            return None if holds else f"{self.at_least} <= rate < {self.below}"
        if self.at_least is not None and not number >= self.at_least:
            return f"at least {self.at_least}" if self.at_least else "0 or more"
        if self.above is not None and not number > self.above:
            return f"above {self.above}"
        if self.at_most is not None and not number <= self.at_most:
            return f"at most {self.at_most}"
        return None

    def missing_need(self, values: Mapping[str, Any]) -> str | None:
        """Return the setting whose value leaves this one nothing to do; None where none does."""
        for other, wanted in self.needs.items():
            if wanted is ...:
                holds = bool(values[other])
            else:
                holds = values[other] in (wanted if isinstance(wanted, tuple) else (wanted,))
            if not holds:
                return other
        return None

    def typed(self, value: Any, told: str) -> Any:
        """Return a value in the declared type: a list becomes a tuple, a whole number a float.

        Args:
            value: as a user wrote it.
            told: how a message begins, ``xd_encoder.ddsr = 'yes'``.

        Raises:
            InputError: a value of another type.
        """
        wanted = get_origin(self.type) or self.type
        if self.part and isinstance(value, Part):
            return (value,) if wanted is tuple else value
        if wanted is tuple and isinstance(value, list | tuple):
            member = get_args(self.type)[0]
            for each in value:
                if type(each) is not member and not (self.part and isinstance(each, Part)):
                    raise InputError(
                        f"{told}: {each!r} is a {type(each).__name__}; a {member.__name__} is "
                        "needed"
                    )
            return tuple(value)
        if wanted is float and type(value) is int:
            return float(value) if _is_finite(value) else value  # which is no value in range
        choices = get_args(self.type) if wanted is UnionType else (wanted,)
        if type(value) not in choices:
            needed = " or a ".join(choice.__name__ for choice in choices)
            raise InputError(f"{told} is a {type(value).__name__}; a {needed} is needed")
        return value


def _is_finite(value: float) -> bool:
    """Tell what a float can hold from inf, nan and whole numbers beyond the largest float."""
    return abs(value) <= sys.float_info.max


def setting(default: Any = dataclasses.MISSING, **declared: Any) -> Any:
    """Declare a field of a dataclass of settings.

    Args:
        default: its default; left out: it has none.
        declared: attributes of :class:`Setting`.
    """
    metadata = {_METADATA: Setting(**declared)}
    return dataclasses.field(default=default, metadata=metadata)


@cache
def settings_of(cls: type) -> dict[str, Setting]:
    """Return every declared setting of a dataclass, by name, in order."""
    hints, meanings = get_type_hints(cls), _meanings(cls)
    return {
        field.name: dataclasses.replace(
            field.metadata[_METADATA],
            name=field.name,
            type=hints[field.name],
            default=field.default,
            meaning=meanings.get(field.name, ""),
        )
        for field in dataclasses.fields(cls)
        if _METADATA in field.metadata
    }


def defaults_of(cls: type) -> dict[str, Any]:
    """Return the default of every setting that has one."""
    return {
        name: each.default
        for name, each in settings_of(cls).items()
        if each.default is not dataclasses.MISSING
    }


def _meanings(cls: type) -> dict[str, str]:
    """Return what the section "Attributes" of the docstrings says of each field."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        _, _, section = cleandoc(base.__doc__ or "").partition("Attributes:\n")
        name = ""
        for line in section.splitlines():
            if line and not line.startswith("    "):
                break
            if line.startswith("    ") and not line.startswith("     "):
                name, _, text = line.strip().partition(": ")
                found[name] = text
            elif line.strip():
                found[name] += f" {line.strip()}"
    return found


def check(settings: Any, message: str) -> None:
    """Refuse a value out of its declared range.

    Args:
        settings: a dataclass of settings.
        message: a template that may name ``name``, ``value``, ``needed`` and ``known``.

    Raises:
        InputError: the message of the first such value.
    """
    for name, each in settings_of(type(settings)).items():
        value = getattr(settings, name)
        needed = each.fault(value)
        if needed:
            known = ", ".join(map(str, each.allowed))
            raise InputError(message.format(name=name, value=value, needed=needed, known=known))


def inert(cls: type, values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield settings that are not at their default and do nothing, each with what it lacks.

    Args:
        cls: a dataclass of settings.
        values: at least of every setting that has a default.
    """
    for name, default in defaults_of(cls).items():
        lacking = settings_of(cls)[name].missing_need(values)
        if lacking is not None and values[name] != default:
            yield name, lacking


def requirements(cls: type, values: Mapping[str, Any]) -> frozenset[str]:
    """Return what a model must be given besides the items: "time", "target_domain"."""
    needed: set[str] = set()
    for name in defaults_of(cls):
        each, value = settings_of(cls)[name], values[name]
        if each.missing_need(values) is not None:
            continue
        if isinstance(each.reads, str):
            needed |= {each.reads} if value and each.reads else set()
        elif value in each.reads:
            needed.add(each.reads[value])
    return frozenset(needed)


def tags(settings: Any) -> list[str]:
    """Name settings in the path of a checkpoint: a tag each, and a hash of what has none.

    Defaults say nothing; nor do settings that upstream's own name tells or that the data decide.
    Apart from those, settings that differ have different tags.
    """
    parts, untold = _named(settings, lambda each: each.tag)
    declared = settings_of(type(settings))
    untold = {name: value for name, value in untold.items() if not declared[name].upstream}
    if untold:
        text = json.dumps(untold, sort_keys=True, default=str)
        parts.append(f"x{blake2b(text.encode(), digest_size=4).hexdigest()}")
    return parts


def labels(settings: Any) -> list[str]:
    """Name settings for people: a label each, ``name=value`` for what has none.

    Defaults say nothing; nor does what the data decide. Apart from those, settings that differ
    have different labels.
    """
    parts, untold = _named(settings, lambda each: each.label or each.tag)
    return parts + [f"{name}={value}" for name, value in untold.items()]


def _named(
    settings: Any, naming_of: Callable[[Setting], Naming]
) -> tuple[list[str], dict[str, Any]]:
    """Name the settings that are not at their default; return what no name tells, too."""
    declared, values = settings_of(type(settings)), vars(settings)
    changed = {
        name: values[name]
        for name, default in defaults_of(type(settings)).items()
        if values[name] != default and not declared[name].from_data
    }
    parts, told = [], set()
    for name, value in changed.items():
        naming = naming_of(declared[name])
        by_value = isinstance(naming, Mapping)
        template = naming.get(value, naming.get(...)) if by_value else naming
        if template is None:
            continue
        parts.append(template.format_map(values))
        told |= {field for _, field, _, _ in Formatter().parse(template) if field}
        if declared[name].type is bool or (by_value and value in naming):
            told.add(name)
    return parts, {name: value for name, value in changed.items() if name not in told}


def nearest_setting(name: str, blocks: Mapping[str, type], block: str = "") -> str | None:
    """Find the setting that a wrong name means, as ``block.name``; None where nothing is near.

    Another block's setting of this very name comes first, then one that is also known by it, then
    one whose name holds all its parts (``batch_size``: ``local_batch_size``), then the nearest
    spelling.

    Args:
        name: as a user wrote it, without its block.
        blocks: blocks of settings by their name.
        block: where the user wrote it; its own settings come before others. Empty: in none.
    """
    order = sorted(blocks, key=lambda each: each != block)
    known = [
        (f"{prefix}.{each.name}", each)
        for prefix in order
        for each in settings_of(blocks[prefix]).values()
        if not each.from_data
    ]
    parts = set(name.split("_"))
    for fits in (
        lambda each: each.name == name,
        lambda each: name in each.also,
        lambda each: parts <= set(each.name.split("_")),
    ):
        found = [full for full, each in known if fits(each)]
        if found:
            return found[0]
    spelled = {each.name: full for full, each in reversed(known)}
    return spelled.get(nearest(name, spelled, cutoff=0.5) or "")


def rows(block: str, settings: Mapping[str, Setting]) -> list[dict[str, Any]]:
    """Return one row a setting that a user can set, for people who look for it.

    Args:
        block: what the row calls the settings' place.
        settings: by the name that users write, ``xd_train.learning_rate``.
    """
    return [
        {
            "name": name,
            "type": each.type_name,
            "default": each.default,
            "meaning": each.meaning.replace("``", ""),
            "block": block,
            "also": list(each.also),
        }
        for name, each in settings.items()
        if not each.from_data
    ]
