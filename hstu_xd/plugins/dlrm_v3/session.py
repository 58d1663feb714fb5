"""A session over a trained model of the production path: append events, score candidates."""

from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from hashlib import blake2b
from itertools import pairwise
from pathlib import Path
from pickle import UnpicklingError

import numpy as np
import torch
from generative_recommenders.common import HammerKernel
from generative_recommenders.dlrm_v3.configs import get_hstu_configs
from torch import Tensor

from hstu_xd.catalog import DomainCatalog
from hstu_xd.data.store import InteractionStore
from hstu_xd.errors import InputError
from hstu_xd.files import partial_file
from hstu_xd.plugins.dlrm_v3.checkpoints import load_model
from hstu_xd.plugins.dlrm_v3.dlrm_rebindings import store_folder
from hstu_xd.plugins.dlrm_v3.incremental import IncrementalDlrmHSTU
from hstu_xd.plugins.dlrm_v3.launch import parsed_gin
from hstu_xd.plugins.dlrm_v3.requests import RequestBatch
from hstu_xd.plugins.dlrm_v3.settings import DlrmSettings, bound_value, cross_domain
from hstu_xd.plugins.dlrm_v3.store_dataset import configure, request_features, tables
from hstu_xd.plugins.dlrm_v3.user_memory import UserMemory

# Requests that are computed together: enough to make the model's own cost of a call small.
_USERS_AT_ONCE = 64


