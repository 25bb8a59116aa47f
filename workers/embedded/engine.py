"""What a backend has to offer to be served: models, and runners that complete and embed once loaded."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Mapping, Sequence

    from workers.embedded.library import Library
    from workers.embedded.wire import Message, Options


@dataclass(slots=True, frozen=True, kw_only=True)
class Model:
    """A model as `/api/tags` and `/api/show` tell it. Names that share a digest share one runner."""

    name: str
    """With its tag."""
    digest: str
    size_bytes: int
    modified_at: str
    family: str
    parameter_size: str
    quantization_level: str
    capabilities: Sequence[str] = ("completion",)
    context_length: int
    """What the model was trained for, in tokens."""
    template: str = ""
    info: Mapping[str, Any] = field(default_factory=dict)

    def details(self) -> dict[str, Any]:
        return {
            "parent_model": "",
            "format": "gguf",
            "family": self.family,
            "families": [self.family],
            "parameter_size": self.parameter_size,
            "quantization_level": self.quantization_level,
        }


class Piece(NamedTuple):
    """One line's worth of an answer: usually a token."""

    text: str
    logprobs: list[dict[str, Any]] | None = None


@dataclass(slots=True, frozen=True)
class Final:
    """How an answer ended; durations in nanoseconds."""

    reason: str
    """"stop" or "length"."""
    prompt_tokens: int
    prompt_ns: int
    tokens: int
    eval_ns: int


@dataclass(slots=True, frozen=True)
class Completion:
    prompt: str
    options: Options
    schema: dict[str, Any] | None = None
    logprobs: int | None = None
    truncate: bool = True


class CutShort(Exception):
    """An answer that stops without its last line, on purpose; `clean` ends the body, else the connection closes."""

    def __init__(self, *, clean: bool) -> None:
        super().__init__("the answer was cut short on purpose")
        self.clean = clean


class Runner(Protocol):
    """One loaded model. Its methods raise ApiError; the caller holds a slot while it uses them."""

    context_length: int
    """Tokens a single request may use."""
    size_bytes: int

    @property
    def alive(self) -> bool: ...

    async def render(self, messages: list[Message], *, truncate: bool) -> str:
        """The prompt the model sees for a conversation, the oldest turns left out if it would not fit."""
        ...

    def complete(self, request: Completion) -> AsyncGenerator[list[Piece] | Final, None]:
        """Lists of the pieces that were ready together, then one Final. Closing the iterator stops the work."""
        ...

    async def embed(self, texts: list[str], *, truncate: bool) -> tuple[list[list[float]], int]:
        """One vector for each text, not normalised, and the number of tokens read."""
        ...

    async def tokenize(self, text: str) -> list[int]: ...

    async def detokenize(self, tokens: list[int]) -> str: ...

    async def close(self) -> None: ...


class Backend(Protocol):
    label: str
    """Said wherever the engine names itself."""
    loaded_max: int
    memory_bytes: int
    """What it has for models, by their `size_bytes`; 0: for any number."""
    library: Library | None
    """What adds and removes models, if they are not fixed."""

    @property
    def models(self) -> Mapping[str, Model]:
        """By full name."""
        ...

    def context_length(self, model: Model, num_ctx: int) -> int:
        """Tokens a request of `model` gets that asks for `num_ctx` (0: does not ask)."""
        ...

    async def load(self, model: Model, context_length: int) -> Runner:
        """Load `model` with `context_length` tokens a slot. Cancelling aborts the load."""
        ...

    def slots(self, model: Model) -> int:
        """Requests that `model` serves at a time."""
        ...

    def inject(self, fault: bytes) -> list[Any]:
        """Let something go wrong, as the JSON says; all that is still to go wrong. ApiError when it cannot."""
        ...
