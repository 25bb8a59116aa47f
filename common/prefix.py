"""The beginnings of a prompt as a chain of hashes, by which a broker finds the host that has read them before.

An engine keeps what it computed for a prompt and reuses it for the next one that begins alike. So of two prompts it
matters how far they agree from the start. A chain holds a hash of everything before each boundary: two chains agree up
to the boundary before the first difference. Boundaries lie 512 bytes apart up to 32 KiB, then 10 % apart, up to
13.9 MiB.

The parts are what the client sent (system, tools, messages …), not the prompt that the engine renders from it: the
template is on the hosts. As the same parts render alike, the order of their beginnings is the same.
"""

from collections.abc import Iterable
from hashlib import blake2b
from itertools import accumulate, repeat
from typing import Final

BLOCK_BYTES: Final = 512
HASH_BYTES: Final = 8
HASHES_MAX: Final = 128


def _next(boundary: int, _: None) -> int:
    step = BLOCK_BYTES if boundary < 64 * BLOCK_BYTES else boundary // 10
    return boundary + step


BOUNDARIES: Final = tuple(accumulate(repeat(None, HASHES_MAX - 1), _next, initial=BLOCK_BYTES))
"""In bytes; `chain(…)[i]` stands for the first BOUNDARIES[i] bytes."""


def chain(parts: Iterable[bytes]) -> tuple[tuple[bytes, ...], int]:
    """The hashes of all beginnings that end at a boundary, the shortest first, and the size of it all in bytes."""
    digest = blake2b(digest_size=HASH_BYTES)
    hashes: list[bytes] = []
    size = 0
    for part in parts:
        view = memoryview(part)
        while len(hashes) < HASHES_MAX and size + len(view) >= (boundary := BOUNDARIES[len(hashes)]):
            digest.update(view[: boundary - size])
            view = view[boundary - size :]
            size = boundary
            hashes.append(digest.digest())
        digest.update(view)
        size += len(view)
    return tuple(hashes), size
