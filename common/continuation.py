"""Which streams may be continued on another host after theirs died. Pure; `workers.continuation` does it.

A stream is continued by generating raw from its rendered prompt and the text its reader has. So its answer must be
plain text that follows from those two alone: what an engine keeps beside them, a parser's or a grammar's state, died
with it. Gateways ask before they have a request continued, workers before they try.
"""

from typing import Any, Final

import msgspec

from common.ollama import UNREADABLE


class _Message(msgspec.Struct):
    images: Any = None


class _Job(msgspec.Struct):
    """What of a request's body decides; everything else may be anything."""

    stream: Any = True
    tools: Any = None
    format: Any = None
    think: Any = None
    suffix: Any = None
    context: Any = None
    images: Any = None
    messages: tuple[_Message, ...] | None = None


class _Part(msgspec.Struct):
    type: str = ""


class _Turn(msgspec.Struct):
    content: str | list[_Part] | None = None
    role: str = ""
    tool_calls: Any = None


class _Format(msgspec.Struct):
    type: str = ""


class _OpenAIJob(msgspec.Struct):
    """The same of a request to one of OpenAI's routes."""

    stream: Any = False
    tools: Any = None
    response_format: _Format | None = None
    reasoning: Any = None
    reasoning_effort: Any = None
    logprobs: Any = None
    suffix: Any = None
    prompt: str = ""
    messages: list[_Turn] = []


CHAT_COMPLETIONS: Final = "/v1/chat/completions"
COMPLETIONS: Final = "/v1/completions"

_decoder: Final = msgspec.json.Decoder(_Job)
_openai_decoder: Final = msgspec.json.Decoder(_OpenAIJob)


def objection(path: str, body: bytes) -> str:
    """Why a POST of `body` to `path` can never be continued, or nothing. What was answered so far decides as well."""
    if path in (CHAT_COMPLETIONS, COMPLETIONS):
        return _openai_objection(body)
    if path not in ("/api/generate", "/api/chat"):
        # Embeddings come whole; the events of /v1/responses and /v1/messages depend on all those before.
        return f"answers of {path} cannot be continued"
    try:
        job = _decoder.decode(body)
    except UNREADABLE:
        return "the request is no JSON object of the expected shape"
    if job.stream is False:
        # One document at the end: as long as it is not there nobody has anything, and it is made anew.
        return "the answer is not streamed"
    if job.tools:
        # A raw answer passes the tool parser by: calls would arrive as text.
        return "a request with tools cannot be continued"
    if job.format not in (None, ""):
        # A grammar begins with the answer: in a continuation it would demand a second document after half of one.
        return "a request with `format` cannot be continued"
    if job.think:
        # A raw answer passes the thinking parser by: thoughts would arrive as text.
        return "a request with `think` cannot be continued"
    if job.images or any(message.images for message in job.messages or ()):
        # A rendered prompt only marks the places of its images, in a way of each version's own.
        return "a request with images cannot be continued"
    if job.suffix:
        # The text fills a gap; where the prompt's parts stand, and so whether text may be appended, the model decides.
        return "a request with `suffix` cannot be continued"
    if job.context:
        # Who sends a context expects one back for the next turn: a continued answer has none.
        return "a request with `context` cannot be continued"
    return ""


def _openai_objection(body: bytes) -> str:
    try:
        job = _openai_decoder.decode(body)
    except UNREADABLE:
        return "the request is no JSON object of the expected shape"
    if not job.stream:
        return "the answer is not streamed"
    if job.tools or any(turn.tool_calls or turn.role.lower() == "tool" for turn in job.messages):
        return "a request with tools cannot be continued"
    if job.response_format is not None and job.response_format.type not in ("", "text"):
        return "a request with `response_format` cannot be continued"
    if job.reasoning or job.reasoning_effort not in (None, "", "none"):
        return "a request with reasoning cannot be continued"
    if job.logprobs:
        return "a request with `logprobs` cannot be continued"
    if job.suffix:
        return "a request with `suffix` cannot be continued"
    if any(part.type != "text" for turn in job.messages if isinstance(turn.content, list) for part in turn.content):
        return "a request with images cannot be continued"
    return ""
