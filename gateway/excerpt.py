"""The few short fields that a gateway reads of a large body, found by a process of its own: `excerpt.py NAME… < BODY`.

256 MiB of JSON take 0.04 to 3 s to decode, as they are written, and no thread lets others run meanwhile: a gateway that
stood still for so long would count as lost. This file imports nothing of the project, so that it starts in 60 ms.
"""

import mmap
import sys
from collections.abc import Sequence
from typing import Final

import msgspec

FIELD_BYTES_MAX: Final = 64 * 1024


def excerpt(body: bytes | mmap.mmap, names: Sequence[str]) -> bytes:
    """A JSON object of those fields (identifiers) that the object `body` has, as they stand there.

    Raises:
        ValueError: it is no JSON object, or one of the fields has more than FIELD_BYTES_MAX.
        RecursionError: it is nested too deeply.
    """
    fields = msgspec.defstruct("Fields", [(name, msgspec.Raw | msgspec.UnsetType, msgspec.UNSET) for name in names])
    found = msgspec.json.decode(body, type=fields)
    for name in names:
        value = getattr(found, name)
        if value is not msgspec.UNSET and len(value) > FIELD_BYTES_MAX:
            raise ValueError(f"{name!r} has more than {FIELD_BYTES_MAX} bytes")
    return msgspec.json.encode(found)


def main(names: Sequence[str], file: int = 0) -> int:
    """Write the excerpt to standard output, or (1) why there is none."""
    try:
        told, status = excerpt(mmap.mmap(file, 0, access=mmap.ACCESS_READ), names), 0
    except (ValueError, RecursionError) as error:
        told, status = str(error).encode(), 1
    sys.stdout.buffer.write(told)
    return status


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
