"""Bodies that are too large for a message: each in a file without a name, until its workers have fetched it.

No more than `bytes_max` of them together, and never the last DISK_RESERVE_BYTES of the disk. Files are written and read
by other threads, so that a slow disk holds up nobody; one step at a time for each, so that closing one is safe.
"""

import asyncio
import hashlib
import mmap
import os
import shutil
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from common.errors import Code, FabricError
from common.protocol import PART_BYTES_MAX
from gateway import excerpt

SPOOL_AT: Final = PART_BYTES_MAX
"""A larger body is spooled."""
DISK_RESERVE_BYTES: Final = 2**30
"""What is left free on the disk."""


class Spools:
    """The files of a gateway, in `folder`."""

    def __init__(self, folder: Path, bytes_max: int) -> None:
        self.folder = folder
        self.bytes_left = bytes_max

    def check(self, size: int) -> None:
        """Whether there is room for so much.

        Raises:
            FabricError: QUEUE_FULL, there is none, here or on the disk, or the disk fails.
        """
        if size > self.bytes_left:
            raise FabricError(Code.QUEUE_FULL, "this gateway holds all the large requests it can; try again later")
        try:
            free = shutil.disk_usage(self.folder).free
        except OSError as error:
            raise _unkept(error) from None
        if size + DISK_RESERVE_BYTES > free:
            raise FabricError(Code.QUEUE_FULL, "this gateway's disk is full; try again later")


class Spool:
    """One body. Write it, then read it; `close` it in any case.

    Raises:
        FabricError: QUEUE_FULL, there can be no file.
    """

    def __init__(self, spools: Spools, *, hashed: bool = False) -> None:
        self.size = 0
        self._spools = spools
        self._sha256 = hashlib.sha256() if hashed else None
        try:
            self._file = tempfile.TemporaryFile(buffering=0, dir=spools.folder)  # noqa: SIM115 - `close` does
        except OSError as error:
            raise _unkept(error) from None
        self._lock = threading.Lock()
        self._closed = False

    @property
    def digest(self) -> str:
        """Of all that was written, as Ollama names blobs; only if it is `hashed`."""
        assert self._sha256 is not None
        return f"sha256:{self._sha256.hexdigest()}"

    async def write(self, data: bytes | memoryview) -> None:
        """Append.

        Raises:
            FabricError: QUEUE_FULL, there is no room.
        """
        size = len(data)
        self._spools.check(size)
        self._spools.bytes_left -= size
        self.size += size
        try:
            await asyncio.to_thread(self._write, data)
        except OSError as error:
            raise _unkept(error) from None

    async def read(self, offset: int, size: int) -> bytes:
        """Up to so many bytes; none of what is not there, or once it is closed.

        Raises:
            OSError: the disk failed.
        """
        return await asyncio.to_thread(self._read, offset, size)

    def view(self) -> mmap.mmap:
        """All of it, without memory of its own. Not to be kept."""
        return mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ)

    async def excerpt(self, names: Sequence[str]) -> bytes:
        """Those fields of the JSON object that this is, as an object; see gateway/excerpt.py.

        Raises:
            FabricError: INVALID_MESSAGE, it is none, or one of them is too large; QUEUE_FULL, it cannot be read.
        """
        # -P: no module beside that file shall stand for one that it imports.
        command = sys.executable, "-P", excerpt.__file__, *names
        try:
            process = await asyncio.create_subprocess_exec(
                *command, stdin=self._file.fileno(), stdout=asyncio.subprocess.PIPE
            )
        except OSError as error:
            raise _unkept(error) from None
        try:
            told, _ = await process.communicate()
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        if process.returncode == 0:
            return told
        if process.returncode == 1 and told:
            raise FabricError(Code.INVALID_MESSAGE, f"the body is not the JSON that was expected: {told.decode()}")
        raise FabricError(Code.QUEUE_FULL, "this gateway cannot read the request now; try again later")

    async def replace_end(self, end: bytes) -> None:
        """Let the JSON object that this is end otherwise: `end` stands in place of its last brace.

        Raises:
            FabricError: QUEUE_FULL, there is no room.
        """
        size = self.view().rfind(b"}")
        self._spools.bytes_left += self.size - size
        self.size = size
        await asyncio.to_thread(self._file.truncate, size)
        await self.write(end)

    def close(self) -> None:
        """Free its room; again and again if need be."""
        if not self._closed:
            self._closed = True
            self._spools.bytes_left += self.size
            # To let go of many GB takes a disk a while.
            asyncio.get_running_loop().run_in_executor(None, self._close)

    def _close(self) -> None:
        with self._lock:
            self._file.close()

    def _write(self, data: bytes | memoryview) -> None:
        with self._lock:
            self._file.seek(0, os.SEEK_END)
            left = memoryview(data)
            if self._sha256 is not None:
                self._sha256.update(left)
            while left:
                left = left[self._file.write(left) :]

    def _read(self, offset: int, size: int) -> bytes:
        with self._lock:
            if self._file.closed:
                return b""
            self._file.seek(offset)
            return self._file.read(size)


def _unkept(error: OSError) -> FabricError:
    return FabricError(Code.QUEUE_FULL, f"this gateway cannot keep the request: {error.strerror}")
