"""Where a run is followed beside its own files: TensorBoard, MLflow, Weights & Biases.

``trackers.json`` of a run folder names its trackers, each with the id that it knows the run by, so
that a resumed run goes on there. Servers and projects are chosen as each tracker has it: by
MLFLOW_TRACKING_URI, MLFLOW_EXPERIMENT_NAME, WANDB_PROJECT, WANDB_MODE and their like.
"""

import json
import logging
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, Protocol

from hstu_xd.errors import InputError, did_you_mean
from hstu_xd.training.run_facts import RUN_FILE, read_run

_logger = logging.getLogger(__name__)

TRACKERS_FILE = "trackers.json"
# The experiment or project of runs for which no other is named.
PROJECT = "hstu-xd"


@dataclass(frozen=True)
class TrackedRun:
    """What a tracker is told of a run before it starts.

    Attributes:
        folder: the run folder.
        known_as: the id that the tracker knows the run by; "": it does not know it.
        step: of the checkpoint that a resumed run goes on from; None: a new run.
    """

    folder: Path
    known_as: str = ""
    step: int | None = None


class Tracker(Protocol):
    """Takes in what a run is, how it goes and what it comes to; made of a :class:`TrackedRun`.

    What raises an error is called again after the next epoch.
    """

    package: ClassVar[str]

    def __init__(self, run: TrackedRun) -> None: ...

    def start(self, settings: Mapping[str, Any]) -> str:
        """Begin, or go on with a run that is known; return the id that it is known by.

        Args:
            settings: all that run.json says, by dotted names.
        """
        ...

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Take in metrics by name (``valid/ndcg@10``); those of a step may come in several calls.

        A run that was killed and goes on may repeat steps, with the same values.
        """
        ...

    def finish(self, artefacts: Sequence[Path], summary: Mapping[str, float]) -> None:
        """Take in what a finished run has written and come to, and end."""
        ...

    def stop(self) -> None:
        """End for now: the run was interrupted or failed, and may go on later."""
        ...


class TensorBoard:
    """Writes event files into a folder of the run folder."""

    package: ClassVar[str] = "tensorboard"
    FOLDER = "tensorboard"

    def __init__(self, run: TrackedRun) -> None:
        self._run = run
        self._board: Any = None

    def start(self, settings: Mapping[str, Any]) -> str:
        """Open the event file; what an earlier one says of later steps is void."""
        # Imported here: TensorBoard takes a second to load and evaluation alone never needs it.
        from torch.utils.tensorboard import SummaryWriter

        folder = str(self._run.folder / self.FOLDER)
        self._board = SummaryWriter(folder, purge_step=self._run.step)
        return self.FOLDER

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Write scalars."""
        for name, value in values.items():
            self._board.add_scalar(name, value, step)
        self._board.flush()

    def finish(self, artefacts: Sequence[Path], summary: Mapping[str, float]) -> None:
        """Close the event file, which lies beside the artefacts."""
        self.stop()

    def stop(self) -> None:
        """Close the event file."""
        if self._board is not None:
            self._board.close()


