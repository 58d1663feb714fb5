"""What the plug-ins of all hosts need between a host's objects and those of this package.

Sessions, batches without padding, draws inside a domain, groups of targets and warm starts are the
same for all hosts. So are the replacements for what a host takes for granted on GPUs, which are
rebound where none is visible: each goes from the original to what takes its place, as
:class:`hstu_xd.plugins.rebinding.Rebinding` wants it.
"""

import logging
import os
import socket
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import pad

from hstu_xd.catalog import DomainCatalog
from hstu_xd.cores import usable_cores
from hstu_xd.errors import InputError
from hstu_xd.model.hstu import load_hstu
from hstu_xd.model.views import Events
from hstu_xd.training.distributed import keep_group


def free_port() -> int:
    """Return a port of this machine that nobody listens to."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def gloo_setup(_: Callable[..., Any]) -> Callable[..., Any]:
    """Replace a trainer's ``setup`` by one that joins a gloo group."""

    def setup(rank: int, world_size: int, master_port: int) -> None:
        os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(master_port))
        dist.init_process_group("gloo", rank=rank, world_size=world_size)
        keep_group()

    return setup


def gloo_for_nccl(init: Callable[..., Any]) -> Callable[..., Any]:
    """Replace ``torch.distributed.init_process_group`` by one that takes gloo for nccl."""

    def init_process_group(backend: str | None = None, **others: Any) -> None:
        init(backend="gloo" if backend == "nccl" else backend, **others)
        keep_group()

    return init_process_group


def without_device_ids(ddp: Callable[..., Any]) -> Callable[..., Any]:
    """Replace ``DistributedDataParallel`` by a call of it without ``device_ids``."""

    def ddp_on_cpu(module: torch.nn.Module, device_ids: object = None, **others: Any) -> Any:
        return ddp(module, **others)

    return ddp_on_cpu


def device_is_cpu(function: Callable[..., Any]) -> Callable[..., Any]:
    """Replace a function by one whose keyword ``device`` is the CPU whatever is given."""

    def on_cpu(*arguments: Any, device: object, **others: Any) -> Any:
        return function(*arguments, device=torch.device("cpu"), **others)

    return on_cpu


def module_to_cpu(to: Callable[..., Any]) -> Callable[..., Any]:
    """Replace ``torch.nn.Module.to`` by one that takes the CPU for every GPU.

    A GPU may also be named by its number alone, a process's rank.
    """

    def module_to(self: torch.nn.Module, *arguments: Any, **others: Any) -> Any:
        named = {name: _cpu_for_gpu(value) for name, value in others.items()}
        return to(self, *map(_cpu_for_gpu, arguments), **named)

    return module_to


def _cpu_for_gpu(value: Any) -> Any:
    is_gpu = type(value) is int or (isinstance(value, torch.device) and value.type == "cuda")
    return torch.device("cpu") if is_gpu else value


def returns_module(_: Callable[..., Any]) -> Callable[..., Any]:
    """Replace ``torch.nn.Module.cuda`` by a method that leaves the module where it is."""

    def module_cuda(self: torch.nn.Module, *arguments: Any, **others: Any) -> torch.nn.Module:
        return self

    return module_cuda


def does_nothing(_: Any) -> Callable[..., None]:
    """Replace a function by one that does nothing."""

    def nothing(*arguments: Any, **others: Any) -> None:
        return None

    return nothing


def no_context(_: Any) -> Callable[..., Any]:
    """Replace a context manager, as ``torch.cuda.device``, by one that does nothing."""

    def device(*arguments: Any, **others: Any) -> Any:
        return nullcontext()

    return device


def no_random_state(_: Any) -> Callable[..., torch.Tensor]:
    """Replace ``torch.cuda.get_rng_state`` by a function that returns an empty state."""

    def get_rng_state(*arguments: Any, **others: Any) -> torch.Tensor:
        return torch.empty(0, dtype=torch.uint8)

    return get_rng_state


