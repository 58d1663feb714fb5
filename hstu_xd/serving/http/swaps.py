"""A new model in place of the old one while requests go on: one swap at a time, whole or not."""

import asyncio
import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from hstu_xd.errors import HstuXdError, InputError
from hstu_xd.serving.http.live_model import Changes
from hstu_xd.serving.http.service import Service

_log = logging.getLogger(__name__)


class SwapRefused(HstuXdError):
    """The service is with another swap, or a worker has ended meanwhile; the old model answers."""


class Swaps(Protocol):
    """Puts another run in the place of the one that is served, in every process that serves it."""

    async def to(self, name: str) -> Changes:
        """Load the run of a name, check that it fits, and let it answer from then on.

        Raises:
            SwapRefused: another swap is under way, or it could not be finished.
            InputError: the run does not fit; nothing has changed.
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
    """

    def __init__(self, service: Service, run: Path, *, allow_imports: bool = False) -> None:
        self._service, self._run, self._allow_imports = service, run, allow_imports
        self._one = threading.Lock()

    async def to(self, name: str) -> Changes:
        """Load the run of a name, check that it fits, and let it answer from then on."""
        run = sibling(self._run, name)
        return await in_thread(lambda: self._swap(run))

    def reload(self) -> None:
        """Begin to serve what the folder of the command holds now; the log says how it ended."""
        threading.Thread(target=self._reload, name="hstu-xd reload", daemon=True).start()

    def _reload(self) -> None:
        try:
            self._swap(self._run)
        except HstuXdError as error:
            _log.error("%s; the model before goes on", error)

    def _swap(self, run: Path) -> Changes:
        if not self._one.acquire(blocking=False):
            raise SwapRefused("another swap is under way; repeat it when that one is done")
        try:
            loaded = self._service.load(run, allow_imports=self._allow_imports)
            self._service.take(loaded)
            return loaded.changes
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
