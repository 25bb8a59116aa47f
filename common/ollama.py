"""What more than one part reads of Ollama's answers."""

from typing import Final

import msgspec

from common.protocol import COUNT_MAX, Stats

UNREADABLE: Final = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)
"""What decoding somebody else's JSON may raise."""


class LastLine(msgspec.Struct):
    """The counts in a stream's last line or a one-document answer (Ollama's api/types.go, `Metrics`); ns."""

    done: bool = False
    done_reason: str = ""
    prompt_eval_count: int = 0
    eval_count: int = 0
    total_duration: int = 0
    load_duration: int = 0
    prompt_eval_duration: int = 0
    eval_duration: int = 0

    def stats(self) -> Stats:
        """As it travels."""
        return Stats(
            done_reason=self.done_reason,
            prompt_tokens=_count(self.prompt_eval_count),
            completion_tokens=_count(self.eval_count),
            total_ns=_count(self.total_duration),
            load_ns=_count(self.load_duration),
            prompt_ns=_count(self.prompt_eval_duration),
            completion_ns=_count(self.eval_duration),
        )


_decoder: Final = msgspec.json.Decoder(LastLine, strict=False)


def last_line(line: bytes) -> LastLine | None:
    """The line if it ends an answer, or a document if it is one; None if it is neither."""
    try:
        return _decoder.decode(line)
    except UNREADABLE:
        return None


def _count(number: int) -> int:
    """JSON's numbers have no bounds, msgpack's have."""
    return min(max(number, 0), COUNT_MAX)
