"""What ablate and tune ask of each kind of run: its data, its settings, and how it is trained."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, TypeVar

from hstu_xd.data.requests import RequestSet, is_requests, read_manifest
from hstu_xd.data.store import InteractionStore
from hstu_xd.errors import InputError
from hstu_xd.experiments.run_folders import read_run
from hstu_xd.experiments.variants import COMPARED, check_name, variant_file
from hstu_xd.files import gin_folder
from hstu_xd.ranking.settings import RankingSettings, load_ranking_settings
from hstu_xd.training.run_facts import CONFIG_FILE, TRAIN_UNTIL, data_changes
from hstu_xd.training.search_space import Dimension, TuneSettings
from hstu_xd.training.settings import RunSettings, load_settings


class Settings(Protocol):
    """Settings of a run, and of a search over them."""

    @property
    def tune(self) -> TuneSettings:
        """How the search goes."""
        ...

    @property
    def flat(self) -> dict[str, Any]:
        """Every setting of a run by its full name."""
        ...

    @property
    def search_space(self) -> list[Dimension]:
        """What a search tries."""
        ...

    def to_gin(self) -> str:
        """Write every setting as a gin file."""
        ...


S = TypeVar("S", bound=Settings)


@dataclass(frozen=True)
class Kind(ABC, Generic[S]):
    """Runs of one kind on the same data.

    Attributes:
        data: what the command is given.
        store: the log.
        command: that trains one.
        block: of the trainer's settings, with ``random_seed`` and ``select_metric`` among them.
    """

    data: Path
    store: InteractionStore

    command: ClassVar[str]
    block: ClassVar[str]

    @property
    @abstractmethod
    def compared(self) -> Sequence[str]:
        """Variants that an ablation compares unless told otherwise."""

    @property
    @abstractmethod
    def hashes(self) -> Any:
        """What tells the data from others."""

    @abstractmethod
    def load(self, files: Sequence[Path], bindings: Sequence[str]) -> S:
        """Read settings."""

    @abstractmethod
    def check_source(self, variant: str) -> None:
        """Refuse a variant, as it was asked for, that is of the other kind of runs.

        Raises:
            InputError: it is.
        """

    @abstractmethod
    def check_variants(self, settings: Mapping[str, S]) -> None:
        """Refuse variants that one table cannot hold.

        Args:
            settings: by the variants as they were asked for.

        Raises:
            InputError: a recipe that switches on what a variant's name leaves out, or variants that
                are measured differently.
        """

    @abstractmethod
    def apart(self, folder: Path, settings: S, own: Mapping[str, Any]) -> str:
        """Say what a run that is there was trained on otherwise; empty where on nothing.

        Args:
            folder: of the run.
            settings: that it should have.
            own: those of its trainer that set it apart from other runs of its variant.
        """


class RetrievalRuns(Kind[RunSettings]):
    """Runs of ``hstu-xd train`` on a prepared store."""

    command, block = "train", "xd_train"

    @property
    def compared(self) -> Sequence[str]:
        """The switches."""
        return tuple(COMPARED)

    @property
    def hashes(self) -> Any:
        """Hashes of the store's files."""
        return self.store.manifest["hashes"]

    def load(self, files: Sequence[Path], bindings: Sequence[str]) -> RunSettings:
        """Read settings."""
        return load_settings(files, bindings)

    def check_source(self, variant: str) -> None:
        """Take all: a gin file that is of ranking binds what nothing reads."""

    def check_variants(self, settings: Mapping[str, RunSettings]) -> None:
        """Refuse recipes that do not fit a variant's name, several protocols, unequal training."""
        for variant, each in settings.items():
            check_name(variant, each)
        (first, base), *others = settings.items()
        for variant, own in others:
            if own.protocol != base.protocol:
                raise InputError(
                    f"variant {variant} is evaluated by {own.protocol}, {first} by "
                    f"{base.protocol}: their numbers do not compare; put xd_evaluate settings into "
                    "the recipe that all share"
                )
            if own.train.until != base.train.until:
                raise InputError(
                    f"variant {variant} has {TRAIN_UNTIL} = {own.train.train_until!r}, {first} "
                    f"{base.train.train_until!r}: one of them is trained on more; put the setting "
                    "into the recipe that all share"
                )
        if not base.train.until.measured():
            raise InputError(
                f"{TRAIN_UNTIL} = {base.train.train_until!r} leaves nothing to measure variants "
                "by; compare them with 'train' or 'valid'"
            )

    def apart(self, folder: Path, settings: RunSettings, own: Mapping[str, Any]) -> str:
        """Say what a run that is there was trained on otherwise."""
        recorded = read_run(folder).info
        if changes := data_changes(recorded, self.store):
            return f"on other data than {self.store.path} now holds ({changes})"
        wanted = replace(settings, train=replace(settings.train, **own)).on(self.store)
        return _told(wanted.unlike(recorded))


@dataclass(frozen=True)
class RankingRuns(Kind[RankingSettings]):
    """Runs of ``hstu-xd rank`` on requests; every variant is a gin file.

    Attributes:
        requests: that are ranked.
    """

    requests: RequestSet

    command, block = "rank", "xd_rank"

    @property
    def compared(self) -> Sequence[str]:
        """The recipes of this package."""
        return [str(file) for file in sorted((gin_folder() / "standalone").glob("rank_*.gin"))]

    @property
    def hashes(self) -> Any:
        """Hash of the requests."""
        return self.requests.manifest["hash"]

    def load(self, files: Sequence[Path], bindings: Sequence[str]) -> RankingSettings:
        """Read settings."""
        return load_ranking_settings(files, bindings)

    def check_source(self, variant: str) -> None:
        """Refuse the names, which are all of retrieval."""
        if variant_file(variant) is None:
            raise InputError(
                f"variant {variant!r} is one of hstu-xd train, and {self.data} holds requests to "
                "rank for; name gin files, such as gin/standalone/rank_tin.gin"
            )

    def check_variants(self, settings: Mapping[str, RankingSettings]) -> None:
        """Take all: gin files are named after nothing in them, and all are measured alike."""

    def apart(self, folder: Path, settings: RankingSettings, own: Mapping[str, Any]) -> str:
        """Say what a run that is there was trained on otherwise."""
        if read_run(folder).info.get("requests_hash") != self.hashes:
            return f"on other requests than {self.data} now holds (hashes differ)"
        wanted = replace(settings, rank=replace(settings.rank, **own))
        return _told(wanted.unlike(load_ranking_settings([folder / CONFIG_FILE])))


def _told(unlike: Sequence[str]) -> str:
    return f"with other settings ({unlike[0]})" if unlike else ""


def runs_on(data: Path, *, verify: bool = False) -> Kind:
    """Return the kind of runs that is trained on a folder: a store, or requests of one.

    Args:
        data: the folder.
        verify: compare the hash of every file of the store with its manifest first.

    Raises:
        InputError: neither, or a damaged one.
    """
    if not is_requests(data):
        return RetrievalRuns(data, InteractionStore.open(data, verify=verify))
    store = InteractionStore.open(Path(read_manifest(data)["data"]), verify=verify)
    return RankingRuns(data, store, RequestSet.open(data, store))
