"""Reading run folders and bringing their metrics together over seeds; no plotting, no torch."""

import json
import math
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hstu_xd.data.batches import Split
from hstu_xd.errors import InputError
from hstu_xd.evaluation.protocol import RANKING, RETRIEVAL, Protocol, until_of
from hstu_xd.evaluation.ranking import RankingProtocol

RUN_FILE = "run.json"
METRICS_FILE = "metrics.jsonl"
# What a variant costs: numbers of a row beside its metrics.
COSTS = ("seconds_per_step", "attention_pairs", "state_bytes")
SUMMARY_FILE = "summary.json"
ABLATION_FILE = "ablation.json"
# Parts of run.json that say how a run was trained; the seed among them is told apart.
SETTINGS = (
    "parameters",
    "max_sequence_length",
    "batch_size",
    "encoder",
    "train",
    "protocol",
    "loss",
    "search",
    "interest",
    "short",
    "rank",
)
SEEDS = ("train.random_seed", "train.seed", "rank.random_seed")

Row = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """One training run as it stands on disk.

    Attributes:
        path: the run folder.
        info: run.json: version, command, data, data_hashes, seed, parameters, variant_name, ...
        summary: summary.json, None while the run has not finished.
        train: training rows of metrics.jsonl by rising step, a repeated step (after a resume)
            once, as last written.
        valid: validation rows by rising epoch, a repeated epoch once, as last written.
        tests: test rows in the order of the file.
        notes: what a reader should know about this run, e.g. that it is still training.
    """

    path: Path
    info: Row
    summary: Row | None
    train: list[Row]
    valid: list[Row]
    tests: list[Row]
    notes: tuple[str, ...] = ()

    @property
    def variant(self) -> str:
        """The variant's name; runs that share it differ in their seed only."""
        return str(self.info["variant_name"])

    @property
    def seed(self) -> int:
        """The random seed."""
        return self.info["seed"]

    @property
    def kind(self) -> str:
        """What it is trained for, RETRIEVAL or RANKING."""
        return self.info.get("kind", RETRIEVAL)

    @property
    def protocol(self) -> Protocol | RankingProtocol:
        """By what it was measured, and which metrics tables of it show."""
        return RankingProtocol() if self.kind == RANKING else Protocol.from_run(self.info)

    def unlike_data_of(self, other: "Run") -> str:
        """Say what makes its numbers not compare with another run's; empty where they do."""
        if self.kind != other.kind:
            return f"one is a {self.kind} run and the other a {other.kind} run"
        if self.info["data_hashes"] != other.info["data_hashes"]:
            places = f"{self.info.get('data')} and {other.info.get('data')}"
            return f"trained on different data ({places}; hashes differ)"
        if self.info.get("requests_hash") != other.info.get("requests_hash"):
            places = f"{self.info.get('requests')} and {other.info.get('requests')}"
            return f"trained on different requests ({places}; hashes differ)"
        return ""

    @property
    def domain(self) -> str:
        """The only domain that it was trained on; empty: all."""
        return (self.info.get("train") or {}).get("domain") or ""

    @property
    def until(self) -> Split:
        """The last split whose targets it was trained on."""
        return until_of(self.info)

    @property
    def synthetic(self) -> bool:
        """Whether the run's own record calls its data synthetic."""
        return bool(self.info.get("synthetic") or self.data_summary.get("synthetic"))

    @property
    def data_summary(self) -> Row:
        """Counts of the data as copied from the store's manifest; empty when not recorded."""
        return self.info.get("data_summary") or {}

    @property
    def settings(self) -> Row:
        """Everything that was set but the seed, under dotted names: ``train.learning_rate``."""
        flat: Row = {}
        for key in SETTINGS:
            value = self.info.get(key)
            entries = value.items() if isinstance(value, dict) else [("", value)]
            flat |= {f"{key}.{name}".rstrip("."): entry for name, entry in entries}
        if self.info.get("train"):
            flat["train.train_until"] = self.until.value
        return {k: v for k, v in flat.items() if v is not None and k not in SEEDS}

    @property
    def test(self) -> Row:
        """Test metrics of the picked checkpoint; empty before the test has been read."""
        if self.summary is not None:
            return self.summary.get("test") or {}
        return self.tests[-1] if self.tests else {}

    @property
    def picked_valid(self) -> Row:
        """Validation metrics of the picked epoch, of the latest one while still training."""
        if self.summary is not None:
            return self.summary.get("valid") or {}
        return self.valid[-1] if self.valid else {}

    def row(self) -> Row:
        """Return the run as one row of ablation.json, the input of :func:`aggregate`."""
        summary = self.summary or {}
        keys = ("seconds_per_step", "events_per_second", "attention_pairs", "state_bytes")
        return {
            "variant": self.variant,
            "seed": self.seed,
            "best_epoch": summary.get("best_epoch"),
            "valid": self.picked_valid,
            "test": self.test,
            "parameters": self.info.get("parameters"),
            **{key: summary.get(key) for key in keys},
            **({"domain": self.domain} if self.domain else {}),
        }