class MLflow:
    """Logs to an MLflow server, database or folder, by MLFLOW_TRACKING_URI."""

    package: ClassVar[str] = "mlflow"
    # Most parameters, and most metrics, of one request.
    _PARAMETERS, _METRICS = 100, 1000
    # An epoch waits at most half a minute for a server that is gone, instead of minutes.
    _PATIENCE: ClassVar = {
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "15",
    }

    def __init__(self, run: TrackedRun) -> None:
        self._run, self._id = run, run.known_as

    def start(self, settings: Mapping[str, Any]) -> str:
        """Create the run in its experiment, or set it running again."""
        for name, value in self._PATIENCE.items():
            os.environ.setdefault(name, value)
        import mlflow

        self._client = mlflow.MlflowClient()
        if self._id:
            self._client.update_run(self._id, status="RUNNING")
            return self._id
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        experiment = os.environ.get("MLFLOW_EXPERIMENT_ID") or self._experiment(name)
        tags = {"mlflow.source.name": str(settings.get("command", ""))}
        created = self._client.create_run(experiment, run_name=self._run.folder.name, tags=tags)
        parameters = [mlflow.entities.Param(_plain(k), str(v)) for k, v in settings.items()]
        for some in _chunks(parameters, self._PARAMETERS):
            self._client.log_batch(created.info.run_id, params=some)
        self._id = created.info.run_id
        return self._id

    def _experiment(self, name: str) -> str:
        found = self._client.get_experiment_by_name(name)
        return found.experiment_id if found else self._client.create_experiment(name)

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Log metrics; ``@`` and brackets, which MLflow refuses, are written otherwise."""
        import mlflow

        now = int(time.time() * 1000)
        rows = [mlflow.entities.Metric(_plain(k), v, now, step) for k, v in values.items()]
        for some in _chunks(rows, self._METRICS):
            self._client.log_batch(self._id, metrics=some)

    def finish(self, artefacts: Sequence[Path], summary: Mapping[str, float]) -> None:
        """Log the summary as metrics, upload the artefacts and end the run."""
        self.metrics(0, summary)
        for file in artefacts:
            self._client.log_artifact(self._id, str(file))
        self._client.set_terminated(self._id, "FINISHED")

    def stop(self) -> None:
        """Mark the run as killed."""
        self._client.set_terminated(self._id, "KILLED")


def _plain(name: str) -> str:
    """Write a name with what MLflow allows: ndcg@10[Toys/Games] as ndcg_at_10 Toys_Games."""
    metric, bracket, group = name.replace("@", "_at_").partition("[")
    return metric + " " * len(bracket) + re.sub(r"[^\w\-. :]", "_", group.removesuffix("]"))


def _chunks(rows: Sequence[Any], size: int) -> Iterator[list[Any]]:
    left = iter(rows)
    while some := list(islice(left, size)):
        yield some


class WeightsAndBiases:
    """Logs to Weights & Biases, or with WANDB_MODE=offline into a folder to be synced later."""

    package: ClassVar[str] = "wandb"
    # Seconds that a finished run waits for the server; what is left is kept for `wandb sync`.
    _PATIENCE = 60.0

    def __init__(self, run: TrackedRun) -> None:
        self._run = run

    def start(self, settings: Mapping[str, Any]) -> str:
        """Begin a run in its project, or go on with one."""
        import wandb

        self._logged = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=self._run.folder.name,
            id=self._run.known_as or None,
            resume="allow",
            config=dict(settings),
            dir=os.environ.get("WANDB_DIR", str(self._run.folder)),
            reinit="create_new",
            settings=wandb.Settings(console="off", finish_timeout=self._PATIENCE),
        )
        return self._logged.id

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Log metrics; steps that come again are ignored."""
        self._logged.log(dict(values), step=step)

    def finish(self, artefacts: Sequence[Path], summary: Mapping[str, float]) -> None:
        """Set the summary, upload the artefacts as one of type "run", and end the run."""
        import wandb

        self._logged.summary.update(dict(summary))
        written = wandb.Artifact(f"run-{self._logged.id}", type="run")
        for file in artefacts:
            written.add_file(str(file))
        self._logged.log_artifact(written)
        self._logged.finish()

    def stop(self) -> None:
        """End the run as one that has not gone well; it can be resumed."""
        self._logged.finish(exit_code=1)


# Name on the command line, and extra of this package -> what makes a tracker of a run.
TRACKERS: dict[str, type[Tracker]] = {
    "tensorboard": TensorBoard,
    "mlflow": MLflow,
    "wandb": WeightsAndBiases,
}


def check_trackers(names: Sequence[str]) -> None:
    """Refuse trackers that there are not, or that are not installed.

    Raises:
        InputError: names it, and what to install.
    """
    for name in names:
        if name not in TRACKERS:
            raise InputError(
                f"--tracker {name}{did_you_mean(name, TRACKERS)}; there are {', '.join(TRACKERS)}"
            )
        if find_spec(TRACKERS[name].package) is None:
            raise InputError(
                f"--tracker {name} needs {TRACKERS[name].package}, which is not installed: pip "
                f'install "hstu-xd[{name}]"'
            )


def choose_trackers(run: Path, names: Sequence[str]) -> None:
    """Note in a run folder where it is followed; those that know it already still do."""
    known = _trackers_of(run)
    _note(run, {name: known.get(name, "") for name in names})


