"""A backend without a model: words that anybody can compute beforehand, at a set speed, with faults on demand.

The text. Token i of the answer to a prompt is a space and a word, chosen by a hash of the prompt, the seed and i. A
prompt that ends in the beginning of its own answer is continued rather than answered anew, as a real model does with
a raw prompt:

    token(P + transcript(P, seed, k), seed, i) == token(P, seed, k + i)

To that end a prompt is first split into its base and the k tokens of the base's own answer that follow it; of several
ways to split, the shortest base counts, which makes the rule hold wherever a stream was cut between tokens. Here a
token is a word, so counts are words too.

The clock. Token i is due at start + first_token_s + reading + i / tokens_per_s. The schedule is absolute: a late token
delays no other, and tokens that are due together leave together. Reading takes a prompt's words / prefill_tokens_per_s,
less those with which one of the runner's last `cache_prompts` prompts, with its answer, began. Where n streams write at
once on the engine, the clock of each goes 1 + slowdown · (n - 1) times slower.

Requests. `num_predict` of 1 or more gives exactly that many tokens (100,000 at most) (done_reason "length");
otherwise the answer ends by itself after `answer_tokens` in total (done_reason "stop"). `stop` strings and `seed` are
honoured (an unset seed is 0), sampling options and `format` are not. The prompt of one user message is the message
itself, see `wire.join_messages`.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import time
import zlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Literal

import msgspec

from workers.embedded.engine import Completion, CutShort, Model, Piece
from workers.embedded.engine import Final as FinalPart
from workers.embedded.library import Library
from workers.embedded.residency import BUSY
from workers.embedded.wire import NS_PER_S, ApiError, Message, full_name, join_messages

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence

_ONSETS: Final = ("b", "d", "f", "g", "k", "l", "m", "n", "p", "r", "s", "t", "v", "z", "br", "st")
_VOWELS: Final = ("a", "e", "i", "o")
_CODAS: Final = ("n", "r", "l", "s")
_SYLLABLES: Final = [onset + vowel for onset in _ONSETS for vowel in _VOWELS]
_TOKENS: Final = [f" {first}{second}{coda}" for first in _SYLLABLES for second in _SYLLABLES[::4] for coda in _CODAS]
_PIECES: Final = [Piece(token) for token in _TOKENS]
_MASK: Final = 2**64 - 1

CONTEXT_TOKENS: Final = 4096
MODEL_BYTES: Final = 1_000_000_000
EMBEDDING_MODEL_BYTES: Final = 50_000_000
ANSWER_TOKENS_MAX: Final = 100_000
_BATCH_MAX: Final = 64
"""Tokens sent at once when behind the schedule, so that streams at full speed take turns."""


# -- the text (pure) --------------------------------------------------------------------------------------------------


def _choice(base: int, seed: int, index: int) -> int:
    """The number of token `index`: splitmix64's finaliser over its inputs, stable across processes and versions."""
    x = (base * 0x9E3779B97F4A7C15 + seed * 0xD1B54A32D192ED03 + index * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return (x ^ (x >> 31)) % len(_TOKENS)


def _split(prompt: str, seed: int) -> tuple[int, int]:
    """The hash of the prompt's base and how many tokens of the base's own answer follow it."""
    whole = zlib.crc32(prompt.encode("utf-8", "surrogatepass"))
    head, *words = prompt.split(" ")
    base = zlib.crc32(head.encode("utf-8", "surrogatepass"))
    for position, word in enumerate(words):
        if _TOKENS[_choice(base, seed, 0)] == f" {word}":
            rest = words[position:]
            if all(_TOKENS[_choice(base, seed, index)] == f" {other}" for index, other in enumerate(rest)):
                return base, len(rest)
        base = zlib.crc32(f" {word}".encode("utf-8", "surrogatepass"), base)
    return whole, 0


def token(prompt: str, seed: int, index: int) -> str:
    """Token `index`, from 0, of the answer to `prompt`."""
    base, done = _split(prompt, seed)
    return _TOKENS[_choice(base, seed, done + index)]


def transcript(prompt: str, seed: int, n: int) -> str:
    """The first `n` tokens of the answer to `prompt`, joined."""
    base, done = _split(prompt, seed)
    return "".join(_TOKENS[_choice(base, seed, done + index)] for index in range(n))


def embedding(text: str, size: int) -> list[float]:
    """A vector that depends on the text alone: the sum of its words' directions, so common words make texts close."""
    vector = [0.0] * size
    for word in text.lower().split() or [""]:
        digest = hashlib.shake_128(word.encode("utf-8", "surrogatepass")).digest(size)
        for index, byte in enumerate(digest):
            vector[index] += byte / 127.5 - 1
    return vector


# -- settings and faults ----------------------------------------------------------------------------------------------


@dataclass(slots=True, frozen=True, kw_only=True)
class Settings:
    """How the simulated host behaves. Times in seconds."""

    tokens_per_s: float = 0.0
    """Of one stream; 0 is as fast as it goes."""
    slowdown: float = 0.0
    """How much slower each other stream makes all of them."""
    first_token_s: float = 0.0
    prefill_tokens_per_s: float = 0.0
    """0: a prompt takes no time to read."""
    cache_prompts: int = 4
    """How many prompts each runner remembers."""
    load_s: float = 0.0
    load_bytes_per_s: float = 0.0
    """Loading takes `load_s`, and this on top; 0: nothing on top."""
    memory_bytes: int = 0
    """For models; 0: for as many as `loaded_max`."""
    slots: int = 4
    loaded_max: int = 3
    answer_tokens: int = 128
    models: Sequence[str] = ("simulated", "llama2")
    sizes_bytes: Mapping[str, int] = field(default_factory=dict)
    """By a model's full name; of others 1 GB."""
    embedding_model: str = "simulated-embed"
    embedding_size: int = 32
    pull_bytes: int = 10_000_000
    pull_bytes_per_s: float = 0.0


class Fault(msgspec.Struct, forbid_unknown_fields=True):
    """Something to go wrong with the next `count` requests (of `model`, if given), after `after` tokens of each.

    truncate: the body ends properly but without its last line. die_mid: the connection is closed. hang: silence until
    the client leaves. error_line: a line with an error. slow_first: the first token is `delay_s` later. http_500,
    http_503: the request is refused.
    """

    kind: Literal["truncate", "http_500", "http_503", "hang", "die_mid", "error_line", "slow_first"]
    after: int = 0
    count: int = 1
    model: str | None = None
    delay_s: float = 5.0


@dataclass(slots=True)
class Faults:
    """The faults that are still to happen, oldest first."""

    pending: list[Fault] = field(default_factory=list)

    def take(self, model: str) -> Fault | None:
        for fault in self.pending:
            if fault.model is None or full_name(fault.model) == model:
                fault.count -= 1
                if fault.count <= 0:
                    self.pending.remove(fault)
                return fault
        return None


FAULTS_MAX: Final = 1000


# -- the backend ------------------------------------------------------------------------------------------------------


class SimulatedBackend:
    """Serves `settings.models`, all with the same words, and one embedding model."""

    label = "simulated"

    def __init__(self, settings: Settings | None = None) -> None:
        self.settings = settings or Settings()
        self.faults = Faults()
        self._pace = Pace(self.settings.slowdown)
        names = [full_name(name) for name in self.settings.models]
        self.models: dict[str, Model] = {
            **{name: self._make(name) for name in names},
            (name := full_name(self.settings.embedding_model)): _model(
                name, "simulated-embed", "embedding", EMBEDDING_MODEL_BYTES
            ),
        }
        self.loaded_max = self.settings.loaded_max
        self.memory_bytes = self.settings.memory_bytes
        self.library: Library | None = Library(self.models, self.settings, self.faults, self._make)

    def _make(self, name: str) -> Model:
        return _model(name, "simulated", "completion", self.settings.sizes_bytes.get(name, MODEL_BYTES))

    def slots(self, model: Model) -> int:
        return 1 if "embedding" in model.capabilities else self.settings.slots

    def context_length(self, model: Model, num_ctx: int) -> int:
        return num_ctx if num_ctx > 0 else CONTEXT_TOKENS

    async def load(self, model: Model, context_length: int) -> SimulatedRunner:
        load_s = self.settings.load_s
        if self.settings.load_bytes_per_s:
            load_s += model.size_bytes / self.settings.load_bytes_per_s
        await asyncio.sleep(load_s)
        return SimulatedRunner(model, self.settings, self.faults, context_length, self._pace)

    def inject(self, fault: bytes) -> list[Fault]:
        """A Fault as JSON. ApiError 400 for what is none, 503 when too many are pending."""
        if len(self.faults.pending) >= FAULTS_MAX:
            raise ApiError(503, "too many faults are pending")
        try:
            parsed = msgspec.json.decode(fault, type=Fault)
            full_name(parsed.model or "any")
        except (msgspec.DecodeError, ValueError) as error:
            raise ApiError(400, str(error)) from None
        self.faults.pending.append(parsed)
        return self.faults.pending


class Pace:
    """The clock that streams write by: of n that write at once, each sees 1 / (1 + slowdown · (n - 1)) of time pass."""

    def __init__(self, slowdown: float) -> None:
        self._slowdown = slowdown
        self._streams = 0
        self._seen_s = 0.0
        self._at_s = time.monotonic()

    @property
    def slowness(self) -> float:
        return 1 + self._slowdown * max(0, self._streams - 1)

    def now_s(self) -> float:
        at_s = time.monotonic()
        self._seen_s += (at_s - self._at_s) / self.slowness
        self._at_s = at_s
        return self._seen_s

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """One more stream for the length of the block."""
        self.now_s()
        self._streams += 1
        try:
            yield
        finally:
            self.now_s()
            self._streams -= 1


class Cache:
    """The last prompts that a runner read, word by word, each with its answer. The least recently used goes first."""

    def __init__(self, prompts_max: int) -> None:
        self._prompts_max = prompts_max
        self._prompts: list[list[str]] = []

    def missing(self, words: Sequence[str]) -> int:
        """How many words of a prompt are to be read; one at least."""
        known = 0
        for other in self._prompts:
            pairs = enumerate(zip(words, other, strict=False))
            known = max(known, next((at for at, (a, b) in pairs if a != b), min(len(words), len(other))))
        return max(1, len(words) - known)

    def keep(self, words: list[str]) -> None:
        """A prompt was read; what it goes on from is not kept beside it."""
        others = [other for other in self._prompts if other != words[: len(other)]]
        self._prompts = [*others, words][-self._prompts_max :] if self._prompts_max else []


class SimulatedRunner:
    """A simulated model, loaded."""

    alive = True

    def __init__(self, model: Model, settings: Settings, faults: Faults, context_length: int, pace: Pace) -> None:
        self.context_length = context_length
        self.size_bytes = model.size_bytes
        self._model = model
        self._settings = settings
        self._faults = faults
        self._pace = pace
        self._cache = Cache(settings.cache_prompts)

    async def render(self, messages: list[Message], *, truncate: bool) -> str:
        return join_messages(messages)

    async def complete(self, request: Completion) -> AsyncGenerator[list[Piece] | FinalPart, None]:
        start_s = time.monotonic()
        words = request.prompt.split()
        first_s, interval_s = self._settings.first_token_s, 0.0
        if self._settings.prefill_tokens_per_s:
            first_s += self._cache.missing(words) / self._settings.prefill_tokens_per_s
        if self._settings.tokens_per_s:
            interval_s = 1 / self._settings.tokens_per_s
        fault = self._faults.take(self._model.name)
        match fault and fault.kind:
            case "http_500":
                raise ApiError(500, "injected fault")
            case "http_503":
                raise ApiError(503, BUSY)
            case "slow_first":
                assert fault
                first_s += fault.delay_s
                fault = None
        pieces, reason = self._answer(request)
        due_s = start_s + first_s
        end = min(fault.after, len(pieces)) if fault else len(pieces)
        if end and (early_s := due_s - time.monotonic()) > 0:
            await asyncio.sleep(early_s)
        pace, sent = self._pace, 0
        with pace.writing():
            begin_s = pace.now_s() - max(0.0, time.monotonic() - due_s)
            while sent < end:
                passed_s = pace.now_s() - begin_s
                if passed_s < sent * interval_s:
                    await asyncio.sleep((sent * interval_s - passed_s) * pace.slowness)
                    passed_s = pace.now_s() - begin_s
                ready = _BATCH_MAX
                if interval_s:
                    # A timer may fire a clock tick early; the token it was set for is due all the same.
                    ready = min(ready, max(1, int(passed_s / interval_s) + 1 - sent))
                batch = pieces[sent : min(sent + ready, end)]
                sent += len(batch)
                yield batch
                await asyncio.sleep(0)
        if fault:
            await _fail(fault)
        if self._settings.prefill_tokens_per_s:
            self._cache.keep([*words, *(piece.text.strip() for piece in pieces)])
        prompt_ns = int(first_s * NS_PER_S)
        eval_ns = int((time.monotonic() - due_s) * NS_PER_S) if pieces else 0
        yield FinalPart(reason, len(words), prompt_ns, len(pieces), max(eval_ns, 0))

    def _answer(self, request: Completion) -> tuple[list[Piece], str]:
        seed = max(request.options.seed, 0)
        base, done = _split(request.prompt, seed)
        if request.options.num_predict > 0:
            count, reason = min(request.options.num_predict, ANSWER_TOKENS_MAX), "length"
        else:
            count, reason = max(self._settings.answer_tokens - done, 0), "stop"
        pieces = [_PIECES[_choice(base, seed, done + index)] for index in range(count)]
        if request.options.stop:
            text = "".join(piece.text for piece in pieces)
            cuts = [at for stop in request.options.stop if (at := text.find(stop)) >= 0]
            if cuts:
                return list(_cut(pieces, min(cuts))), "stop"
        return pieces, reason

    async def embed(self, texts: list[str], *, truncate: bool) -> tuple[list[list[float]], int]:
        size = self._settings.embedding_size
        return [embedding(text, size) for text in texts], sum(len(text.split()) for text in texts)

    async def tokenize(self, text: str) -> list[int]:
        return []  # no context is offered: there is no vocabulary to encode a prompt with

    async def detokenize(self, tokens: list[int]) -> str:
        raise ApiError(400, "the simulated engine has no context to continue from")

    async def close(self) -> None:
        return None


async def _fail(fault: Fault) -> None:
    match fault.kind:
        case "truncate":
            raise CutShort(clean=True)
        case "die_mid":
            raise CutShort(clean=False)
        case "error_line":
            raise ApiError(500, "injected fault")
        case _:
            await asyncio.Event().wait()


def _cut(pieces: list[Piece], length: int) -> Iterator[Piece]:
    """The pieces up to `length` characters in all."""
    for piece in pieces:
        if length <= 0:
            return
        yield Piece(piece.text[:length])
        length -= len(piece.text)


def _model(name: str, family: str, capability: str, size_bytes: int) -> Model:
    return Model(
        name=name,
        digest=hashlib.sha256(f"simulated {name}".encode()).hexdigest(),
        size_bytes=size_bytes,
        modified_at="2026-01-01T00:00:00Z",
        family=family,
        parameter_size="1B" if capability == "completion" else "50M",
        quantization_level="Q8_0",
        capabilities=(capability,),
        context_length=CONTEXT_TOKENS,
        template="{{ .Prompt }}",
        info={"general.architecture": family, f"{family}.context_length": CONTEXT_TOKENS},
    )