def few_workers(loader: Callable[..., Any]) -> Callable[..., Any]:
    """Replace ``DataLoader`` by a call of it with at most one process a core, without pinning.

    The model needs the cores too; one of them is left to it.
    """

    def data_loader(
        *arguments: Any, num_workers: int = 0, pin_memory: bool = False, **others: Any
    ) -> Any:
        workers = min(num_workers, usable_cores() - 1)
        return loader(*arguments, num_workers=workers, pin_memory=False, **others)

    return data_loader


_logger = logging.getLogger(__name__)

# Large against every number of items: the remainder is uniform to 2^-30 and better.
_DRAWS = 2**62


@dataclass
class Session:
    """What the rebound names of one host share within a process: the data set in use.

    Attributes:
        catalog: its item -> domain table; None while no domains are known, and then every rebound
            name behaves as the host's own.
    """

    catalog: DomainCatalog | None = None
    _copies: dict[torch.device, DomainCatalog] = field(default_factory=dict)

    def open(self, catalog: DomainCatalog | None) -> None:
        """Take the catalogue of a data set, or none."""
        self.catalog = catalog
        self._copies.clear()

    def new_catalog(self) -> DomainCatalog:
        """Build a catalogue for a module to hold: it moves between devices with the module."""
        assert self.catalog is not None, "no data set with domains is open"
        return DomainCatalog(self.catalog.item_domains, self.catalog.domain_names)

    def catalog_on(self, device: torch.device) -> DomainCatalog:
        """Return the catalogue with its tables on a device; it is copied there once."""
        if device not in self._copies:
            self._copies[device] = self.new_catalog().to(device)
        return self._copies[device]


@dataclass(frozen=True, eq=False)
class UnpaddedBatch:
    """The tokens of a host's padded batch, as this package's layers take them.

    Attributes:
        valid: (B, N) bool, where the tokens are: a run of columns in each row.
        present: (L,) int64, places of the tokens in the flat batch.
        events: the tokens.
    """

    valid: Tensor
    present: Tensor
    events: Events

    @classmethod
    def build(
        cls,
        valid: Tensor,
        *,
        domains: Tensor,
        next_domains: Tensor,
        times: Tensor,
        next_times: Tensor,
    ) -> "UnpaddedBatch":
        """Cut the padding off.

        Args:
            valid: (B, N) bool.
            domains: (B, N) int64, of the tokens.
            next_domains: (B, N) int64, of the events that follow them.
            times: (B, N) int64, of the tokens.
            next_times: (B, N) int64, of the events that follow them.
        """
        present = valid.flatten().nonzero().squeeze(1)
        events = Events(
            domains=domains.flatten()[present],
            target_domains=next_domains.flatten()[present],
            timestamps=times.flatten()[present],
            next_timestamps=next_times.flatten()[present],
            offsets=pad(valid.sum(1).cumsum(0), (1, 0)),
        )
        return cls(valid, present, events)

    def gather(self, padded: Tensor) -> Tensor:
        """Take the tokens out of the padding: (B, N, ...) -> (L, ...)."""
        return padded.flatten(0, 1)[self.present]

    def spread(self, tokens: Tensor) -> Tensor:
        """Put the tokens back to their places, with zeros elsewhere: (L, ...) -> (B, N, ...)."""
        padded = tokens.new_zeros(self.valid.numel(), *tokens.shape[1:])
        return padded.index_copy(0, self.present, tokens).unflatten(0, self.valid.shape)


