"""A stream whose host died goes on here, from the text its reader already has. Pure.

Rules
1. The engine renders the job's prompt (`_debug_render_only`), then generates raw from that prompt and the delivered
   text. Its lines are dressed as lines of the job's own API, so that the reader sees one stream.
2. What was delivered is never taken back and never sent again.
3. `num_predict` counts for the whole: it is reduced by the tokens that were delivered. A line with text counts as one,
   which is an estimate: an engine may put several into one line. A limit that the model itself sets begins anew.
4. A stop string may begin in the delivered text. While the new text goes on in one it is held back; once it is
   complete the stream ends with "stop", cut where it was.
5. Engines that serve a model by its native template repeat a prefill (a last message of the assistant) in the first
   line of the answer. It stands in the rendered prompt already, so it is not appended again. (An engine that repeats
   nothing but happens to begin with the same words can't be told apart.)
6. The last line counts for the whole stream, by the same estimate; its durations are those of the continuation. It has
   no `context`: that would be the raw prompt's.

Use, with `post(path, body)` for a request to the engine:

    continuation = Continuation.plan(path, body, events)
    rendering = post(continuation.render_path, continuation.render) if continuation.render else b""
    request = continuation.request(rendering)
    if request is None: feed(continuation.ending())
    else: feed(continuation.dress(piece)) for each piece of post(RAW_PATH, request), then feed(continuation.eof())

Once `done` is set the engine's stream is to be closed: the last line has been fed.
"""

from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from typing import Any, Final, TypeVar

import msgspec
from msgspec import UNSET, Raw, UnsetType, json

from common.continuation import objection
from common.ollama import NDJSON, UNREADABLE
from common.protocol import BODY_BYTES_MAX

RAW_PATH: Final = "/api/generate"
LINE_BYTES_MAX: Final = BODY_BYTES_MAX
"""A longer line is handed on as it came: the session, whose bound for an event this is, ends the lease."""
STOP_CHARS_MAX: Final = 4096
"""Of all stop strings together: to find where they straddle the seam takes time with the square of it."""

_RIDE_ALONG: Final = ("model", "keep_alive", "truncate", "shift", "logprobs", "top_logprobs")
"""What means the same to a raw request; everything else went into the rendered prompt. (Ollama reloads a model for
another `shift` or num_ctx, so these must not change on the way.)"""

_T = TypeVar("_T")


class CannotContinue(Exception):
    """The stream can't be continued; the text says why."""


class _Turn(msgspec.Struct):
    """A message of the job."""

    role: str = ""
    content: str = ""


class _Message(msgspec.Struct):
    content: str = ""
    thinking: Any = None
    tool_calls: Any = None


class _Chatted(msgspec.Struct):
    """A line of a chat that was delivered."""

    message: _Message
    model: Raw | UnsetType = UNSET
    created_at: Raw | UnsetType = UNSET
    done: bool = False


class _Generated(msgspec.Struct):
    """The same of a generate."""

    content: str = msgspec.field(name="response")
    model: Raw | UnsetType = UNSET
    created_at: Raw | UnsetType = UNSET
    done: bool = False
    thinking: Any = None
    tool_calls: Any = None


class _Debug(msgspec.Struct):
    rendered_template: str


class _Rendering(msgspec.Struct):
    debug: _Debug = msgspec.field(name="_debug_info")


class _Line(msgspec.Struct):
    """A line of the raw answer."""

    model: Raw | UnsetType = UNSET
    created_at: Raw | UnsetType = UNSET
    response: str | UnsetType = UNSET
    done: bool = False
    logprobs: Raw | UnsetType = UNSET


class _Content(msgspec.Struct):
    role: str
    content: str


class _ChatLine(msgspec.Struct):
    """The same as a line of a chat."""

    model: Raw | UnsetType
    created_at: Raw | UnsetType
    message: _Content
    done: bool
    logprobs: Raw | UnsetType


_fields: Final = json.Decoder(dict[str, Raw])
_chatted: Final = json.Decoder(_Chatted)
_generated: Final = json.Decoder(_Generated)
_line: Final = json.Decoder(_Line)
_rendering: Final = json.Decoder(_Rendering)
_encode: Final = json.Encoder().encode


def _read(raw: Raw | None, kind: Any, default: _T) -> _T:
    """A field's value, or the default if it is missing or something else: the engine that took the job judged it."""
    if raw is None:
        return default
    try:
        value: _T = json.decode(raw, type=kind)
    except UNREADABLE:
        return default
    return value


