"""The header of a GGUF file: its metadata and what can be told from its tensors' shapes.

The format is little-endian: magic, version, counts, then key-value pairs, then a name, shape, type and offset for
each tensor (ggml's docs/gguf.md).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from pathlib import Path

_SCALARS: Final = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING: Final = 8
_ARRAY: Final = 9
_STRING_BYTES_MAX: Final = 16 << 20
_COUNT_MAX: Final = 1 << 24

FILE_TYPES: Final = {
    0: "F32",
    1: "F16",
    2: "Q4_0",
    3: "Q4_1",
    7: "Q8_0",
    8: "Q5_0",
    9: "Q5_1",
    10: "Q2_K",
    11: "Q3_K_S",
    12: "Q3_K_M",
    13: "Q3_K_L",
    14: "Q4_K_S",
    15: "Q4_K_M",
    16: "Q5_K_S",
    17: "Q5_K_M",
    18: "Q6_K",
    32: "BF16",
}
"""`general.file_type`, as llama.cpp's `llama_ftype` numbers it, in Ollama's words."""


@dataclass(slots=True, frozen=True)
class Header:
    """`info` maps metadata keys to values; arrays, which are the vocabulary mostly, are None as in `/api/show`."""

    info: dict[str, Any]
    parameters: int

    @property
    def architecture(self) -> str:
        return str(self.info.get("general.architecture", "unknown"))

    @property
    def context_length(self) -> int:
        return int(self.info.get(f"{self.architecture}.context_length", 2048))

    @property
    def quantization(self) -> str:
        return FILE_TYPES.get(self.info.get("general.file_type", -1), "unknown")

    @property
    def embedding_only(self) -> bool:
        """By the same sign as Ollama: only models made for embedding say how to pool."""
        return f"{self.architecture}.pooling_type" in self.info


def read_header(path: Path) -> Header:
    """The header of the file at `path`. OSError when it cannot be read, ValueError when it is not GGUF."""
    with path.open("rb") as file:
        try:
            return _Reader(file).header()
        except (struct.error, EOFError, UnicodeDecodeError, KeyError) as error:
            raise ValueError(f"{path} is not a readable GGUF file: {error}") from None


class _Reader:
    def __init__(self, file: IO[bytes]) -> None:
        self._file = file

    def header(self) -> Header:
        if self._file.read(4) != b"GGUF":
            raise EOFError("it does not begin with GGUF")
        version = self._scalar("I")
        if not 2 <= version <= 3:
            raise EOFError(f"version {version} is unknown")
        tensors, pairs = self._count(), self._count()
        info: dict[str, Any] = {}
        for _ in range(pairs):
            key = self._string()
            info[key] = self._value(self._scalar("I"))
        parameters = 0
        for _ in range(tensors):
            self._string()
            size = 1
            for _ in range(self._scalar("I")):
                size *= self._scalar("Q")
            parameters += size
            self._scalar("I"), self._scalar("Q")
        info["general.parameter_count"] = parameters
        return Header(dict(sorted(info.items())), parameters)

    def _scalar(self, code: str) -> Any:
        (value,) = struct.unpack(f"<{code}", self._file.read(struct.calcsize(f"<{code}")))
        return value

    def _count(self) -> int:
        count = int(self._scalar("Q"))
        if count > _COUNT_MAX:
            raise EOFError(f"a count of {count} is not credible")
        return count

    def _string(self) -> str:
        length = int(self._scalar("Q"))
        if length > _STRING_BYTES_MAX:
            raise EOFError(f"a string of {length} bytes is not credible")
        return self._file.read(length).decode("utf-8", "replace")

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            of, count = self._scalar("I"), self._count()
            if of in _SCALARS:
                self._file.seek(count * struct.calcsize(f"<{_SCALARS[of]}"), 1)
            else:
                for _ in range(count):
                    self._value(of)
            return None
        return self._scalar(_SCALARS[kind])