def draw_places(
    domains: Tensor,
    offsets: Tensor,
    num_to_sample: int,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw places of a table that is sorted by domain, uniformly among those of given domains.

    Args:
        domains: (...) int64, at least 0. A domain without a place, which only padding asks for,
            draws any place.
        offsets: (D + 1,) int64; the places of domain ``d`` are ``offsets[d]:offsets[d + 1]``.
        num_to_sample: draws ``R`` for each.
        generator: on the device of ``domains``; default: torch's.

    Returns:
        (..., R) int64.
    """
    first = offsets[domains].unsqueeze(-1)
    count = (offsets[domains + 1].unsqueeze(-1) - first).clamp(min=1)
    shape = (*domains.shape, num_to_sample)
    draws = torch.randint(_DRAWS, shape, device=domains.device, generator=generator)
    return torch.minimum(first + draws % count, offsets[-1] - 1)


def draw_within(
    domains: Tensor,
    catalog: DomainCatalog,
    num_to_sample: int,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw uniform items of given domains.

    Args:
        domains: (...) int64; a negative one draws from the first domain.
        catalog: on the device of ``domains``.
        num_to_sample: draws ``R`` for each.
        generator: on the device of ``domains``; default: torch's.

    Returns:
        (..., R) int64 item ids.
    """
    known = domains.clamp(min=0)
    return catalog.domain_items[
        draw_places(known, catalog.domain_offsets, num_to_sample, generator)
    ]


def target_groups(
    domains: Tensor, last_domains: Tensor, domain_names: Sequence[str]
) -> dict[str, Tensor]:
    """Tell which targets are in each group of a host's metrics.

    Args:
        domains: (Q,) int64, of the targets.
        last_domains: (Q,) int64, of the event before each; -1 where there is none.
        domain_names: name of each domain.

    Returns:
        Every domain's name, "switch" and "stay" -> (Q,) bool. A target without an event before it
        is in neither of the last two.
    """
    groups = {name: domains == d for d, name in enumerate(domain_names)}
    groups["switch"] = (domains != last_domains) & (last_domains >= 0)
    groups["stay"] = domains == last_domains
    return groups


@dataclass(frozen=True)
class CheckpointFormat:
    """How the trainer of a host keeps its checkpoints.

    Attributes:
        host: what messages call the host.
        entry: key of the model's state dict; a checkpoint without it is taken for one itself.
        kept_in: the folder that messages name.
        setting: the setting that gives the path, which messages begin with; empty: none.
        folder_hint: what is said of a folder in place of a file.
        weights_only: whether tensors are all that a checkpoint holds. Else it is a pickle that may
            run code: load only what you trust.
        ignored: parameters with this in their name are left out where the model has none; empty:
            there are none.
    """

    host: str
    entry: str
    kept_in: str
    setting: str = ""
    folder_hint: str = ""
    weights_only: bool = True
    ignored: str = ""

    def check(self, path: Path) -> None:
        """Refuse what is not a file.

        Raises:
            InputError: no such file, or a folder.
        """
        if path.is_dir():
            raise InputError(f"{self._at(path)} is a folder; give a file{self.folder_hint}")
        if not path.is_file():
            raise InputError(f"{self._at(path)}: no such file; give one out of {self.kept_in}")

    def read(self, path: Path) -> Mapping[str, Tensor]:
        """Read the model's state dict out of a checkpoint.

        Raises:
            InputError: no such file, or not a checkpoint of this host's.
        """
        self.check(path)
        try:
            checkpoint = torch.load(path, map_location="cpu", weights_only=self.weights_only)
        except Exception as error:  # torch.load fails in as many ways as there are formats
            raise InputError(
                f"{self._at(path)}: not a checkpoint of {self.host} ({error}); give a file out of "
                f"{self.kept_in}"
            ) from error
        is_mapping = isinstance(checkpoint, Mapping)
        state = checkpoint.get(self.entry, checkpoint) if is_mapping else None
        if not isinstance(state, Mapping) or not all(
            isinstance(value, Tensor) for value in state.values()
        ):
            raise InputError(
                f"{self._at(path)} holds no model; not a checkpoint of {self.host}, give a file "
                f"out of {self.kept_in}"
            )
        return state

    def load_into(self, model: nn.Module, path: Path) -> list[str]:
        """Load a trained model of the host into the one of this package that extends it.

        Returns:
            Names of the parameters that the checkpoint does not have: this package's alone.

        Raises:
            InputError: not a checkpoint, or one of another model or size.
        """
        own = model.state_dict()
        state = {name.removeprefix("module."): value for name, value in self.read(path).items()}
        if self.ignored:
            state = {
                name: value
                for name, value in state.items()
                if self.ignored not in name or name in own
            }
        try:
            new = load_hstu(model, state)
        except InputError as error:
            raise InputError(f"{self._at(path)}: {error}") from error
        _logger.info("warm start from %s; new parameters: %s", path, new)
        return new

    def _at(self, path: Path) -> str:
        return f"{self.setting}: {path}" if self.setting else str(path)