class Continuation:
    """The continuation of one stream: what is to be asked of the engine, and what the reader gets of its answer."""

    __slots__ = (
        "_chat",
        "_fresh",
        "_fresh_tokens",
        "_held",
        "_job",
        "_newest",
        "_partial",
        "_stops",
        "_tails",
        "_texts",
        "_tokens",
        "done",
        "render",
    )

    content_type: Final = NDJSON

    render: bytes | None
    """What to post to `render_path` first, for `request`; None if there is nothing to render."""
    done: bool
    """A stop string was completed across the seam: close the engine's stream."""

    def __init__(
        self,
        job: Mapping[str, Raw],
        stops: Sequence[str],
        texts: Sequence[str],
        newest: _Chatted | _Generated | None,
        *,
        chat: bool,
    ) -> None:
        """See `plan`. `texts` are those of the delivered lines that have one, `newest` is the last of these lines."""
        self.done = False
        self.render = None
        if chat or not _read(job.get("raw"), bool, False):
            # What keeps the model loaded is said by the request that follows; a 0 would unload it in between.
            asked: dict[str, Any] = {name: value for name, value in job.items() if name != "keep_alive"}
            # An engine that cannot render answers instead: a token of it is enough.
            options: dict[str, Raw] = _read(job.get("options"), dict[str, Raw], {})
            asked["options"] = {**options, "num_predict": 1}
            self.render = _encode({**asked, "stream": False, "_debug_render_only": True})
        self._chat = chat
        self._job = job
        self._stops = stops
        self._texts = texts
        self._newest = newest
        self._tokens = len(texts)  # delivered, without a prefill that was repeated
        self._partial = bytearray()  # a line of the engine that is not complete
        self._tails: list[str] = []  # the rests of the stop strings that may be straddling the seam
        self._fresh, self._fresh_tokens = "", 0  # new text while there are tails, …
        self._held = bytearray()  # … and its lines

    @property
    def render_path(self) -> str:
        """The job's own path."""
        return "/api/chat" if self._chat else "/api/generate"

    @classmethod
    def plan(cls, path: str, body: bytes, events: Iterable[bytes]) -> "Continuation":
        """For a job (POST `body` to `path`) whose reader has got `events`, its lines so far.

        Raises:
            CannotContinue: it is not to be continued, or what was delivered is not plain text.
        """
        if reason := objection(path, body):
            raise CannotContinue(reason)
        chat = path == "/api/chat"
        texts: list[str] = []
        newest: _Chatted | _Generated | None = None
        try:
            job = _fields.decode(body)
            for event in events:
                newest = _chatted.decode(event) if chat else _generated.decode(event)
                if newest.done:
                    raise CannotContinue("the stream is complete")
                said = newest.message if isinstance(newest, _Chatted) else newest
                if said.thinking or said.tool_calls:
                    # They were parsed out of the text, and what they were as text is not known.
                    raise CannotContinue("more than plain text was delivered")
                if said.content:
                    texts.append(said.content)
        except UNREADABLE:
            raise CannotContinue("what was delivered cannot be read") from None
        options: dict[str, Raw] = _read(job.get("options"), dict[str, Raw], {})
        stop: Sequence[str] = _read(options.get("stop"), str | list[str], ())
        stops = [stop] if isinstance(stop, str) else stop
        if sum(map(len, stops)) > STOP_CHARS_MAX:
            raise CannotContinue("the stop strings are too long")
        return cls(job, stops, texts, newest, chat=chat)

    def request(self, rendering: bytes) -> bytes | None:
        """What to post to RAW_PATH, from the engine's 2xx answer to `render`; None: nothing is left to be generated.

        Raises:
            CannotContinue: the engine did not render the prompt.
        """
        job = self._job
        if self.render is None:
            prompt = _read(job.get("prompt"), str, "")
        else:
            try:
                prompt = _rendering.decode(rendering).debug.rendered_template
            except UNREADABLE:
                raise CannotContinue("the engine does not tell how it renders a prompt") from None
        prefill = self._prefill()
        repeated = prefill and prompt.endswith(prefill) and self._texts and self._texts[0].startswith(prefill)
        echo = len(prefill) if repeated else 0
        text = "".join(self._texts)[echo:]
        self._tokens = sum(end > echo for end in accumulate(map(len, self._texts)))
        options: dict[str, Raw] = _read(job.get("options"), dict[str, Raw], {})
        limit = int(_read(options.get("num_predict"), int | float, -1))
        if limit > 0:  # else it is none
            if limit <= self._tokens:
                return None
            options["num_predict"] = Raw(b"%d" % (limit - self._tokens))
        self._tails = [
            stop[count:] for stop in self._stops for count in range(1, len(stop)) if text.endswith(stop[:count])
        ]
        return _encode(
            {
                **{name: job[name] for name in _RIDE_ALONG if name in job},
                "prompt": prompt + text,
                "raw": True,
                "stream": True,
                "think": False,  # else Ollama looks for thoughts in the text of a model that could have some
                "options": options,
            }
        )

    def ending(self) -> bytes:
        """The last line when nothing was left to be generated."""
        assert self._newest is not None  # of nothing delivered something is left
        return self._ended(self._newest.model, self._newest.created_at, "length", 0)

    def dress(self, data: bytes) -> bytes:
        """The reader's lines for a piece of the raw answer; perhaps none."""
        if self.done:
            return b""
        *lines, rest = data.split(b"\n")
        if lines:
            lines[0] = bytes(self._partial) + lines[0]
            self._partial.clear()
        self._partial += rest
        dressed = b"".join([self._dress(line + b"\n") for line in lines])
        if len(self._partial) > LINE_BYTES_MAX:
            dressed += self._release() + self._partial
            self._partial.clear()
        return dressed

    def eof(self) -> bytes:
        """The rest, when the raw answer is complete."""
        rest = bytes(self._partial)
        self._partial.clear()
        return (self._dress(rest) if rest else b"") + self._release()

    def _prefill(self) -> str:
        """The text of a last message of the assistant, or nothing."""
        messages: list[Raw] = _read(self._job.get("messages"), list[Raw], [])
        if not self._chat or not messages:
            return ""
        turn = _read(messages[-1], _Turn, _Turn())
        return turn.content if turn.role.lower() == "assistant" else ""

    def _dress(self, line: bytes) -> bytes:
        if self.done:
            return b""
        try:
            part = _line.decode(line)
            fields = _fields.decode(line) if part.done else {}
        except UNREADABLE:
            part = None
        if part is None or part.response is UNSET:
            return self._release() + line  # an error, or nonsense: the session's to judge
        if part.done:
            dressed = self._last(fields)
        elif self._chat:
            content = _Content("assistant", part.response)
            dressed = _encode(_ChatLine(part.model, part.created_at, content, False, part.logprobs)) + b"\n"
        else:
            dressed = line
        return self._watch(part, part.response, dressed) if self._tails else dressed

    def _watch(self, part: _Line, text: str, dressed: bytes) -> bytes:
        """Hold back what may be the rest of a stop string that began in the delivered text."""
        self._fresh += text
        self._fresh_tokens += text != ""
        if any(self._fresh.startswith(tail) for tail in self._tails):
            self.done = True
            self._held.clear()
            return self._ended(part.model, part.created_at, "stop", self._fresh_tokens)
        self._tails = [tail for tail in self._tails if tail.startswith(self._fresh)]
        self._held += dressed
        # Lines without text decide nothing, and an engine could send them for ever.
        if self._tails and len(self._held) <= LINE_BYTES_MAX:
            return b""
        return self._release()

    def _release(self) -> bytes:
        held = bytes(self._held)
        self._held.clear()
        self._tails.clear()
        return held

    def _ended(self, model: Raw | UnsetType, created_at: Raw | UnsetType, reason: str, tokens: int) -> bytes:
        """A last line of our own making, after `tokens` of the continuation."""
        fields = {"model": model, "created_at": created_at, "response": "", "done": True, "done_reason": reason}
        known = {name: value for name, value in fields.items() if value is not UNSET}
        return self._last({**known, "eval_count": Raw(b"%d" % tokens)})

    def _last(self, fields: Mapping[str, Any]) -> bytes:
        """The raw answer's last line as the whole stream's."""
        last: dict[str, Any] = {}
        for name, value in fields.items():
            if name == "response" and self._chat:
                last["message"] = {"role": "assistant", "content": value}
            elif name != "context":
                last[name] = value
        last["eval_count"] = _read(fields.get("eval_count"), int, 0) + self._tokens
        if "prompt_eval_count" in fields:
            last["prompt_eval_count"] = max(0, _read(fields.get("prompt_eval_count"), int, 0) - self._tokens)
        return _encode(last) + b"\n"
