"""What a search over settings tries: ranges and choices, declared in gin as ``xd_tune.space``.

A line reads as an assignment, ``"xd_train.learning_rate = (5e-4, 1e-2, 'log')"``: in parentheses
the lowest and the highest value, even on a logarithmic scale where 'log' is added, in brackets the
choices. Several settings on the left take the same value, or, where a choice holds as many as there
are settings, one each.
"""

import ast
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hstu_xd.declaration import Setting, check, nearest_setting, setting, settings_of
from hstu_xd.errors import InputError

BLOCK = "xd_tune"
_DROPOUT = "xd_train.dropout_rate, xd_encoder.linear_dropout_rate"
_WIDTH = "xd_train.item_embedding_dim, xd_encoder.dqk, xd_encoder.dv"


@dataclass(frozen=True)
class TuneSettings:
    """What ``xd_tune.*`` bindings set; ``hstu-xd tune`` alone reads them.

    Attributes:
        space: what is tried, a line for each dimension: settings = (lowest, highest) or
            (lowest, highest, 'log') or [choices]; settings that share a line share the value, or
            have one each in every choice.
        random_trials: trials that are drawn before the sampler learns from those before.
        unpruned_trials: finished trials of a variant before one of its trials may be pruned.
        unpruned_epochs: epochs before a trial may be pruned; later a trial is stopped whose best
            epoch so far is behind the median of the others at the same epoch.
    """

    space: tuple[str, ...] = setting(
        (
            "xd_train.learning_rate = (5e-4, 1e-2, 'log')",
            f"{_DROPOUT} = (0.1, 0.7)",
            "xd_train.weight_decay = (1e-5, 0.1, 'log')",
            "xd_train.temperature = (0.05, 0.2, 'log')",
            "xd_encoder.num_blocks = [1, 2, 3]",
            f"{_WIDTH} = [(64, 16, 16), (128, 32, 32)]",
        ),
        also=("search_space", "ranges"),
    )
    random_trials: int = setting(5, at_least=1, also=("startup_trials",))
    unpruned_trials: int = setting(4, at_least=1)
    unpruned_epochs: int = setting(4, at_least=1, also=("warmup_epochs",))

    def __post_init__(self) -> None:
        check(self, BLOCK + ".{name} = {value!r}; it must be {needed}")


@dataclass(frozen=True)
class Dimension:
    """One dimension of a search space.

    Attributes:
        names: settings that it decides, ``xd_train.learning_rate``.
        low, high: bounds of a range, both included.
        log: whether the range is even on a logarithmic scale.
        choices: the only values instead, each a tuple of a value a setting.
    """

    names: tuple[str, ...]
    low: float = 0
    high: float = 0
    log: bool = False
    choices: tuple[tuple[Any, ...], ...] = ()

    @property
    def label(self) -> str:
        """Its name in tables."""
        return ", ".join(self.names)

    def values(self, drawn: Any) -> dict[str, Any]:
        """Return what each setting is to be.

        Args:
            drawn: a number of the range, or a choice.
        """
        each = drawn if self.choices else (drawn,) * len(self.names)
        return dict(zip(self.names, each))

    def holding(self, settings: Mapping[str, Any]) -> Any:
        """Return the point of this dimension that settings lie at; None where they are outside."""
        own = tuple(settings[name] for name in self.names)
        if self.choices:
            return own if own in self.choices else None
        return own[0] if len({*own}) == 1 and self.low <= own[0] <= self.high else None


def parse_space(lines: Sequence[str], blocks: Mapping[str, type]) -> list[Dimension]:
    """Read the lines of ``xd_tune.space``.

    Args:
        lines: as the module's docstring describes them.
        blocks: settings by block, which give the known names, types and ranges.

    Raises:
        InputError: no line at all, one that is no assignment, an unknown setting (the message gives
            the nearest), one that is decided twice, or a value that a setting cannot have.
    """
    if not lines:
        raise InputError(
            f"{BLOCK}.space is empty; give what is tried, such as "
            "\"xd_train.temperature = (0.05, 0.2, 'log')\""
        )
    known = {
        f"{block}.{name}": each
        for block, cls in blocks.items()
        if block != BLOCK
        for name, each in settings_of(cls).items()
        if not each.from_data
    }
    dimensions = [_dimension(line, known, blocks) for line in lines]
    names = [name for each in dimensions for name in each.names]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"{BLOCK}.space decides {name} twice; keep one of the lines")
    return dimensions


def _dimension(line: str, known: Mapping[str, Setting], blocks: Mapping[str, type]) -> Dimension:
    left, _, right = line.partition("=")
    names = tuple(name.strip() for name in left.split(","))
    for name in names:
        if name not in known:
            block, _, plain = name.rpartition(".")
            near = nearest_setting(plain, blocks, block)
            raise InputError(
                f"{BLOCK}.space: {line!r} names {name!r}, which is no setting"
                + (f"; did you mean {near}?" if near else "; see hstu-xd settings")
            )
    try:
        given = ast.literal_eval(right.strip())
    except (ValueError, SyntaxError):
        given = None
    told = f"{BLOCK}.space: {line!r}"
    declared = [known[name] for name in names]
    if isinstance(given, list) and given:
        return Dimension(names, choices=_choices(given, declared, told))
    if isinstance(given, tuple) and len(given) in (2, 3) and given[2:] in ((), ("log",)):
        return _range(names, given, declared, told)
    raise InputError(
        f"{told} has no values; give (lowest, highest), (lowest, highest, 'log') or a list of "
        "choices, [1, 2]"
    )


def _choices(given: list[Any], declared: list[Setting], told: str) -> tuple[tuple[Any, ...], ...]:
    choices = []
    for choice in given:
        each = choice if len(declared) > 1 and isinstance(choice, tuple) else None
        each = each or (choice,) * len(declared)
        if len(each) != len(declared):
            raise InputError(
                f"{told}: {choice!r} has {len(each)} values; {len(declared)} settings need as many"
            )
        choices.append(tuple(_checked(v, one, told) for v, one in zip(each, declared)))
    if len(choices) > len({*map(repr, choices)}):
        raise InputError(f"{told} holds a choice twice; leave one out")
    return tuple(choices)


def _range(
    names: tuple[str, ...], given: tuple[Any, ...], declared: list[Setting], told: str
) -> Dimension:
    if {one.type for one in declared} not in ({int}, {float}):
        raise InputError(
            f"{told}: a range needs settings that are all float or all int; give a list of choices"
        )
    # All settings of the line must be able to have the value, which is of one type.
    low, high = ([_checked(v, one, told) for one in declared][-1] for v in given[:2])
    log = len(given) == 3
    if not low < high:
        raise InputError(f"{told}: {low!r} is not below {high!r}; give the lowest value first")
    if log and low <= 0:
        raise InputError(f"{told}: a logarithmic scale starts above 0, got {low!r}")
    return Dimension(names, low, high, log)


def _checked(value: Any, declared: Setting, told: str) -> Any:
    """Return a value in the setting's type, if the setting may have it."""
    value = declared.typed(value, f"{told}: {declared.name} = {value!r}")
    if needed := declared.fault(value):
        raise InputError(f"{told}: {declared.name} = {value!r}; it must be {needed}")
    return value
