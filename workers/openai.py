"""A stream of /v1/chat/completions or /v1/completions whose host died, continued as what it is within Ollama. Pure.

Ollama's routes of these names translate the request into one of /api/chat or /api/generate, and each line of the answer
into an event (openai/openai.go: FromChatRequest, FromCompleteRequest, ToChunks, ToCompleteChunk; middleware/openai.go).
So the job and the delivered events are translated in the same way, `workers.continuation` continues them, and its lines
are translated back. The events keep the id, the time and the model of those that were delivered. Counts are estimates,
as there.
"""

from collections.abc import Sequence
from typing import Any, Final

import msgspec
from msgspec import Raw, json

from common.continuation import CHAT_COMPLETIONS, objection
from common.ollama import SSE, UNREADABLE
from workers.continuation import CannotContinue, Continuation

DONE: Final = b"data: [DONE]\n\n"
_OPTIONS: Final = ("temperature", "seed", "top_p", "frequency_penalty", "presence_penalty")
_DEFAULTS: Final = {"temperature": 1.0, "top_p": 1.0}
"""What these routes set where the request does not say; Ollama's own defaults are others."""


class _Part(msgspec.Struct):
    text: str = ""


class _Turn(msgspec.Struct):
    role: str
    content: str | list[_Part] | None = ""
    reasoning: str = ""


class _StreamOptions(msgspec.Struct):
    include_usage: bool = False


class _Job(msgspec.Struct):
    model: str
    messages: list[_Turn] = []
    prompt: str = ""
    stop: Any = None
    stream_options: _StreamOptions | None = None


class _Delta(msgspec.Struct):
    content: str = ""
    reasoning: str = ""
    tool_calls: Any = None


class _Choice(msgspec.Struct):
    delta: _Delta = msgspec.field(default_factory=_Delta)
    text: str = ""
    finish_reason: str | None = None


class _Event(msgspec.Struct):
    """A delivered event."""

    id: Raw = Raw(b'""')
    object: Raw = Raw(b'""')
    created: Raw = Raw(b"0")
    model: Raw = Raw(b'""')
    system_fingerprint: Raw = Raw(b'"fp_ollama"')
    choices: list[_Choice] = []


class _Message(msgspec.Struct):
    content: str = ""


class _Line(msgspec.Struct):
    """A line of the continuation."""

    response: str = ""
    message: _Message | None = None
    done: bool = False
    done_reason: str = ""
    prompt_eval_count: int = 0
    eval_count: int = 0


_encode: Final = json.Encoder().encode
_fields: Final = json.Decoder(dict[str, Raw])
_job: Final = json.Decoder(_Job)
_event: Final = json.Decoder(_Event)
_line: Final = json.Decoder(_Line)


