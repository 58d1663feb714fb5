"""A new model or shadow for all workers of a service or for none: one process leads them.

The leader has each worker load the run, and once all have, lets each take it. Between the first
and the last that does, which is a moment, old and new model answer side by side, every answer by
one of them alone: a state in a shared store that the other model made is not read. A worker that is
started meanwhile starts with the run that the leader names, and with its shadow.
"""

import asyncio
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

from hstu_xd.errors import HstuXdError
from hstu_xd.serving.http.live_model import Changes
from hstu_xd.serving.http.service import Loaded, Service
from hstu_xd.serving.http.settings import LogSettings
from hstu_xd.serving.http.shadow import Shadow
from hstu_xd.serving.http.swaps import Role, SwapRefused, sibling

_log = logging.getLogger(__name__)

# Seconds that all workers together may take to load a model.
_LOADING = 600.0


@dataclass(frozen=True)
class _Ask:
    """From a worker: a client wants another model or shadow.

    Attributes:
        run: folder; None: that of the command anew, or no shadow.
        role: of the run.
    """

    run: Path | None
    role: Role = "answer"


@dataclass(frozen=True)
class _Load:
    """To a worker: load a run, and say how it went; None: there is to be no shadow."""

    swap: int
    run: Path | None
    role: Role = "answer"


@dataclass(frozen=True)
class _Done:
    """From a worker: what was told last is done, or why it is not. To one: how the swap ended."""

    swap: int
    changes: Changes | None = None
    error: HstuXdError | None = None


@dataclass(frozen=True)
class _Take:
    """To a worker: let the loaded model answer, or forget it."""

    swap: int
    forget: bool = False


@dataclass
class _Swap:
    """A swap that is under way.

    Attributes:
        number: of the swap.
        run: that is to be served; None: there is to be no shadow.
        role: of the run.
        asking: number of the worker that is to be told; None: nobody asked.
        until: when loading has taken too long.
        awaited: workers that have not said yet that they are done.
        changes: what the first one found.
        taking: whether all have loaded it, so that there is no way back.
    """

    number: int
    run: Path | None
    role: Role
    asking: int | None
    until: float
    awaited: set[int]
    changes: Changes | None = None
    taking: bool = False


class SwapLeader:
    """Leads all workers from one model to the next, whatever becomes of any of them.

    Args:
        run: folder that the command names.
        count: of workers, which are known by their numbers.
        tell: sends a message to a worker; nothing happens where it is dead.
        shadow: folder of the run that answers in the shadow; None: there is none.

    Attributes:
        run: that is served, links resolved.
        shadow: that is compared with it, links resolved.
    """

    def __init__(
        self,
        run: Path,
        count: int,
        tell: Callable[[int, object], None],
        shadow: Path | None = None,
    ) -> None:
        self._named, self._workers, self._tell = run, range(count), tell
        self.run = run.resolve()
        self.shadow = None if shadow is None else shadow.resolve()
        self._swap: _Swap | None = None
        self._swaps = 0

    def hear(self, number: int, message: object) -> None:
        """Go on with what a worker says."""
        if isinstance(message, _Ask):
            is_reload = message.role == "answer" and message.run is None
            self.begin(message.run, None if is_reload else number, message.role)
            return
        swap = self._swap
        if not isinstance(message, _Done) or swap is None or message.swap != swap.number:
            return
        if message.error is not None:
            self._give_up(message.error)
            return
        if swap.changes is None:
            swap.changes = message.changes
        elif message.changes is not None and message.changes.model != swap.changes.model:
            self._give_up(SwapRefused("the run has changed while workers loaded it; repeat it"))
            return
        swap.awaited.discard(number)
        self._advance()

    def begin(
        self, run: Path | None = None, asking: int | None = None, role: Role = "answer"
    ) -> None:
        """Have all workers load a run.

        Args:
            run: folder; None: what the command names, as it is now, or no shadow.
            asking: number of the worker that is to be told how it ends; None: the log says it.
            role: of the run.
        """
        if self._swap is not None:
            self._report(asking, _Done(0, error=SwapRefused.under_way()))
            return
        if role == "shadow" and run is not None and self.shadow is not None:
            self._report(asking, _Done(0, error=SwapRefused.has_shadow(self.shadow.name)))
            return
        self._swaps += 1
        until = time.monotonic() + _LOADING
        if role == "answer":
            run = run or self._named
        # A link that is turned over meanwhile is one run for all.
        run = None if run is None else run.resolve()
        self._swap = _Swap(self._swaps, run, role, asking, until, {*self._workers})
        self._tell_all(_Load(self._swaps, run, role))

    def _advance(self) -> None:
        """Have the model taken once all have loaded it, and report once all have taken it."""
        swap = self._swap
        if swap is None or swap.awaited:
            return
        if not swap.taking:
            swap.taking, swap.awaited = True, {*self._workers}
            # Who is started from now on starts with it.
            if swap.role == "shadow":
                self.shadow = swap.run
            else:
                assert swap.run is not None
                self.run = swap.run
                # As in each worker, see Service.take.
                self.shadow = None if self.shadow == swap.run else self.shadow
            self._tell_all(_Take(swap.number))
            return
        self._swap = None
        self._report(swap.asking, _Done(swap.number, swap.changes))

    def lose(self, number: int) -> None:
        """Go on without a worker that has died."""
        swap = self._swap
        if swap is None:
            return
        if swap.asking == number:
            swap.asking = None
        if swap.taking:
            swap.awaited.discard(number)
            self._advance()
        else:
            self._give_up(SwapRefused("a worker has ended meanwhile; the model stays, repeat it"))

    def _give_up(self, error: HstuXdError) -> None:
        swap, self._swap = self._swap, None
        assert swap is not None
        self._tell_all(_Take(swap.number, forget=True))
        self._report(swap.asking, _Done(swap.number, error=error))

    def _tell_all(self, message: object) -> None:
        for worker in self._workers:
            self._tell(worker, message)

    def _report(self, asking: int | None, ended: _Done) -> None:
        """Tell the worker that asked; where nobody did, the log says it."""
        if asking is not None:
            self._tell(asking, ended)
        elif ended.error is not None:
            _log.error("%s; the model before goes on", ended.error)

    def look(self) -> None:
        """Give up a swap that takes too long."""
        swap = self._swap
        if swap is not None and not swap.taking and time.monotonic() > swap.until:
            self._give_up(SwapRefused(f"not all workers have loaded it within {_LOADING:.0f} s"))


