"""Large bodies in files: what they hold, and that nothing is left of them."""

import asyncio
import hashlib
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from common.errors import Code, FabricError
from gateway.excerpt import FIELD_BYTES_MAX, main
from gateway.exchange import Ending, Gone, Room, attended, read_large
from gateway.http_api import ANONYMOUS
from gateway.spool import DISK_RESERVE_BYTES, SPOOL_AT, Spool, Spools

MIB = 2**20


@pytest.fixture
def spools(tmp_path: Path) -> Spools:
    return Spools(tmp_path, 10 * MIB)


@pytest.fixture
def ending() -> Ending:
    return Ending(ANONYMOUS, Room())


def receiving(*pieces: bytes, leaves: bool = False) -> Callable[[], Any]:
    """An ASGI `receive` of a body in these pieces."""
    messages: list[dict[str, Any]] = [{"type": "http.request", "body": piece, "more_body": True} for piece in pieces]
    if leaves:
        messages.append({"type": "http.disconnect"})
    else:
        messages[-1]["more_body"] = False

    async def receive() -> dict[str, Any]:
        return messages.pop(0)

    return receive


async def test_what_was_written_is_read_in_any_order(spools: Spools) -> None:
    spool = Spool(spools, hashed=True)
    await spool.write(b"0123456789")
    await spool.write(memoryview(b"abc"))
    assert (spool.size, spools.bytes_left) == (13, 10 * MIB - 13)
    assert [await spool.read(8, 4), await spool.read(0, 2), await spool.read(12, 9), await spool.read(13, 1)] == [
        b"89ab",
        b"01",
        b"c",
        b"",
    ]
    await spool.write(b"!")
    assert spool.view()[:] == b"0123456789abc!"
    assert spool.digest == f"sha256:{hashlib.sha256(b'0123456789abc!').hexdigest()}"
    assert os.listdir(spools.folder) == [], "it has no name"
    spool.close()
    spool.close()
    assert spools.bytes_left == 10 * MIB
    assert await spool.read(0, 1) == b""


async def test_an_object_can_end_otherwise(spools: Spools) -> None:
    spool = Spool(spools)
    await spool.write(b'{"model":"a","x":{}} \n')
    await spool.replace_end(b',"model":"b"}')
    assert spool.view()[:] == b'{"model":"a","x":{},"model":"b"}'
    spool.close()
    assert spools.bytes_left == 10 * MIB


async def test_there_is_no_more_room_than_was_given(spools: Spools) -> None:
    one, other = Spool(spools), Spool(spools)
    await one.write(bytes(6 * MIB))
    with pytest.raises(FabricError, match="holds all the large requests") as refused:
        await other.write(bytes(5 * MIB))
    assert refused.value.code is Code.QUEUE_FULL
    one.close()
    await other.write(bytes(5 * MIB))
    other.close()
    assert spools.bytes_left == 10 * MIB


async def test_the_disk_is_not_filled(spools: Spools, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil._ntuple_diskusage(0, 0, DISK_RESERVE_BYTES + 5)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    spool = Spool(spools)
    await spool.write(b"12345")
    with pytest.raises(FabricError, match="disk is full"):
        await spool.write(b"123456")
    spool.close()


async def test_a_folder_that_is_gone_is_told(tmp_path: Path) -> None:
    spools = Spools(tmp_path / "none", MIB)
    with pytest.raises(FabricError, match="cannot keep the request: No such file") as refused:
        spools.check(1)
    assert refused.value.code is Code.QUEUE_FULL


async def test_some_fields_of_an_object_are_found(spools: Spools) -> None:
    spool = Spool(spools)
    await spool.write(b'{"messages":["%b"], "model" : "m","model":"n","options":{"stop": [1]}}' % (b"x" * MIB))
    assert await spool.excerpt(["model", "MODEL", "options"]) == b'{"model":"n","options":{"stop": [1]}}'
    spool.close()


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"[1]", "Expected `object`"),
        (b'{"model":', "truncated"),
        (b"[" * MIB, "Expected `object`"),
        (b'{"x":' + b"[" * MIB, "recursion"),
        (b'{"model":"' + b"x" * FIELD_BYTES_MAX + b'"}', "'model' has more than 65536 bytes"),
    ],
)
async def test_of_what_cannot_be_read_there_is_no_excerpt(spools: Spools, body: bytes, words: str) -> None:
    spool = Spool(spools)
    await spool.write(body)
    with pytest.raises(FabricError, match=words) as refused:
        await spool.excerpt(["model"])
    assert refused.value.code is Code.INVALID_MESSAGE
    spool.close()


@pytest.mark.parametrize("program", ["none", "false", "sh"])
async def test_a_reader_that_fails_is_told(spools: Spools, monkeypatch: pytest.MonkeyPatch, program: str) -> None:
    spool = Spool(spools)
    await spool.write(b"{}")
    monkeypatch.setattr(sys, "executable", shutil.which(program) or "/none")
    with pytest.raises(FabricError, match="this gateway cannot") as refused:
        await spool.excerpt(["model"])
    assert refused.value.code is Code.QUEUE_FULL
    spool.close()