class OpenAIContinuation:
    """To be used as `Continuation` is."""

    content_type: Final = SSE

    def __init__(
        self, inner: Continuation | None, newest: _Event, *, chat: bool, usage: bool, open_event: bool
    ) -> None:
        """See `plan`. `inner` is None if nothing but the end is missing; `open_event`: the newest has no blank line."""
        self._inner = inner
        self._newest = newest
        self._chat = chat
        self._usage = usage
        self._before = b"\n" if open_event else b""

    @classmethod
    def plan(cls, path: str, body: bytes, events: Sequence[bytes]) -> "OpenAIContinuation":
        """For a job (POST `body` to `path`) whose reader has got `events`, the lines of its stream so far.

        Raises:
            CannotContinue: it is not to be continued, or what was delivered is not plain text.
        """
        if reason := objection(path, body):
            raise CannotContinue(reason)
        chat = path == CHAT_COMPLETIONS
        newest, finished, lines = _Event(), False, list[bytes]()
        try:
            job = _job.decode(body)
            native = _native(job, _fields.decode(body), chat=chat)
            for line in events:
                data = line.removeprefix(b"data:").strip() if line.startswith(b"data:") else b""
                if not data:
                    continue
                newest = _event.decode(data)
                for choice in newest.choices:
                    if choice.delta.reasoning or choice.delta.tool_calls:
                        raise CannotContinue("more than plain text was delivered")
                    finished = finished or choice.finish_reason is not None
                    lines.append(_native_line(choice.delta.content if chat else choice.text, chat=chat))
        except UNREADABLE:
            raise CannotContinue("the request, or what was delivered of its answer, cannot be read") from None
        inner = None if finished else Continuation.plan("/api/chat" if chat else "/api/generate", native, lines)
        usage = job.stream_options is not None and job.stream_options.include_usage and bool(newest.choices)
        return cls(inner, newest, chat=chat, usage=usage, open_event=bool(events) and events[-1] != b"\n")

    @property
    def render(self) -> bytes | None:
        """As `Continuation.render`."""
        return None if self._inner is None else self._inner.render

    @property
    def render_path(self) -> str:
        """Where `render` is to be posted."""
        return "/api/chat" if self._chat else "/api/generate"

    @property
    def done(self) -> bool:
        """As `Continuation.done`."""
        return self._inner is not None and self._inner.done

    def request(self, rendering: bytes) -> bytes | None:
        """As `Continuation.request`.

        Raises:
            CannotContinue: the engine did not render the prompt.
        """
        return None if self._inner is None else self._inner.request(rendering)

    def ending(self) -> bytes:
        """What is missing when nothing was left to be generated."""
        if self._inner is None:
            return self._take_before() + (self._usage_event(0, 0) if self._usage else b"") + DONE
        return self._events(self._inner.ending())

    def dress(self, data: bytes) -> bytes:
        """The reader's events for a piece of the raw answer."""
        assert self._inner is not None  # else nothing was asked
        return self._events(self._inner.dress(data))

    def eof(self) -> bytes:
        """The rest, when the raw answer is complete."""
        assert self._inner is not None
        return self._events(self._inner.eof())

    def _take_before(self) -> bytes:
        before, self._before = self._before, b""
        return before

    def _events(self, lines: bytes) -> bytes:
        dressed = b"".join(map(self._dress, lines.splitlines()))
        return self._take_before() + dressed if dressed else b""

    def _dress(self, raw: bytes) -> bytes:
        try:
            line = _line.decode(raw)
        except UNREADABLE:
            return b""  # without its last event the stream counts as broken
        text = line.response if line.message is None else line.message.content
        if not line.done:
            return self._chunk(text, None)
        end = self._chunk(text, line.done_reason or "stop")
        return end + (self._usage_event(line.prompt_eval_count, line.eval_count) if self._usage else b"") + DONE

    def _chunk(self, text: str, reason: str | None) -> bytes:
        said = {"delta": {"role": "assistant", "content": text}} if self._chat else {"text": text}
        return self._data([{"index": 0, **said, "finish_reason": reason}])

    def _usage_event(self, prompt_tokens: int, tokens: int) -> bytes:
        usage = {"prompt_tokens": prompt_tokens, "completion_tokens": tokens, "total_tokens": prompt_tokens + tokens}
        return self._data([], usage=usage)

    def _data(self, choices: list[Any], **more: Any) -> bytes:
        newest = self._newest
        head = {"id": newest.id, "object": newest.object, "created": newest.created, "model": newest.model}
        head["system_fingerprint"] = newest.system_fingerprint
        return b"data: %b\n\n" % _encode({**head, "choices": choices, **more})


def _native(job: _Job, fields: dict[str, Raw], *, chat: bool) -> bytes:
    """The job as /api/chat or /api/generate would have been sent it."""
    options: dict[str, Any] = dict(_DEFAULTS)
    options |= {name: fields[name] for name in _OPTIONS if name in fields and bytes(fields[name]) != b"null"}
    if bytes(fields.get("max_tokens", b"null")) != b"null":
        options["num_predict"] = fields["max_tokens"]
    if not chat and _is_zero(options["top_p"]):
        options["top_p"] = _DEFAULTS["top_p"]
    if job.stop is not None:
        options["stop"] = [job.stop] if isinstance(job.stop, str) else job.stop
    if not chat:
        return _encode({"model": job.model, "prompt": job.prompt, "options": options})
    messages: list[dict[str, str]] = []
    for turn in job.messages:
        texts = [part.text for part in turn.content] if isinstance(turn.content, list) else [turn.content or ""]
        messages += [{"role": turn.role, "content": text, "thinking": turn.reasoning} for text in texts]
    return _encode({"model": job.model, "messages": messages, "options": options})


def _is_zero(value: Any) -> bool:
    return isinstance(value, Raw) and not json.decode(value)


def _native_line(text: str, *, chat: bool) -> bytes:
    return _encode({"message": {"content": text}} if chat else {"response": text})
