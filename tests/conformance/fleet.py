"""An engine of one's own behind a fabric."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractAsyncContextManager
from pathlib import Path

import httpx

import workers.agent
from common.process import Stop
from tests.fabric import Fabric
from workers.embedded.llama import LlamaBackend
from workers.embedded.server import running
from workers.settings import WorkerSettings

TINY = Path(__file__).parents[1] / "data" / "models" / "wordnet-tiny-1m.Q8_0.gguf"


@contextlib.contextmanager
def joined(fabric: Fabric, engine: AbstractAsyncContextManager[str], model: str) -> Iterator[None]:
    """One worker more, on the fabric's loop, before the engine whose URL `engine` gives; ready when `model` is."""
    stop = Stop()

    async def serve() -> None:
        async with engine as url:
            assert fabric.addresses is not None
            settings = WorkerSettings(
                broker=fabric.addresses.workers,
                ollama=(url,),
                name="joined",
                poll_interval_s=0.2,
                data_dir=fabric.folder,
            )
            await workers.agent.run(settings, stop)

    async def start() -> asyncio.Task[None]:
        return asyncio.create_task(serve())

    async def end() -> None:
        stop.hurry = True
        stop.set()
        await serving

    def ready() -> bool:
        return model in httpx.get(f"{fabric.http_url}/readyz", trust_env=False).json()["models"]

    serving = fabric.call(start)
    try:
        fabric.until(lambda: serving.done() or ready(), f"{model} can be served", timeout_s=20)
        assert not serving.done(), serving.exception()
        yield
    finally:
        fabric.call(end)


@contextlib.asynccontextmanager
async def tiny() -> AsyncIterator[str]:
    """An engine with a real model of the name `tiny`, which answers by a schema if one is given."""
    async with running(await LlamaBackend.open({"tiny": TINY})) as url:
        yield url