class DlrmSession:
    """Scores candidates for users whose histories grow, as the whole model would.

    Of each user the keys and values of every domain that was asked for are kept, and domain states
    with DDSR; a domain that is not asked for is not computed, unless DDSR reads its states. What
    the layers are given of an event tells whether what is kept of it holds. Upstream's positions
    count back from the request and its times are told from it, so an event that is appended moves
    all rows of its user, and so does a request that is much later: a domain's rows are computed
    again when it is asked for next. With ``xd_dlrm.positions = "order"`` they stay, and an event
    costs a row or two. A session belongs to one thread at a time.

    A request shows the latest ``max_history`` events. In order of events the window slides by
    quarters, as :class:`hstu_xd.serving.session.EncoderSession`'s does: of n events the oldest
    ``q * ceil((n - W) / q)`` have left, with ``W`` of ``max_history`` and ``q = max(1, W // 4)``.

    Args:
        model: a trained model on the CPU; put into evaluation mode.
        store: the log that is known at the beginning.
        settings: of the model, with a ``norm_length``.
        max_bytes: bound on what is kept; the least recently asked users are computed anew beyond
            it. None: no bound.

    Raises:
        InputError: settings without ``norm_length``.

    Example:
        >>> session = DlrmSession.open(Path("ck/1330"), Path("gin/dlrm_xd.gin"))  # doctest: +SKIP
        >>> session.append(["u17"], [4], [1_700_000_000])  # doctest: +SKIP
        >>> session.score(["u17"], torch.tensor([[5, 9]])).shape  # doctest: +SKIP
        torch.Size([1, 2])
    """

    def __init__(
        self,
        model: IncrementalDlrmHSTU,
        store: InteractionStore,
        settings: DlrmSettings,
        *,
        max_bytes: int | None = None,
    ) -> None:
        _check_norm_length(settings)
        self._model, self._store, self._settings = model.eval(), store, settings
        self._max_bytes = max_bytes
        self._appended: dict[str, tuple[list[int], list[int]]] = {}
        self._num_appended: Counter[str] = Counter()
        self._memories: OrderedDict[str, UserMemory] = OrderedDict()
        self._num_bytes = 0

    @classmethod
    def open(
        cls,
        checkpoint: Path,
        gin_file: Path,
        *,
        bindings: Sequence[str] = (),
        max_bytes: int | None = None,
    ) -> "DlrmSession":
        """Load a model that upstream's trainer has saved.

        Args:
            checkpoint: folder of a step, out of ``save_dmp_checkpoint.path``.
            gin_file: that it was trained with; ``make_model.dataset`` is its store.
            bindings: that it was trained with beyond the file's, or others of the store.
            max_bytes: bound on what is kept.

        Raises:
            InputError: a file or a binding that is refused, no prepared store, no ``norm_length``,
                or a checkpoint of another model.
        """
        with parsed_gin(gin_file, bindings, told=gin_file):
            settings = DlrmSettings()
            _check_norm_length(settings)
            store = _named_store(gin_file)
            model = new_model(store, settings)
        load_model(model, checkpoint)
        return cls(model, store, settings, max_bytes=max_bytes)

    def __len__(self) -> int:
        return len(self._memories)

    def __contains__(self, user: str) -> bool:
        return user in self._memories

    @property
    def num_bytes(self) -> int:
        """Count the bytes of all that is kept."""
        return self._num_bytes

    def append(
        self, users: Sequence[str], item_ids: Sequence[int], timestamps: Sequence[int]
    ) -> None:
        """Take events in the order given; a user may occur several times.

        Args:
            users: one an event, as the log names them; new ones unless ``user_token`` is on.
            item_ids: item of each event.
            timestamps: time of each event, not before the same user's last one.

        Raises:
            InputError: lengths that differ, an unknown item or user, or a time that goes back; no
                event was taken then.
        """
        if not len(users) == len(item_ids) == len(timestamps):
            raise InputError(
                f"{len(users)} users, {len(item_ids)} items and {len(timestamps)} timestamps; one "
                "of each an event is needed"
            )
        _check_items(self._store.catalog, item_ids)
        arriving: dict[str, tuple[list[int], list[int]]] = {}
        for user, item, time in zip(users, item_ids, timestamps):
            items, times = arriving.setdefault(user, ([], []))
            items.append(int(item))
            times.append(int(time))
        for user, (_, times) in arriving.items():
            known = self._history(user, self._number_of(user))[1][-1:].tolist()
            for last, time in pairwise([*known, *times]):
                if time < last:
                    raise InputError(
                        f"user {user!r}: an event at {time} after one at {last}; append events in "
                        "order of time"
                    )
        for user, events in arriving.items():
            kept = self._appended.setdefault(user, ([], []))
            for column, new in zip(kept, events):
                column.extend(new)
                del column[: -self._settings.max_history]
            self._num_appended[user] += len(events[0])

    def score(
        self,
        users: Sequence[str],
        candidates: Tensor,
        request_timestamps: Sequence[int] | None = None,
    ) -> Tensor:
        """Score given items of any domains; candidates see the history and not each other.

        Args:
            users: (B,).
            candidates: (B, C) int64 item ids.
            request_timestamps: (B,) time of the request; default: that of the last event.

        Returns:
            (B, C) float64, the chance of each.

        Raises:
            InputError: shapes that do not fit, an unknown item, or an unknown user where
                ``user_token`` is on.
        """
        if candidates.ndim != 2 or len(candidates) != len(users):
            raise InputError(
                f"candidates has shape {tuple(candidates.shape)}; ({len(users)}, C) is needed, one "
                "row a user"
            )
        if request_timestamps is not None and len(request_timestamps) != len(users):
            raise InputError(
                f"{len(request_timestamps)} request_timestamps for {len(users)} users; one a user "
                "is needed"
            )
        _check_items(self._store.catalog, candidates.flatten().tolist())
        numbers = [self._number_of(user) for user in users]
        scores = candidates.new_empty(candidates.shape, dtype=torch.float64)
        for first in range(0, len(users) if candidates.numel() else 0, _USERS_AT_ONCE):
            part = slice(first, first + _USERS_AT_ONCE)
            times = None if request_timestamps is None else request_timestamps[part]
            scores[part] = self._score(users[part], numbers[part], candidates[part], times)
        return scores

    def release(self, users: Iterable[str]) -> None:
        """Let go of what is kept of users; their events stay, and are computed when asked for."""
        for user in users:
            self._taken(user)

    def save(self, path: Path) -> None:
        """Write appended events and all that is kept to one file, which replaces an earlier one."""
        written = {
            "fingerprint": self._fingerprint(),
            "appended": self._appended,
            "num_appended": dict(self._num_appended),
            "memories": {user: asdict(memory) for user, memory in self._memories.items()},
        }
        torch.save(written, partial_file(path))
        partial_file(path).replace(path)

    def load(self, path: Path) -> None:
        """Take what a session of the same model, settings and store has saved, and nothing else.

        Raises:
            InputError: no such file, or one of another model, other settings or another store.
        """
        try:
            found = torch.load(path, weights_only=True)
            is_same = found["fingerprint"] == self._fingerprint()
        except (OSError, RuntimeError, KeyError, TypeError, UnpicklingError, EOFError) as error:
            raise InputError(f"{path}: no states of a session: {error}") from error
        if not is_same:
            raise InputError(
                f"{path}: states of another model, of other settings or of another store; let the "
                "session compute them"
            )
        self._appended = found["appended"]
        self._num_appended = Counter(found["num_appended"])
        memories = {user: UserMemory.of(told) for user, told in found["memories"].items()}
        self._memories = OrderedDict(memories)
        self._num_bytes = sum(memory.num_bytes for memory in memories.values())

    def _fingerprint(self) -> str:
        digest = blake2b(repr((self._settings, self._store.manifest["hashes"])).encode())
        for name, value in sorted(self._model.state_dict().items()):
            digest.update(name.encode() + value.detach().contiguous().numpy().tobytes())
        return digest.hexdigest()

    @torch.no_grad()
    def _score(
        self,
        users: Sequence[str],
        numbers: Sequence[int],
        candidates: Tensor,
        times: Sequence[int] | None,
    ) -> Tensor:
        histories = [self._history(user, number) for user, number in zip(users, numbers)]
        if times is None:
            times = [int(known[-1]) if len(known) else 0 for _, known in histories]
        memories = [self._taken(user) for user in users]
        found = []
        with self._model.remembering(memories):
            for part in candidates.split(self._settings.chunk_length, dim=1):
                request = self._request(numbers, histories, part, times)
                sample = request_features(request, self._settings)
                given = sample.uih_features_kjt, sample.candidates_features_kjt
                found.append(self._model(*given)[3][0].double().view(part.shape))
        for user, memory in zip(users, memories):
            self._taken(user)  # of a user who was asked for twice
            self._memories[user] = memory
            self._num_bytes += memory.num_bytes
        while self._max_bytes is not None and self._num_bytes > self._max_bytes:
            self._taken(next(iter(self._memories)))
        return torch.cat(found, dim=1)

    def _taken(self, user: str) -> UserMemory:
        """Take what is kept of a user out of the session, so that a failure leaves nothing half."""
        memory = self._memories.pop(user, None) or UserMemory()
        self._num_bytes -= memory.num_bytes
        return memory

    def _request(
        self,
        numbers: Sequence[int],
        histories: Sequence[tuple[Tensor, Tensor]],
        candidates: Tensor,
        times: Sequence[int],
    ) -> RequestBatch:
        domains = self._store.catalog.item_domains
        items, asked = torch.cat([items for items, _ in histories]), candidates.flatten()
        width = candidates.shape[1]
        return RequestBatch(
            users=torch.tensor(numbers),
            history_lengths=torch.tensor([len(items) for items, _ in histories]),
            items=items,
            times=torch.cat([times for _, times in histories]),
            domains=domains[items],
            candidate_lengths=torch.full((len(numbers),), width),
            candidates=asked,
            candidate_domains=domains[asked],
            request_times=torch.tensor(times, dtype=torch.int64).repeat_interleave(width),
            labels=torch.zeros_like(asked),
            actions=torch.ones_like(items),
        )

    def _history(self, user: str, number: int) -> tuple[Tensor, Tensor]:
        """Return items and times of the events that a request of a user shows."""
        logged: Sequence[np.ndarray] = [np.empty(0, np.int64)] * 2
        if self._store.find_user(user) is not None:
            logged = self._store.history(number)
        shown = self._num_shown(len(logged[0]) + self._num_appended[user])
        items, times = (
            np.concatenate([each, np.array(new, np.int64)])
            for each, new in zip(logged, self._appended.get(user, ([], [])))
        )
        first = len(items) - shown
        return torch.from_numpy(items[first:]), torch.from_numpy(times[first:])

    def _num_shown(self, known: int) -> int:
        """Count the events of the window, of all that are known."""
        window = self._settings.max_history
        if known <= window or self._settings.positions == "recency":
            return min(known, window)
        step = max(1, window // 4)
        return known - step * -(-(known - window) // step)

    def _number_of(self, user: str) -> int:
        number = self._store.find_user(user)
        if number is None and self._settings.user_token:
            raise InputError(
                f"unknown user {user!r}: the model has an embedding of each user that it was "
                "trained on; train with xd_dlrm.user_token = False to score new ones"
            )
        return number or 0


def _check_norm_length(settings: DlrmSettings) -> None:
    if settings.chunk_length < 1:
        raise InputError(
            f"xd_dlrm.norm_length = {settings.norm_length}: a session needs one above max_history "
            f"= {settings.max_history}, by as many as are scored at once; without it the number of "
            "candidates would move their scores"
        )


def _named_store(gin_file: Path) -> InteractionStore:
    dataset = bound_value("make_model.dataset")
    folder = store_folder(str(dataset))
    if folder is None:
        raise InputError(
            f"{gin_file}: make_model.dataset = {dataset!r}; a session needs the prepared "
            'store that the model was trained on: "xd:<folder>"'
        )
    return InteractionStore.open(folder)


def new_model(store: InteractionStore, settings: DlrmSettings) -> IncrementalDlrmHSTU:
    """Build the model that gin's bindings describe, its tables without values."""
    config = configure(get_hstu_configs("debug"), settings)
    extension = cross_domain(settings, store.num_domains, config)
    model = IncrementalDlrmHSTU(
        hstu_configs=config,
        embedding_tables=tables(store, settings, config.hstu_embedding_table_dim),
        is_inference=False,
        bf16_training=False,
        cross_domain=replace(extension, in_buckets=True),
    )
    model.set_hammer_kernel(HammerKernel.PYTORCH)
    model.get_submodule("_embedding_collection").to_empty(device="cpu")
    return model


def _check_items(catalog: DomainCatalog, item_ids: Sequence[int]) -> None:
    for item in item_ids:
        if not 1 <= item <= catalog.num_items:
            raise InputError(f"unknown item {item}; the catalogue has items 1..{catalog.num_items}")
