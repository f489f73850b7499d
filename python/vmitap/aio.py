"""Sessions in an asyncio loop: the guest runs in a thread of its own, and the loop awaits its hits.

>>> import asyncio, vmitap.aio
>>> async def main():
...     async with vmitap.aio.attach("demo") as guest:
...         bp = guest.breakpoint("open_file", where=vmitap.Arg(1) == 0)
...         async for hit in guest.events(bp, timeout=5):
...             return hit.symbol
>>> asyncio.run(main())
'open_file'

Several sessions can be used in one loop, each has its thread. `guest.vm` is the session itself: its reads, writes and lists are quick and
may be called in the loop. Cancelling a task that waits here stops the guest at its next event; every event is answered before.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import TYPE_CHECKING, Self, TypeVar

import vmitap
from vmitap.errors import InvalidArgumentError, SessionBusyError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Hashable, Mapping
    from types import TracebackType
    from typing import Literal

    from vmitap import Breakpoint, Budget, Filter, Hit, OnWrite, RunResult, Verdict, View, Vm
    from vmitap.capture import Capturable


__all__ = ["AsyncEvents", "AsyncVm", "attach"]

_T = TypeVar("_T")


def attach(
    target: str = "demo",
    *,
    memory: int | None = None,
    vcpus: int | None = None,
    cmdline: str = "",
    on_write: OnWrite | None = None,
    abi: Literal["sysv", "ms"] = "sysv",
) -> AsyncVm:
    """A session to be opened by `async with`; arguments and errors are those of `vmitap.attach`.

    >>> guest = vmitap.aio.attach("demo", vcpus=2)
    """
    opener = functools.partial(vmitap.attach, target, memory=memory, vcpus=vcpus, cmdline=cmdline, on_write=on_write, abi=abi)
    return AsyncVm(opener)


class AsyncVm:
    """A session in an asyncio loop; made by `attach`.

    >>> async def main():
    ...     async with vmitap.aio.attach("demo") as guest:
    ...         guest.breakpoint("open_file")
    ...         return (await guest.run(timeout=5, max_hits=3)).hits
    >>> asyncio.run(main())
    3
    """

    def __init__(self, opener: Callable[[], Vm]) -> None:
        self._opener = opener
        self._vm: Vm | None = None
        self._thread: ThreadPoolExecutor | None = None
        self._running: asyncio.Future[object] | None = None

    @property
    def vm(self) -> Vm:
        """The session itself, for everything that takes no time.

        Raises:
            InvalidArgumentError: outside of `async with`.
        """
        if self._vm is None:
            raise InvalidArgumentError("session", "it is open inside `async with` only")
        return self._vm

    async def __aenter__(self) -> Self:
        if self._thread is not None:
            raise InvalidArgumentError("session", "it was opened before")
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="vmitap")
        try:
            self._vm = await self._in_thread(self._opener)
        except BaseException:
            self._thread.shutdown(wait=False)
            raise
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        await self.detach()

    async def detach(self) -> None:
        """Stops the guest, restores it and ends the session. Twice is fine. A task that is cancelled here waits for it all the same.

        Raises:
            UndoFailedError, RecordingError: as `Vm.detach`.
        """
        if self._vm is None or self._thread is None or self._vm.closed:
            return
        await self._stop()
        await _through(self._in_thread(self._vm.detach))
        self._thread.shutdown(wait=False)

    async def run(self, timeout: float | None = None, max_hits: int | None = None) -> RunResult:
        """As `Vm.run`; the loop goes on meanwhile. Cancelling it stops the guest at its next event.

        Raises:
            As `Vm.run`; SessionBusyError too if the guest runs already.
        """
        return await self._exclusively(functools.partial(self.vm.run, timeout, max_hits), "run")

    def events(self, *breakpoints: Breakpoint, timeout: float | None = None, queue: int = 10_000) -> AsyncEvents:
        """Hits as they come, for `async for`. The guest goes on while your code works on one.

        It runs until the iteration ends or is closed: who leaves `async for` early closes it (`aclose`, `contextlib.aclosing`) before
        running the guest again; leaving the session closes it too.

        Args:
            breakpoints: whose hits; none given: those of every breakpoint and watch.
            timeout: seconds until the iteration ends; None: until the guest is idle or the iteration is closed.
            queue: how many hits can wait; those that find no room are counted in `AsyncEvents.lost`.
        """
        if queue < 1:
            raise InvalidArgumentError("queue", "there has to be room for a hit")
        return AsyncEvents(self, breakpoints, timeout, queue)

    def breakpoint(
        self,
        target: str | int,
        handler: Callable[[Hit], Awaitable[Verdict | None]] | Callable[[Hit], Verdict | None] | None = None,
        *,
        root: int | None = None,
        view: View | None = None,
        where: Filter | None = None,
        capture: Mapping[str, Capturable] | None = None,
        on_return: Mapping[str, Capturable] | None = None,
        on_write: OnWrite | None = None,
        key: Hashable | None = None,
        tag: object = None,
        deadline: float | None = None,
        budget: Budget | None = None,
        enabled: bool = True,
    ) -> Breakpoint:
        """As `Vm.breakpoint`; the handler may be a coroutine function.

        A coroutine runs in the loop while the vCPU stands still, and `hit.vm` is valid in it. An ordinary function is called in the
        session's thread.

        >>> async def main():
        ...     seen = []
        ...     async def opened(hit):
        ...         await asyncio.sleep(0)
        ...         seen.append(hit.vm.read_cstr(hit.args[0]))
        ...         return vmitap.Verdict.pause()
        ...     async with vmitap.aio.attach("demo") as guest:
        ...         guest.breakpoint("open_file", opened)
        ...         await guest.run(timeout=5)
        ...     return seen
        >>> asyncio.run(main())
        ['/opt/app/app.conf']
        """
        call: Callable[[Hit], Verdict | None] | None = None
        if handler is not None:
            call = _in_loop(handler)
        return self.vm.breakpoint(
            target,
            call,
            root=root,
            view=view,
            where=where,
            capture=capture,
            on_return=on_return,
            on_write=on_write,
            key=key,
            tag=tag,
            deadline=deadline,
            budget=budget,
            enabled=enabled,
        )

    async def _in_thread(self, function: Callable[[], _T]) -> _T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, function)

    async def _exclusively(self, function: Callable[[], _T], name: str) -> _T:
        """Runs the guest in the thread. If the waiting task is cancelled, the guest is stopped first."""
        if self._running is not None and not self._running.done():
            raise SessionBusyError(name)
        running: asyncio.Future[_T] = asyncio.get_running_loop().run_in_executor(self._thread, function)
        self._running = running  # type: ignore[assignment]
        try:
            return await asyncio.shield(running)
        except asyncio.CancelledError:
            await self._stop()
            raise

    async def _stop(self) -> None:
        """Ends what runs in the thread, and waits for it."""
        running = self._running
        if running is None or running.done():
            return
        self.vm.stop()
        with suppress(Exception):
            await _through(running)
        # If it had ended by itself, the next run would end at once.
        if not self.vm.closed:
            await _through(self._in_thread(functools.partial(self.vm.run, 0)))


class AsyncEvents:
    """The iterator of `AsyncVm.events`. The guest runs from the first hit that is asked for until the iteration is closed or at its end."""

    def __init__(self, guest: AsyncVm, breakpoints: tuple[Breakpoint, ...], timeout: float | None, room: int) -> None:
        self._guest = guest
        self._events = guest.vm.events(*breakpoints, timeout=timeout, queue=room)
        self._room = room
        self._waiting: deque[Hit] = deque()
        self._arrived = asyncio.Event()
        self._told = False
        self._lost = 0
        self._pump: asyncio.Task[None] | None = None

    @property
    def lost(self) -> int:
        """Hits that there was no room for so far."""
        return self._lost + self._events.lost

    @property
    def result(self) -> RunResult | None:
        """What `run` would have returned; None until the guest has ended it."""
        return self._events.result

    def __aiter__(self) -> AsyncEvents:
        return self

    async def __anext__(self) -> Hit:
        if self._pump is None:
            self._pump = asyncio.create_task(self._guest._exclusively(functools.partial(self._pull, asyncio.get_running_loop()), "events"))
            self._pump.add_done_callback(lambda _: self._arrived.set())
        while not self._waiting:
            if self._pump.done():
                # What it raised is raised here, once everything that came before was taken.
                self._pump.result()
                raise StopAsyncIteration
            self._told = False
            self._arrived.clear()
            if not self._waiting:
                await self._arrived.wait()
        return self._waiting.popleft()

    async def aclose(self) -> None:
        """Stops the guest and drops the hits that wait. Twice is fine."""
        if self._pump is not None:
            self._pump.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await self._pump
        self._events.close()
        self._waiting.clear()

    def _pull(self, loop: asyncio.AbstractEventLoop) -> None:
        """In the thread: takes hits as long as there are any."""
        for hit in self._events:
            if len(self._waiting) >= self._room:
                self._lost += 1
                continue
            self._waiting.append(hit)
            if not self._told:
                self._told = True
                loop.call_soon_threadsafe(self._arrived.set)


async def _through(future: Awaitable[_T]) -> _T:
    """Awaits it to its end, also in a task that is cancelled meanwhile; the cancellation comes after."""
    inner = asyncio.ensure_future(future)
    cancelled: asyncio.CancelledError | None = None
    while not inner.done():
        try:
            await asyncio.wait([inner])
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None and not inner.cancelled() and inner.exception() is None:
        raise cancelled
    return inner.result()


def _in_loop(
    handler: Callable[[Hit], Awaitable[Verdict | None]] | Callable[[Hit], Verdict | None],
) -> Callable[[Hit], Verdict | None]:
    """The function that the session's thread calls."""
    if not inspect.iscoroutinefunction(handler):
        return handler  # type: ignore[return-value]
    loop = asyncio.get_running_loop()

    def call(hit: Hit) -> Verdict | None:
        said: Verdict | None = asyncio.run_coroutine_threadsafe(handler(hit), loop).result()
        return said

    return call
