"""A new model in place of the old one, or in its shadow, while requests go on.

One change is under way at a time, and it is made as a whole or not.
"""

import asyncio
import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Protocol

from hstu_xd.errors import HstuXdError, InputError
from hstu_xd.serving.http.live_model import Changes
from hstu_xd.serving.http.service import Service
from hstu_xd.serving.http.settings import LogSettings
from hstu_xd.serving.http.shadow import Shadow

_log = logging.getLogger(__name__)

_QUIET = LogSettings()


# What a run is to do: answer, or answer in the shadow of the one that does.
Role = Literal["answer", "shadow"]


class SwapRefused(HstuXdError):
    """The service is with another swap, or a worker has ended meanwhile; the old model answers."""

    @classmethod
    def under_way(cls) -> "SwapRefused":
        """Say that there is another one."""
        return cls("another swap is under way; repeat it when that one is done")

    @classmethod
    def has_shadow(cls, name: str) -> "SwapRefused":
        """Say that the place in the shadow is taken by a run of this name."""
        return cls(f"{name} is in the shadow; end it first with DELETE /v1/models/shadow")


class Swaps(Protocol):
    """Puts another run in the place of the one that is served, in every process that serves it."""

    async def to(self, name: str) -> Changes:
        """Load the run of a name, check that it fits, and let it answer from then on.

        Raises:
            SwapRefused: another swap is under way, or it could not be finished.
            InputError: the run does not fit; nothing has changed.
        """
        ...

    async def shadow(self, name: str) -> Changes:
        """Let the run of a name answer in the shadow, once it is loaded and found to fit.

        Returns:
            What it would bring with it if it answered.

        Raises:
            SwapRefused: as of a swap, or another run is in the shadow.
            InputError: the run does not fit; nothing has changed.
        """
        ...

    async def end_shadow(self) -> None:
        """Go on without a shadow, whether or not there was one.

        Raises:
            SwapRefused: a swap is under way.
        """
        ...

    def reload(self) -> None:
        """Begin to serve what the folder of the command holds now; the log says how it ended."""
        ...


class LocalSwaps:
    """:class:`Swaps` of a service that is one process.

    Args:
        service: whose model is replaced.
        run: folder that the command names; others are looked for beside it.
        allow_imports: whether runs may import modules of their own.
        log: what a shadow writes to stderr.
    """

    def __init__(
        self,
        service: Service,
        run: Path,
        *,
        allow_imports: bool = False,
        log: LogSettings = _QUIET,
    ) -> None:
        self._service, self._run, self._allow_imports = service, run, allow_imports
        self._log = log
        self._one = threading.Lock()

    async def to(self, name: str) -> Changes:
        """Load the run of a name, check that it fits, and let it answer from then on."""
        run = sibling(self._run, name)
        return await in_thread(lambda: self._swap(run))

    async def shadow(self, name: str) -> Changes:
        """Let the run of a name answer in the shadow, once it is loaded and found to fit."""
        run = sibling(self._run, name)
        return await in_thread(lambda: self._follow(run))

    async def end_shadow(self) -> None:
        """Go on without a shadow."""
        await in_thread(self._end_shadow)

    def reload(self) -> None:
        """Begin to serve what the folder of the command holds now; the log says how it ended."""
        threading.Thread(target=self._reload, name="hstu-xd reload", daemon=True).start()

    def _reload(self) -> None:
        try:
            self._swap(self._run)
        except HstuXdError as error:
            _log.error("%s; the model before goes on", error)

    def _swap(self, run: Path) -> Changes:
        with self._alone():
            loaded = self._service.load(run, allow_imports=self._allow_imports)
            self._service.take(loaded)
            return loaded.changes

    def _follow(self, run: Path) -> Changes:
        with self._alone():
            if (before := self._service.shadow) is not None:
                raise SwapRefused.has_shadow(before.run.name)
            options = {"allow_imports": self._allow_imports, "log": self._log}
            shadow = Shadow(self._service, run, **options)
            self._service.follow(shadow)
            return shadow.changes

    def _end_shadow(self) -> None:
        with self._alone():
            self._service.follow(None)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        if not self._one.acquire(blocking=False):
            raise SwapRefused.under_way()
        try:
            yield
        finally:
            self._one.release()


def sibling(run: Path, name: str) -> Path:
    """Return the folder of a run beside another one, by its name.

    Raises:
        InputError: it is not the name of a folder there.
    """
    if name in (".", "..") or Path(name).name != name or "\0" in name:
        raise InputError(
            f"run {name!r} is not the name of a folder; name one beside the run that serve was "
            "started with"
        )
    return run.absolute().parent / name


async def in_thread(call: Callable[[], Any]) -> Any:
    """Return the result of a long call; a process that ends does not wait for it."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[Any] = loop.create_future()

    def finish(result: Any, error: BaseException | None) -> None:
        if done.done():
            return
        if error is None:
            done.set_result(result)
        else:
            done.set_exception(error)

    def work() -> None:
        result, error = None, None
        try:
            result = call()
        except BaseException as raised:
            error = raised
        # Nobody waits where the loop is closed.
        if not loop.is_closed():
            loop.call_soon_threadsafe(finish, result, error)

    threading.Thread(target=work, name="hstu-xd swap", daemon=True).start()
    return await done
