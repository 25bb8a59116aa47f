"""`weftline engine`, also `python -m workers.embedded`: the embedded engine alone."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from common import logs, process
from common.command import LogFormatOption, LogLevelOption, run_command
from common.config import byte_count
from common.errors import ProcessError, UsageError
from workers.embedded.llama import LlamaBackend
from workers.embedded.server import serve
from workers.embedded.simulated import MODEL_BYTES, Settings, SimulatedBackend
from workers.embedded.wire import full_name

if TYPE_CHECKING:
    import asyncio

    from workers.embedded.engine import Backend


def engine(
    listen: Annotated[str, typer.Option(help="Where to listen; port 0 takes a free one.")] = "127.0.0.1:11435",
    model: Annotated[
        list[str] | None, typer.Option(help="A model to serve; SmolLM2-135M unless told.", metavar="NAME=FILE.gguf")
    ] = None,
    slots: Annotated[
        int | None, typer.Option(min=1, max=4096, help="Requests a model serves at a time. [2, simulated 4]")
    ] = None,
    simulated: Annotated[
        bool, typer.Option("--simulated", help="Known words at a set speed instead of a model.")
    ] = False,
    tokens_per_s: Annotated[float, typer.Option(min=0, help="Simulated: of one stream; 0 is full speed.")] = 0.0,
    slowdown: Annotated[
        float, typer.Option(min=0, help="Simulated: by how much each other stream slows all of them.")
    ] = 0.0,
    load_s: Annotated[float, typer.Option(min=0, help="Simulated: how long a model takes to load.")] = 0.0,
    load_rate: Annotated[
        str | None, typer.Option(help="Simulated: what is loaded per second, beside that.", metavar="SIZE")
    ] = None,
    memory: Annotated[
        str | None, typer.Option(help="Simulated: for models; one that does not fit evicts others.", metavar="SIZE")
    ] = None,
    loaded_max: Annotated[int, typer.Option(min=1, help="Simulated: models in memory at once.")] = 3,
    first_token_s: Annotated[float, typer.Option(min=0, help="Simulated: from the request to its first token.")] = 0.0,
    prefill_tokens_per_s: Annotated[
        float, typer.Option(min=0, help="Simulated: words of a prompt read per second; 0: all at once.")
    ] = 0.0,
    cache_prompts: Annotated[
        int, typer.Option(min=0, help="Simulated: prompts whose beginnings a model does not read again.")
    ] = 4,
    sim_model: Annotated[
        list[str] | None,
        typer.Option(help="Simulated: a model, and its size, else 1GB. [simulated, llama2]", metavar="NAME[=SIZE]"),
    ] = None,
    log_level: LogLevelOption = None,
    log_format: LogFormatOption = None,
) -> int:
    """Serve Ollama's API without Ollama: real inference by llama.cpp, or a simulation for tests and benchmarks."""
    if log_format not in (None, "text", "json"):
        raise UsageError(f"--log-format is text or json, not {log_format}")
    try:
        logs.setup(level=log_level or "info", fmt="json" if log_format == "json" else "text")
    except ValueError as error:
        raise UsageError(f"--log-level: {error}") from None

    async def start(stop: asyncio.Event) -> int:
        if simulated:
            models = dict(_sized(given) for given in sim_model or Settings().models)
            settings = Settings(
                tokens_per_s=tokens_per_s,
                slowdown=slowdown,
                first_token_s=first_token_s,
                prefill_tokens_per_s=prefill_tokens_per_s,
                cache_prompts=cache_prompts,
                load_s=load_s,
                load_bytes_per_s=byte_count(load_rate, "--load-rate") if load_rate else 0,
                memory_bytes=byte_count(memory, "--memory") if memory else 0,
                loaded_max=loaded_max,
                slots=slots or Settings().slots,
                models=tuple(models),
                sizes_bytes=models,
            )
            backend: Backend = SimulatedBackend(settings)
        else:
            try:
                backend = await LlamaBackend.open(_files(model or []), slots=slots or 2)
            except (OSError, ValueError) as error:
                raise ProcessError(str(error)) from None
        try:
            await serve(
                listen,
                backend,
                stop,
                on_ready=lambda url: print(f"engine listening on {url} ({backend.label})", file=sys.stderr, flush=True),
            )
        except ValueError as error:
            raise UsageError(f"--listen: {error}") from None
        except OSError as error:
            raise ProcessError(f"cannot listen on {listen}: {error.strerror or error}") from None
        return 0

    return process.run(start)


def _sized(given: str) -> tuple[str, int]:
    """A simulated model's full name and size."""
    name, _, size = given.partition("=")
    try:
        return full_name(name), byte_count(size, f"--sim-model {name}") if size else MODEL_BYTES
    except ValueError as error:
        raise UsageError(f"--sim-model: {error}") from None


def _files(models: list[str]) -> dict[str, Path]:
    files: dict[str, Path] = {}
    for given in models:
        name, found, path = given.partition("=")
        if not found or not path:
            raise UsageError(f"--model wants NAME=FILE.gguf, not {given}")
        try:
            files[full_name(name)] = Path(path)
        except ValueError as error:
            raise UsageError(f"--model {given}: {error}") from None
    return files


def main(argv: list[str] | None = None) -> int:
    """Run the engine to its end and return the exit status."""
    return run_command(engine, argv, name="weftline engine")


if __name__ == "__main__":
    sys.exit(main())
