"""Sessions in an asyncio loop: the loop awaits the hits of a guest, and does other things meanwhile.

>>> import asyncio, vmitap.aio
>>> async def main():
...     async with vmitap.aio.attach("demo") as guest:
...         bp = guest.breakpoint("open_file", where=vmitap.Arg(1) == 0)
...         async for hit in guest.events(bp, timeout=5):
...             return hit.symbol
>>> asyncio.run(main())
'open_file'

A guest that has a file descriptor (`Vm.fileno`: a Xen domain) needs no thread: the loop waits for the descriptor, and handlers are called
in the loop. One without runs in a thread of its own. A handler may be a coroutine, which the loop runs: its vCPU stands still meanwhile,
and other events of the guest wait.

Several sessions can be used in one loop. `guest.vm` is the session itself: its reads, writes and lists are quick and may be called in the
loop. Cancelling a task that waits here stops the guest at its next event, and cancels the handler that is awaited; every event is answered
before.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import functools
import inspect
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from contextvars import ContextVar, copy_context
from typing import TYPE_CHECKING, Protocol, Self, TypeVar

import vmitap
from vmitap.errors import InvalidArgumentError, SessionBusyError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Hashable, Mapping
    from os import PathLike
    from types import TracebackType
    from typing import Literal

    from vmitap import Breakpoint, Budget, Filter, Hit, OnWrite, RunResult, Verdict, View, Vm, WritePolicy
    from vmitap.capture import Capturable


__all__ = ["AsyncEvents", "AsyncVm", "attach"]

_T = TypeVar("_T")
_CALL: ContextVar[tuple[object, ...]] = ContextVar("call", default=())
"""The calls of handlers that a task belongs to: a handler of one guest may run another."""
_LOOK = 0.1
"""Seconds after which a guest with a file descriptor is looked at in any case: one that is gone may say nothing."""


def attach(
    target: str = "demo",
    *,
    memory: int | None = None,
    vcpus: int | None = None,
    cmdline: str = "",
    libunicorn: str | PathLike[str] | None = None,
    on_write: OnWrite | None = None,
    abi: Literal["sysv", "ms"] = "sysv",
    repair: bool = False,
    watchdog: bool = True,
) -> AsyncVm:
    """A session to be opened by `async with`; arguments and errors are those of `vmitap.attach`.

    >>> guest = vmitap.aio.attach("demo", vcpus=2)
    """
    opener = functools.partial(
        vmitap.attach,
        target,
        memory=memory,
        vcpus=vcpus,
        cmdline=cmdline,
        libunicorn=libunicorn,
        on_write=on_write,
        abi=abi,
        repair=repair,
        watchdog=watchdog,
    )
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
        self._handling: asyncio.Future[object] | None = None
        self._call: object = None
        self._is_stopped = False
        self._is_entered = False

    @property
    def vm(self) -> Vm:
        """The session itself, for everything that takes no time. While a handler is awaited, `detach` here takes effect once it has ended.

        Raises:
            InvalidArgumentError: outside of `async with`.
        """
        if self._vm is None:
            raise InvalidArgumentError("session", "it is open inside `async with` only")
        return self._vm

    async def __aenter__(self) -> Self:
        if self._is_entered:
            raise InvalidArgumentError("session", "it was opened before")
        self._is_entered = True
        try:
            self._vm = await self._in_thread(self._opener)
        except BaseException:
            self._leave_thread()
            raise
        if self._vm.fileno() is not None:
            self._leave_thread()
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        await self.detach()

    async def detach(self) -> None:
        """Stops the guest, restores it and ends the session. Twice is fine. A task that is cancelled here waits for it all the same.

        Raises:
            SessionBusyError: in a handler, or a task that it began: it returns `Verdict.detach` instead.
            UndoFailedError, RecordingError: as `Vm.detach`.
        """
        if self._vm is None or self._vm.closed:
            return
        self._check_outside("detach")
        await _through(self._end(self._vm))

    async def _end(self, vm: Vm) -> None:
        await self._stop()
        await self._in_thread(vm.detach)
        self._leave_thread()

    async def run(self, timeout: float | None = None, max_hits: int | None = None) -> RunResult:
        """As `Vm.run`; the loop goes on meanwhile. Cancelling it stops the guest at its next event.

        Raises:
            As `Vm.run`; SessionBusyError too if the guest runs already.
        """
        descriptor = self.vm.fileno()
        if descriptor is None:
            return await self._exclusively(functools.partial(self.vm.run, timeout, max_hits), "run")
        return await self._turn(_Run(self.vm, timeout, max_hits), descriptor, timeout, "run")

    def events(self, *breakpoints: Breakpoint, timeout: float | None = None, queue: int = 10_000) -> AsyncEvents:
        """Hits as they come, for `async for`. The guest goes on while your code works on one.

        It runs until the iteration ends or is closed: who leaves `async for` early closes it (`aclose`, `contextlib.aclosing`) before
        running the guest again; leaving the session closes it too.

        Args:
            breakpoints: whose hits; none given: those of every breakpoint and watch.
            timeout: seconds until the iteration ends; None: until the guest is idle or the iteration is closed.
            queue: how many hits can wait; those that find no room are counted in `AsyncEvents.lost`, as those of `Vm.events`.
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
        abi: Literal["sysv", "ms"] | None = None,
        on_write: OnWrite | WritePolicy | Filter | None = None,
        ask: Callable[[Hit], Awaitable[OnWrite]] | Callable[[Hit], OnWrite] | None = None,
        key: Hashable | None = None,
        tag: object = None,
        deadline: float | None = None,
        budget: Budget | None = None,
        enabled: bool = True,
        once: bool = False,
    ) -> Breakpoint:
        """As `Vm.breakpoint`; the handler may be a coroutine function, or return what can be awaited, and so may `ask`.

        A coroutine runs in the loop, as a task of its own, while the vCPU stands still, and `hit.vm` is valid in it. An ordinary function
        is called in the session's thread, or in the loop if there is no thread.

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
        return self.vm.breakpoint(
            target,
            None if handler is None else self._in_loop(handler),
            root=root,
            view=view,
            where=where,
            capture=capture,
            on_return=on_return,
            abi=abi,
            on_write=on_write,
            ask=None if ask is None else self._in_loop(ask),
            key=key,
            tag=tag,
            deadline=deadline,
            budget=budget,
            enabled=enabled,
            once=once,
        )

    def _in_loop(self, handler: Callable[[Hit], Awaitable[_T]] | Callable[[Hit], _T]) -> Callable[[Hit], _T]:
        """The function that the session calls."""
        loop = asyncio.get_running_loop()

        async def handle(said: Awaitable[_T]) -> _T:
            if self._is_stopped:
                if inspect.iscoroutine(said):
                    said.close()
                return NotImplemented  # type: ignore[no-any-return]
            self._handling = asyncio.current_task()
            call = self._begin_call()
            try:
                return await said
            except asyncio.CancelledError:
                # Its guest is stopped: it says nothing.
                if self._is_stopped:
                    return NotImplemented
                raise
            finally:
                self._end_call(call)

        def call(hit: Hit) -> _T:
            said = handler(hit)
            if said is None or not inspect.isawaitable(said):
                return said
            with suppress(RuntimeError):
                if asyncio.get_running_loop() is loop:
                    # `_turn` is given it.
                    return said  # type: ignore[return-value]
            return asyncio.run_coroutine_threadsafe(handle(said), loop).result()

        return call

    def _begin_call(self) -> object:
        """A handler is awaited from now on, in this context."""
        self._call = object()
        _CALL.set((*_CALL.get(), self._call))
        return self._call

    def _end_call(self, call: object) -> None:
        if self._call is call:
            self._call = self._handling = None

    def _check_outside(self, name: str) -> None:
        """What waits for the guest to stop would wait for itself in a handler."""
        is_inside = self._call is not None and self._call in _CALL.get()
        if is_inside or (self._handling is not None and asyncio.current_task() is self._handling):
            raise SessionBusyError(name)

    def _check_idle(self, name: str) -> None:
        running = self._running
        # One of a loop that was closed does not go on.
        if running is not None and not running.done() and not running.get_loop().is_closed():
            raise SessionBusyError(name)

    async def _turn(self, turns: _Turns, descriptor: int, timeout: float | None, name: str) -> RunResult:
        """Goes on when the guest's descriptor is readable, until the end. While nobody awaits a handler, no event waits for an answer."""
        self._check_idle(name)
        loop, ready = asyncio.get_running_loop(), asyncio.Event()
        deadline = None if timeout is None else loop.time() + timeout
        # Who ends the session waits for it.
        self._running = turning = loop.create_future()
        self._is_stopped = False
        loop.add_reader(descriptor, ready.set)
        try:
            while True:
                ready.clear()
                more, cancelled = turns._go(), None
                while (handler := turns._awaits()) is not None:
                    handling, cancelled = await self._handle(handler, cancelled)
                    more = turns._go(functools.partial(self._say, handling))
                if cancelled is not None:
                    raise cancelled
                if turns.result is not None:
                    return turns.result
                if more:
                    # Others get their turn.
                    await asyncio.sleep(0)
                    continue
                left = _LOOK if deadline is None else min(_LOOK, max(deadline - loop.time(), 0))
                # Not `wait_for`: up to Python 3.11 it loses a cancellation that comes with what it waits for.
                with suppress(TimeoutError):
                    async with asyncio.timeout(left):
                        await ready.wait()
        finally:
            turns._abandon()
            self._is_stopped = False
            # The loop may be closed by now.
            with suppress(RuntimeError):
                loop.remove_reader(descriptor)
                turning.set_result(None)

    async def _handle(
        self, handler: Awaitable[object], cancelled: asyncio.CancelledError | None
    ) -> tuple[asyncio.Future[object], asyncio.CancelledError | None]:
        """Waits for the end of a handler, which is cancelled with the one who waits; and what that one was cancelled with."""
        context = copy_context()
        call = context.run(self._begin_call)
        self._handling = handling = context.run(asyncio.ensure_future, handler)
        if self._is_stopped:
            handling.cancel()
        try:
            while not handling.done():
                try:
                    await asyncio.wait([handling])
                except asyncio.CancelledError as error:
                    cancelled, self._is_stopped = error, True
                    handling.cancel()
        finally:
            self._end_call(call)
        return handling, cancelled

    def _say(self, handling: asyncio.Future[object]) -> object:
        """What a handler returned or raised."""
        try:
            return handling.result()
        except asyncio.CancelledError:
            # Its guest is stopped: it says nothing.
            if self._is_stopped:
                return NotImplemented
            raise concurrent.futures.CancelledError from None

    async def _in_thread(self, function: Callable[[], _T]) -> _T:
        """Runs it in the session's thread, which is there only as long as something needs it."""
        if self._thread is None:
            self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="vmitap")
        return await asyncio.get_running_loop().run_in_executor(self._thread, function)

    def _leave_thread(self) -> None:
        """The thread goes, once what it does is done."""
        if self._thread is not None:
            self._thread.shutdown(wait=False)
            self._thread = None

    async def _exclusively(self, function: Callable[[], _T], name: str) -> _T:
        """Runs the guest in the thread. If the waiting task is cancelled, the guest is stopped first."""
        self._check_idle(name)
        self._is_stopped = False
        running = asyncio.ensure_future(self._in_thread(function))
        self._running = running  # type: ignore[assignment]
        try:
            return await asyncio.shield(running)
        except asyncio.CancelledError:
            await _through(self._stop())
            raise

    async def _stop(self) -> None:
        """Ends what runs in the thread or in the loop, and waits for it."""
        running = self._running
        if running is None or running.done():
            return
        self._is_stopped = True
        try:
            self.vm.stop()
            if self._handling is not None:
                self._handling.cancel()
            with suppress(Exception):
                await _through(running)
            # If it had ended by itself, the next run would end at once. Nobody is to be asked in this one either.
            self._is_stopped = True
            if not self.vm.closed:
                await self._in_thread(functools.partial(self.vm.run, 0))
        finally:
            self._is_stopped = False