class WorkerSwaps:
    """:class:`hstu_xd.serving.http.swaps.Swaps` of a worker: the watching process leads.

    Args:
        service: of this worker.
        run: folder that the command names; others are looked for beside it.
        line: to the watching process.
        allow_imports: whether runs may import modules of their own.
        log: what a shadow writes to stderr.
    """

    def __init__(
        self,
        service: Service,
        run: Path,
        line: Connection,
        *,
        allow_imports: bool = False,
        log: LogSettings,
    ) -> None:
        self._service, self._run, self._line = service, run, line
        self._allow_imports, self._log = allow_imports, log
        self._asked: Future[Changes | None] | None = None
        self._loaded: tuple[int, Loaded | Shadow | None] | None = None
        self._sending = threading.Lock()
        threading.Thread(target=self._follow, name="hstu-xd swaps", daemon=True).start()

    async def to(self, name: str) -> Changes:
        """Have all workers load the run of a name, and let it answer from then on."""
        changes = await self._ask(_Ask(sibling(self._run, name)))
        assert changes is not None
        return changes

    async def shadow(self, name: str) -> Changes:
        """Have the run of a name answer in the shadow of every worker."""
        changes = await self._ask(_Ask(sibling(self._run, name), "shadow"))
        assert changes is not None
        return changes

    async def end_shadow(self) -> None:
        """Have all workers go on without a shadow."""
        await self._ask(_Ask(None, "shadow"))

    async def _ask(self, message: _Ask) -> Changes | None:
        if self._asked is not None:
            raise SwapRefused.under_way()
        self._asked = asked = Future()
        asked.set_running_or_notify_cancel()  # It ends as it ends, whoever waits for it.
        self._send(message)
        return await asyncio.wrap_future(asked)

    def reload(self) -> None:
        """Have all workers serve what the folder of the command holds now."""
        self._send(_Ask(None))

    def _send(self, message: object) -> None:
        with self._sending, suppress(OSError):
            self._line.send(message)

    def _follow(self) -> None:
        """Do what the watching process says, until it ends."""
        with suppress(EOFError, OSError):
            while True:
                message = self._line.recv()
                if isinstance(message, _Load):
                    self._send(self._load(message))
                elif isinstance(message, _Take):
                    self._take(message)
                elif isinstance(message, _Done) and self._asked is not None:
                    asked, self._asked = self._asked, None
                    if message.error is None:
                        asked.set_result(message.changes)
                    else:
                        asked.set_exception(message.error)

    def _load(self, message: _Load) -> _Done:
        run, imports = message.run, self._allow_imports
        try:
            if run is None:
                loaded = None
            elif message.role == "shadow":
                loaded = Shadow(self._service, run, allow_imports=imports, log=self._log)
            else:
                loaded = self._service.load(run, allow_imports=imports)
        except HstuXdError as error:
            return _Done(message.swap, error=error)
        self._loaded = message.swap, loaded
        return _Done(message.swap, None if loaded is None else loaded.changes)

    def _take(self, message: _Take) -> None:
        swap, loaded = self._loaded or (0, None)
        self._loaded = None
        if swap == message.swap and not message.forget:
            if isinstance(loaded, Loaded):
                self._service.take(loaded)
            else:
                self._service.follow(loaded)
        elif isinstance(loaded, Shadow):
            loaded.close()
        self._send(_Done(message.swap))