@dataclass(frozen=True)
class Spread:
    """A value over seeds: mean, sample standard deviation (None for one seed) and count."""

    mean: float
    std: float | None
    count: int


@dataclass(frozen=True)
class VariantResult:
    """The runs of one variant taken together.

    Attributes:
        variant: the variant's name.
        seeds: seeds of its runs, in the order given.
        metrics: metric name, e.g. ``hr@100[switch]``, to its mean and spread over the seeds that
            report it. Fractions stay fractions.
        costs: mean over the seeds of each of :data:`COSTS` that is reported.
    """

    variant: str
    seeds: tuple[int, ...]
    metrics: dict[str, Spread] = field(default_factory=dict)
    costs: dict[str, float] = field(default_factory=dict)


def aggregate(rows: Iterable[Mapping[str, Any]], split: str = "test") -> list[VariantResult]:
    """Mean and spread over seeds of every metric, one result a variant in order of appearance.

    Args:
        rows: rows as in ablation.json: ``variant``, ``seed`` and a metrics mapping named ``split``.
        split: ``"test"`` or ``"valid"``.

    Returns:
        One result a variant. Missing, null and NaN values are left out of the mean, and a metric
        that no run of a variant reports is left out of its result. Rows of one ``domain`` each are
        joined: those of a seed make the metrics of all domains.

    Example:
        >>> rows = [{"variant": "hstu", "seed": s, "test": {"mrr": s / 10}} for s in (1, 2)]
        >>> aggregate(rows)[0].metrics["mrr"].count
        2
    """
    by_variant: dict[str, list[Mapping[str, Any]]] = {}
    for row in _joined(rows, split):
        by_variant.setdefault(str(row["variant"]), []).append(row)
    return [
        VariantResult(
            variant,
            tuple(row["seed"] for row in members),
            _spreads([row.get(split) or {} for row in members]),
            _means(members, COSTS),
        )
        for variant, members in by_variant.items()
    ]


def _joined(rows: Iterable[Mapping[str, Any]], split: str) -> Iterator[Mapping[str, Any]]:
    """Yield rows of all domains, those of one domain each joined by variant and seed."""
    together: dict[Any, list[Mapping[str, Any]]] = {}
    for place, row in enumerate(rows):
        key = (str(row["variant"]), row["seed"]) if row.get("domain") else place
        together.setdefault(key, []).append(row)
    for first, *more in together.values():
        if first.get("domain"):
            found = _of_all_domains([first, *more], split)
            yield {"variant": first["variant"], "seed": first["seed"], split: found}
        else:
            yield first


def _of_all_domains(parts: Sequence[Mapping[str, Any]], split: str) -> Row:
    """Join the metrics of models of one domain each, over all targets of the domains.

    A target that a model cannot be asked for, as its user has no earlier event of the domain, is a
    miss: every metric is 0 there.
    """
    joined: Row = {"count": 0}
    for row in parts:
        found, name = row.get(split) or {}, row["domain"]
        served = found.get("count", 0)
        asked = served + found.get("count_without_history", 0)
        joined[f"count[{name}]"] = asked
        joined["count"] += asked
        for metric, value in found.items():
            if "[" in metric or metric.startswith("count") or not is_number(value):
                continue
            joined[f"{metric}[{name}]"] = value * served / asked
            joined[metric] = joined.get(metric, 0.0) + value * served
    for metric in [m for m in joined if "[" not in m and m != "count"]:
        joined[metric] /= joined["count"]
    return joined


def _spreads(mappings: Sequence[Mapping[str, Any]]) -> dict[str, Spread]:
    names = dict.fromkeys(name for mapping in mappings for name in mapping)
    spreads = {}
    for name in names:
        values = [mapping[name] for mapping in mappings if is_number(mapping.get(name))]
        if values:
            spreads[name] = spread(values)
    return spreads


