"""The client for code without an event loop: an `AsyncClient` on a background thread, shared by all callers."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import Future
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Literal, Self, TypeVar, Unpack, overload

from weftline_client.aio import NEVER_CONNECTED, AsyncClient, Callback, Settings, Stream, StreamState
from weftline_client.credentials import load_config
from weftline_client.errors import NotConnectedError

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
    from pathlib import Path
    from types import TracebackType

    from weftline_client.protocol import ChatParams, EmbedParams, EmbedResult, GenerateParams, Result, Token

T = TypeVar("T")

STOP_TIMEOUT_S = 5.0


class LoopThread:
    """An event loop on a thread of its own. All methods may be called from any thread but that one."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.loop: asyncio.AbstractEventLoop | None = None
        self.thread: threading.Thread | None = None

    def start(self) -> None:
        """Start the loop if it is not running."""
        with self._lock:
            if self.thread is not None:
                return
            running: Future[asyncio.AbstractEventLoop] = Future()
            # A daemon, so that a client that was never closed does not keep the interpreter alive.
            self.thread = threading.Thread(
                target=lambda: asyncio.run(self._main(running)), name="weftline-client", daemon=True
            )
            self.thread.start()
            self.loop = running.result()

    async def _main(self, running: Future[asyncio.AbstractEventLoop]) -> None:
        self._stopped = asyncio.Event()
        running.set_result(asyncio.get_running_loop())
        await self._stopped.wait()

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine on the loop and wait for it; an interrupted wait (Ctrl-C) cancels it."""
        loop = self.loop
        if loop is None or self.thread is threading.current_thread():
            coroutine.close()
            if loop is None:
                raise NotConnectedError(NEVER_CONNECTED)
            raise RuntimeError(
                "the synchronous client cannot be called from its own callbacks: it would wait for itself"
            )
        task: asyncio.Task[Any] | None = None

        async def call() -> T:
            nonlocal task
            task = asyncio.current_task()
            return await coroutine

        try:
            return asyncio.run_coroutine_threadsafe(call(), loop).result()
        finally:
            # By the task, not the future: an interrupt may come before the future is in our hands.
            if task is not None and not task.done():
                self.call_soon(task.cancel)

    def call_soon(self, function: Callable[[], object]) -> None:
        """Run a function on the loop without waiting; nothing if the loop is not running."""
        if (loop := self.loop) is not None:
            with suppress(RuntimeError):  # closed in this moment
                loop.call_soon_threadsafe(function)

    def stop(self) -> None:
        """Stop the loop and wait for its thread; what still runs on it is cancelled."""
        with self._lock:
            if self.thread is not None and self.loop is not None:
                self.loop.call_soon_threadsafe(self._stopped.set)
                self.thread.join(STOP_TIMEOUT_S)
                self.loop = self.thread = None


class SyncStream(StreamState):
    """A generation whose tokens are read as they come: `for token in stream`, once.

    It is sent when it is first read. Leaving the loop early, or `close()`, stops the generation.
    """

    def __init__(self, thread: LoopThread, stream: Stream) -> None:
        super().__init__(stream._request)
        self._thread = thread
        self._stream = stream

    def stop(self) -> None:
        """Ask the server to end the generation; the stream then ends with done_reason "cancelled"."""
        self._thread.run(self._stream.stop())

    def close(self) -> None:
        """Leave the stream: the generation is stopped and nothing more arrives."""
        # Without waiting: a finalizer may run this, on any thread.
        self._thread.call_soon(self._stream._leave)

    def __iter__(self) -> Iterator[Token]:
        self._iterate_once()
        return self._tokens()

    def _tokens(self) -> Iterator[Token]:
        try:
            # All that has come at once: crossing threads costs more than a token.
            while batch := self._thread.run(self._stream._batch()):
                yield from batch
        finally:
            self.close()

    def __enter__(self) -> Self:
        self._thread.run(self._stream.start())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class Client:
    """A connection to weftline for synchronous code. Any number of threads may share it.

    Arguments, methods and errors are those of `AsyncClient`; callbacks run on the background thread.
    """

    def __init__(self, server_url: str | Sequence[str] = "ws://localhost:3000", **settings: Unpack[Settings]) -> None:
        self._client = AsyncClient(server_url, **settings)
        self._thread = LoopThread()

    @classmethod
    def from_config(cls, path: str | Path, **settings: Any) -> Self:
        """A client as a NAME_config.json describes it; see `AsyncClient.from_config`."""
        return cls(**{**load_config(path), **settings})

    @property
    def connected(self) -> bool:
        """Whether there is an authenticated line at the moment."""
        return self._client.connected

    def connect(self) -> None:
        """Open the line and authenticate; see `AsyncClient.connect`."""
        self._thread.start()
        try:
            self._thread.run(self._client.connect())
        except BaseException:
            self._thread.stop()
            raise

    def close(self) -> None:
        """Close the line and end the background thread."""
        if self._thread.loop is not None:
            try:
                self._thread.run(self._client.close())
            finally:
                self._thread.stop()

    def __enter__(self) -> Self:
        self.connect()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    @overload
    def generate(
        self,
        prompt: str,
        model: str = ...,
        *,
        stream: Literal[False] = ...,
        **params: Unpack[GenerateParams],
    ) -> Result: ...
    @overload
    def generate(
        self, prompt: str, model: str = ..., *, stream: Literal[True], **params: Unpack[GenerateParams]
    ) -> SyncStream: ...
    @overload
    def generate(
        self, prompt: str, model: str = ..., *, stream: bool, **params: Unpack[GenerateParams]
    ) -> Result | SyncStream: ...
    def generate(
        self, prompt: str, model: str = "llama2", *, stream: bool = False, **params: Unpack[GenerateParams]
    ) -> Result | SyncStream:
        """Complete a prompt: the Result, or with `stream=True` its tokens to iterate over."""
        if stream:
            return SyncStream(self._thread, self._client.generate(prompt, model, stream=True, **params))
        result: Result = self._thread.run(self._client.generate(prompt, model, stream=False, **params))
        return result

    @overload
    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        model: str = ...,
        *,
        stream: Literal[False] = ...,
        **params: Unpack[ChatParams],
    ) -> Result: ...
    @overload
    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        model: str = ...,
        *,
        stream: Literal[True],
        **params: Unpack[ChatParams],
    ) -> SyncStream: ...
    @overload
    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        model: str = ...,
        *,
        stream: bool,
        **params: Unpack[ChatParams],
    ) -> Result | SyncStream: ...
    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        model: str = "llama2",
        *,
        stream: bool = False,
        **params: Unpack[ChatParams],
    ) -> Result | SyncStream:
        """Continue a conversation; otherwise as `generate`."""
        if stream:
            return SyncStream(self._thread, self._client.chat(messages, model, stream=True, **params))
        result: Result = self._thread.run(self._client.chat(messages, model, stream=False, **params))
        return result

    def embed(self, input: str | Sequence[str], model: str = "llama2", **params: Unpack[EmbedParams]) -> EmbedResult:
        """The embeddings of one or several texts."""
        return self._thread.run(self._client.embed(input, model, **params))

    def models(self) -> list[str]:
        """The names of the models that can be asked for."""
        return self._thread.run(self._client.models())

    def ping(self) -> float:
        """Wait for the server's pong; the round trip in ms."""
        return self._thread.run(self._client.ping())

    def stop(self, request_id: str) -> None:
        """Ask the server to end a request, from another thread than the one that waits for it."""
        self._thread.run(self._client.stop(request_id))

    def on(self, message_type: str, callback: Callback) -> None:
        """Call `callback(message)` for every message of that type; see `AsyncClient.on`."""
        self._client.on(message_type, callback)

    def off(self, message_type: str, callback: Callback | None = None) -> None:
        """Remove one callback of a message type, or all of them."""
        self._client.off(message_type, callback)
