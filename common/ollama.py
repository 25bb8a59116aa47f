"""What more than one part reads of Ollama's answers: NDJSON, server-sent events (SSE) or one document."""

import contextlib
from collections.abc import Mapping
from typing import Any, Final

import msgspec

from common.protocol import COUNT_MAX, Stats

UNREADABLE: Final = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)
"""What decoding somebody else's JSON may raise."""


SSE: Final = "text/event-stream"
NDJSON: Final = "application/x-ndjson"
LAST_EVENTS: Final = frozenset({"message_stop", "response.completed", "response.incomplete", "response.failed"})
"""The types of the events that end a stream of /v1/messages and /v1/responses; the others end with `[DONE]`."""


SUCCESS: Final = "success"
"""The last status of an operation on models: pull, push, create."""


class Usage(msgspec.Struct):
    """What OpenAI's and Anthropic's documents count."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    input_tokens: int = 0
    output_tokens: int = 0


class _Response(msgspec.Struct):
    """What the last event of /v1/responses wraps."""

    usage: Usage | None = None


class LastLine(msgspec.Struct):
    """The counts in a stream's last line or a one-document answer (Ollama's api/types.go, `Metrics`); ns."""

    done: bool = False
    status: str = ""
    type: str = ""
    usage: Usage | None = None
    done_reason: str = ""
    prompt_eval_count: int = 0
    eval_count: int = 0
    total_duration: int = 0
    load_duration: int = 0
    prompt_eval_duration: int = 0
    eval_duration: int = 0

    def stats(self) -> Stats:
        """As it travels."""
        usage = self.usage or Usage()
        return Stats(
            done_reason=self.done_reason,
            prompt_tokens=_count(self.prompt_eval_count or usage.prompt_tokens or usage.input_tokens),
            completion_tokens=_count(self.eval_count or usage.completion_tokens or usage.output_tokens),
            total_ns=_count(self.total_duration),
            load_ns=_count(self.load_duration),
            prompt_ns=_count(self.prompt_eval_duration),
            completion_ns=_count(self.eval_duration),
        )


class _Wrapped(msgspec.Struct):
    response: _Response


_wrapped: Final = msgspec.json.Decoder(_Wrapped)
_decoder: Final = msgspec.json.Decoder(LastLine, strict=False)


def document(data: bytes) -> LastLine | None:
    """A document, which may have lines; None if it cannot be read."""
    try:
        return _decoder.decode(data)
    except UNREADABLE:
        return None


def last_line(data: bytes) -> LastLine | None:
    """The newest line of a piece of a streamed answer; None if it cannot be read.

    Its `done` says whether the answer is complete with it, in all three forms a stream may have.
    """
    line = data.rstrip(b"\r\n")
    line = line[line.rfind(b"\n") + 1 :]
    event = line.startswith(b"data:")
    if event:
        line = line[5:].strip()
        if line == b"[DONE]":
            return LastLine(done=True)
    try:
        last = _decoder.decode(line)
    except UNREADABLE:
        return None
    if event and last.type.startswith("response."):
        with contextlib.suppress(*UNREADABLE):
            last.usage = _wrapped.decode(line).response.usage
    last.done = last.type in LAST_EVENTS if event else last.done or last.status == SUCCESS
    return last


def progress_words(line: Mapping[str, Any]) -> str:
    """A line of progress (api/types.go, `ProgressResponse`) for people."""
    total = line.get("total")
    return f"{line['status']}, {100 * (line.get('completed') or 0) // total} %" if total else str(line["status"])


def _count(number: int) -> int:
    """JSON's numbers have no bounds, msgpack's have."""
    return min(max(number, 0), COUNT_MAX)