async def test_a_reader_ends_with_whoever_waits_for_it(spools: Spools, monkeypatch: pytest.MonkeyPatch) -> None:
    spool = Spool(spools)
    await spool.write(b"{}")
    fifo = spools.folder / "fifo"
    os.mkfifo(fifo)
    sleeper = spools.folder / "sleeper"
    sleeper.write_text(f"#!/bin/sh\necho $$ > {fifo}\nexec sleep 600\n")
    sleeper.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(sleeper))
    reading = asyncio.create_task(spool.excerpt(["model"]))
    pid = int(await asyncio.to_thread(fifo.read_text))
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    spool.close()


def test_the_reader_writes_what_it_found_or_why_it_did_not(tmp_path: Path, capfdbinary: Any) -> None:
    for body, status, told in ((b'{"a":1,"b":2}', 0, b'{"b":2}'), (b"[]", 1, b"Expected `object`, got `array`")):
        (tmp_path / "body").write_bytes(body)
        with (tmp_path / "body").open("rb") as file:
            assert main(["b"], file.fileno()) == status
        sys.stdout.flush()
        assert capfdbinary.readouterr().out == told


async def test_a_disk_that_fails_is_told(spools: Spools, monkeypatch: pytest.MonkeyPatch) -> None:
    spool = Spool(spools)
    monkeypatch.setattr(spool, "_write", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(FabricError, match="cannot keep the request: No space left"):
        await spool.write(b"x")
    spool.close()
    with pytest.raises(FabricError, match="cannot keep the request: No such file"):
        Spool(Spools(spools.folder / "none", MIB))


async def test_a_small_body_stays_in_memory(spools: Spools, ending: Ending) -> None:
    assert await read_large(receiving(b"ab", b"", b"c"), ending, spools, 10) == b"abc"
    whole = bytes(SPOOL_AT)
    assert await read_large(receiving(whole), ending, spools, SPOOL_AT) == whole


@pytest.mark.parametrize("pieces", [1, 7, 1000])
async def test_a_large_one_goes_into_a_file_however_it_comes(spools: Spools, ending: Ending, pieces: int) -> None:
    body = os.urandom(3 * MIB + 5)
    step = len(body) // pieces + 1
    came = receiving(*(body[start : start + step] for start in range(0, len(body), step)))
    spool = await read_large(came, ending, spools, 4 * MIB)
    assert isinstance(spool, Spool)
    assert spool.view()[:] == body
    ending.release()
    assert spools.bytes_left == 10 * MIB


@pytest.mark.parametrize(
    ("came", "bytes_max", "code"),
    [
        (receiving(b"12345"), 4, Code.TOO_LARGE),
        (receiving(bytes(MIB), bytes(MIB), bytes(MIB)), 2 * MIB, Code.TOO_LARGE),
        (receiving(*[bytes(MIB)] * 11), 20 * MIB, Code.QUEUE_FULL),
    ],
)
async def test_what_is_too_large_leaves_nothing(
    spools: Spools, ending: Ending, came: Any, bytes_max: int, code: Code
) -> None:
    with pytest.raises(FabricError) as refused:
        await read_large(came, ending, spools, bytes_max)
    assert refused.value.code is code
    ending.release()
    assert spools.bytes_left == 10 * MIB


@pytest.mark.parametrize("size", [3, 3 * MIB])
async def test_whoever_leaves_leaves_nothing(spools: Spools, ending: Ending, size: int) -> None:
    with pytest.raises(Gone):
        await read_large(receiving(bytes(size), leaves=True), ending, spools, 10 * MIB)
    ending.release()
    assert spools.bytes_left == 10 * MIB


async def test_what_is_ended_from_outside_is_read_no_further(spools: Spools, ending: Ending) -> None:
    never = asyncio.Event()
    reads = asyncio.Event()

    async def receive() -> dict[str, Any]:
        if reads.is_set():
            await never.wait()
        reads.set()
        return {"type": "http.request", "body": bytes(2 * MIB), "more_body": True}

    reading = asyncio.create_task(read_large(receive, ending, spools, 10 * MIB))
    await reads.wait()
    ending.end(FabricError(Code.CANCELLED, "this key was revoked"))
    with pytest.raises(FabricError, match="revoked"):
        await reading
    ending.release()
    assert spools.bytes_left == 10 * MIB
    with pytest.raises(FabricError, match="revoked"):
        await read_large(receiving(bytes(2 * MIB)), ending, spools, 10 * MIB)
    ending.release()


async def test_work_ends_with_its_client(ending: Ending) -> None:
    never = asyncio.Event()
    with pytest.raises(Gone):
        await attended(never.wait(), ending, receiving(b"more", leaves=True))
    assert await attended(asyncio.sleep(0, "done"), ending) == "done"