def _means(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> dict[str, float]:
    known = {name: [row[name] for row in rows if is_number(row.get(name))] for name in names}
    return {name: statistics.fmean(values) for name, values in known.items() if values}


def spread(values: Sequence[float]) -> Spread:
    """Mean and sample standard deviation of at least one value."""
    std = statistics.stdev(values) if len(values) > 1 else None
    return Spread(statistics.fmean(values), std, len(values))


def is_number(value: Any) -> bool:
    """Whether a value read from JSON is a finite number (true and false are not)."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def differing_settings(runs: Sequence[Run]) -> list[str]:
    """Names of the settings that are not the same in all runs, in the order of run.json."""
    each = [run.settings for run in runs]
    names = dict.fromkeys(name for settings in each for name in settings)
    return [n for n in names if any(s.get(n) != each[0].get(n) for s in each)]


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """Read run folders; a folder that holds run folders stands for all of them.

    The order is the order given; inside a folder of runs it is the order of its ablation.json
    where there is one, then the order of names. A run named twice counts once.

    Raises:
        InputError: no run at a path, or a file of a run that cannot be read.
    """
    folders: dict[Path, Path] = {}
    for path in paths:
        for folder in _expand(path):
            folders.setdefault(folder.resolve(), folder)
    return [read_run(folder) for folder in folders.values()]


def _expand(path: Path) -> list[Path]:
    if (path / RUN_FILE).is_file():
        return [path]
    if not path.is_dir():
        state = "is a file" if path.exists() else "does not exist"
        raise InputError(f"{path}: {state}; give a folder written by `hstu-xd train`")
    children = (child for child in sorted(path.iterdir()) if not child.name.startswith("."))
    folders = [child for child in children if (child / RUN_FILE).is_file()]
    if not folders:
        raise InputError(
            f"{path}: no run there, neither it nor a folder in it holds {RUN_FILE}; give a folder "
            "written by `hstu-xd train` or `hstu-xd ablate`"
        )
    return _in_ablation_order(path, folders)


def _in_ablation_order(path: Path, folders: list[Path]) -> list[Path]:
    """Sort run folders as ablation.json lists their variants, so that the first is the baseline."""
    if not (path / ABLATION_FILE).is_file():
        return folders
    document = _read_json(path / ABLATION_FILE)
    rows = document.get("rows", []) if isinstance(document, dict) else document
    variants = [row.get("variant") for row in rows if isinstance(row, dict)]
    rank = {variant: i for i, variant in reversed(list(enumerate(variants)))}
    names = {folder: _read_object(folder / RUN_FILE).get("variant_name") for folder in folders}
    return sorted(folders, key=lambda folder: rank.get(names[folder], len(variants)))


def read_run(folder: Path) -> Run:
    """Read one run folder.

    Raises:
        InputError: run.json, summary.json or a line of metrics.jsonl is unreadable, or run.json
            lacks the variant's name, the seed or the hashes of the data.
    """
    info = _read_object(folder / RUN_FILE)
    for key in ("variant_name", "seed", "data_hashes"):
        if key not in info:
            raise InputError(
                f"{folder / RUN_FILE}: holds no {key!r}; give a folder written by `hstu-xd train`"
            )
    summary = None
    if (folder / SUMMARY_FILE).is_file():
        summary = _read_object(folder / SUMMARY_FILE)
    rows, notes = read_metrics(folder / METRICS_FILE)
    valid = {row["epoch"]: row for row in rows if row["split"] == "valid"}
    train = {row["step"]: row for row in rows if row["split"] == "train"}
    if summary is None:
        epochs = [*valid, *(row["epoch"] for row in train.values())]
        last = f"after epoch {max(epochs)}" if epochs else "before its first validation"
        notes.insert(0, f"has no {SUMMARY_FILE} yet: still training or stopped, {last}")
    return Run(
        path=folder,
        info=info,
        summary=summary,
        train=[train[step] for step in sorted(train)],
        valid=[valid[epoch] for epoch in sorted(valid)],
        tests=[row for row in rows if row["split"] == "test"],
        notes=tuple(notes),
    )


def read_metrics(path: Path) -> tuple[list[Row], list[str]]:
    """Return the rows of a metrics.jsonl, and notes.

    A last line that is still being written is left out with a note.
    """
    if not path.is_file():
        return [], [f"has no {METRICS_FILE}: no learning curves"]
    rows: list[Row] = []
    lines = _read_bytes(path).split(b"\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            rows.append(_metrics_row(line))
        except ValueError as error:
            # The trainer ends every row with a newline, so a bad last piece is a row cut short.
            if number == len(lines):
                return rows, [f"line {number} of {METRICS_FILE} is cut short and left out"]
            raise InputError(
                f"{path}:{number}: {error}, got {_clip(line)}; remove the line or train again"
            ) from None
    return rows, []


def _metrics_row(line: bytes) -> Row:
    try:
        row = json.loads(line)
    except ValueError:
        raise ValueError("not a JSON object") from None
    if not isinstance(row, dict):
        raise ValueError("not a JSON object")
    if not isinstance(row.get("split"), str):
        raise ValueError("no 'split'")
    needed = {"train": ("epoch", "step"), "valid": ("epoch",)}.get(row["split"], ())
    for key in needed:
        if not is_number(row.get(key)):
            raise ValueError(f"no number as {key!r}")
    return row


def _clip(line: bytes) -> str:
    text = line.decode(errors="replace")
    return repr(text if len(text) <= 60 else text[:57] + "...")


def _read_object(path: Path) -> Row:
    document = _read_json(path)
    if not isinstance(document, dict):
        raise InputError(f"{path}: holds no JSON object; restore the file or train again")
    return document


def _read_json(path: Path) -> Any:
    text = _read_bytes(path)  # an InputError of its own
    try:
        return json.loads(text)
    except ValueError as error:
        line = getattr(error, "lineno", 1)
        raise InputError(
            f"{path}:{line}: not JSON ({error}); restore the file or train again"
        ) from None


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(
            f"{path}: cannot be read: {error.strerror}; make it readable or train again"
        ) from None