class AsyncEvents:
    """The iterator of `AsyncVm.events`. The guest runs from the first hit that is asked for until the iteration is closed or at its end."""

    def __init__(self, guest: AsyncVm, breakpoints: tuple[Breakpoint, ...], timeout: float | None, room: int) -> None:
        self._guest = guest
        self._events = guest.vm.events(*breakpoints, timeout=timeout, queue=room)
        self._timeout = timeout
        self._waiting: deque[Hit] = deque()
        self._arrived = asyncio.Event()
        self._told = False
        self._pump: asyncio.Task[RunResult | None] | None = None

    @property
    def lost(self) -> int:
        """Hits that there was no room for so far."""
        return self._events.lost

    @property
    def result(self) -> RunResult | None:
        """What `run` would have returned; None until the guest has ended it."""
        return self._events.result

    def __aiter__(self) -> AsyncEvents:
        return self

    async def __anext__(self) -> Hit:
        if self._pump is None:
            self._guest._check_idle("events")
            descriptor = self._guest.vm.fileno()
            if descriptor is None:
                pull = functools.partial(self._pull, asyncio.get_running_loop())
                self._pump = asyncio.create_task(self._guest._exclusively(pull, "events"))
            else:
                self._pump = asyncio.create_task(self._guest._turn(self, descriptor, self._timeout, "events"))
            self._pump.add_done_callback(lambda _: self._arrived.set())
        while not self._waiting:
            if self._pump.done():
                # What it raised is raised here, once everything that came before was taken.
                if not self._pump.cancelled():
                    self._pump.result()
                raise StopAsyncIteration
            self._told = False
            self._arrived.clear()
            if not self._waiting:
                self._guest._check_outside("next()")
                await self._arrived.wait()
        hit = self._waiting.popleft()
        self._events._give()
        return hit

    async def aclose(self) -> None:
        """Stops the guest and drops the hits that wait. Twice is fine.

        Raises:
            SessionBusyError: in a handler, or a task that it began.
        """
        self._guest._check_outside("aclose")
        try:
            if self._pump is not None:
                self._pump.cancel()
                await _through(asyncio.wait([self._pump]))
                if not self._pump.cancelled():
                    # Whoever closes does not want to know.
                    self._pump.exception()
        finally:
            self._events.close()
            self._waiting.clear()

    def _go(self, said: Callable[[], object] | None = None) -> bool:
        """In the loop: takes the hits that there are at once."""
        try:
            return self._events._moment(said)
        finally:
            # Those that came before something was raised, too.
            self._take_all()

    def _take_all(self) -> None:
        while (hit := self._events._take()) is not None:
            self._events._keep()
            self._waiting.append(hit)
            self._arrived.set()

    def _awaits(self) -> Awaitable[object] | None:
        """In the loop: the handler that is to be awaited."""
        return self._events._awaits()

    def _abandon(self) -> None:
        self._events._abandon()

    def _pull(self, loop: asyncio.AbstractEventLoop) -> None:
        """In the thread: takes hits as long as there are any."""
        try:
            for hit in self._events:
                self._events._keep()
                self._waiting.append(hit)
                if not self._told:
                    self._told = True
                    loop.call_soon_threadsafe(self._arrived.set)
        finally:
            # Those that came before something was raised, too. Whoever waits is told of the end of this.
            while (more := self._events._take()) is not None:
                self._events._keep()
                self._waiting.append(more)


class _Turns(Protocol):
    """What goes on in moments."""

    @property
    def result(self) -> RunResult | None: ...
    def _go(self, said: Callable[[], object] | None = None) -> bool: ...
    def _awaits(self) -> Awaitable[object] | None: ...
    def _abandon(self) -> None: ...


class _Run:
    """A run in moments."""

    def __init__(self, vm: Vm, timeout: float | None, max_hits: int | None) -> None:
        self._moments = vm._moments(timeout, max_hits)
        self.result: RunResult | None = None

    def _go(self, said: Callable[[], object] | None = None) -> bool:
        self.result, more = self._moments.go(said)
        return more

    def _awaits(self) -> Awaitable[object] | None:
        return self._moments.awaits()

    def _abandon(self) -> None:
        self._moments.abandon()


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