def _trackers_of(run: Path) -> dict[str, str]:
    """Return the names of a run's trackers, each with the id that it knows the run by."""
    file = run / TRACKERS_FILE
    if not file.exists():
        return {"tensorboard": TensorBoard.FOLDER}
    try:
        known = {
            str(name): str(known_as) for name, known_as in json.loads(file.read_text()).items()
        }
        check_trackers(list(known))
    except (ValueError, AttributeError) as error:
        mend = "remove it, and name the run's trackers by --tracker"
        raise InputError(f"{file}: cannot be followed ({error}); {mend}") from error
    return known


def _note(run: Path, known: Mapping[str, str]) -> None:
    partial = run / f"{TRACKERS_FILE}.partial"
    partial.write_text(json.dumps(known, indent=1) + "\n")
    partial.replace(run / TRACKERS_FILE)


class Trackers:
    """All trackers of a run. None of them fails a training: the first error of each is a warning.

    Args:
        run: the run folder.
    """

    def __init__(self, run: Path) -> None:
        self._run = run
        self._told: dict[str, _ToldTracker] = {}

    def start(self, rows: Sequence[tuple[int, Mapping[str, float]]], step: int | None) -> None:
        """Begin, or go on with a run.

        Args:
            rows: metrics that there are already, with their steps; who does not know the run yet is
                told of them.
            step: of the checkpoint that a resumed run goes on from; None: a new run.
        """
        # A trainer without a run folder of the commands has nothing to say of its settings.
        facts = read_run(self._run) if (self._run / RUN_FILE).exists() else {}
        settings = dict(_flat(facts, "."))
        for name, known_as in _trackers_of(self._run).items():
            tracker = TRACKERS[name](TrackedRun(self._run, known_as, step))
            told = self._told[name] = _ToldTracker(name, tracker, known_as)
            told.start(settings)
            for row in () if known_as else rows:
                told.call("metrics", *row)
        self._note_ids()

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Tell all of metrics."""
        for told in self._told.values():
            told.call("metrics", step, values)
        self._note_ids()

    def finish(self, artefacts: Sequence[Path], summary: Mapping[str, Any]) -> None:
        """Tell all what the run has written and come to."""
        numbers = {
            f"summary/{name}": float(value)
            for name, value in _flat(summary, "/")
            if isinstance(value, (int, float))
        }
        self._end("finish", artefacts, numbers)

    def stop(self) -> None:
        """Tell all that have not been told of an end that the run ends for now."""
        self._end("stop")

    def _end(self, call: str, *values: Any) -> None:
        for told in self._told.values():
            told.call(call, *values)
        self._note_ids()
        self._told = {}

    def _note_ids(self) -> None:
        known = {name: told.known_as for name, told in self._told.items()}
        if known and known != _trackers_of(self._run):
            _note(self._run, known)


class _ToldTracker:
    """One tracker, and what it has still to be told: calls that failed come again, in order."""

    def __init__(self, name: str, tracker: Tracker, known_as: str) -> None:
        self._name, self._tracker, self.known_as = name, tracker, known_as
        self._left: list[Callable[[], object]] = []
        self._has_warned = False

    def start(self, settings: Mapping[str, Any]) -> None:
        def begin() -> None:
            self.known_as = self._tracker.start(settings)

        self._left.append(begin)
        self._catch_up()

    def call(self, name: str, *values: Any) -> None:
        self._left.append(lambda: getattr(self._tracker, name)(*values))
        self._catch_up()

    def _catch_up(self) -> None:
        try:
            while self._left:
                self._left[0]()
                del self._left[0]
        except Exception as error:
            if not self._has_warned:
                said = " ".join(str(error).split()) or type(error).__name__
                _logger.warning(
                    "%s does not take in the run (%.300s); the training goes on, its folder has "
                    "all of it, and what is missing there is sent again after every epoch",
                    *(self._name, said),
                )
            self._has_warned = True


def _flat(values: Mapping[str, Any], separator: str, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the entries of nested mappings by their joined names."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, separator, f"{prefix}{name}{separator}")
        else:
            yield f"{prefix}{name}", value
