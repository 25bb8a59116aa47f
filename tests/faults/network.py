"""A network namespace behind a link that loses packets, for tests as root: real TCP has to cope with it.

    this namespace  198.18.N.1 ── tun ── relay in this process ── tun ── 198.18.N.2  the other namespace

The relay passes IP packets between two tun devices and loses, rates or stops them, each way by itself, drawn from a
seed. So nothing is needed but root, `ip` and /dev/net/tun: neither nft nor iptables, whose modules kernels leave out,
nor netem. 198.18.0.0/15 is set aside for such tests (RFC 2544).

Bounds. A direction that is rated holds QUEUE_BYTES_MAX, as a router does; what comes then is lost.
"""

import asyncio
import contextlib
import fcntl
import os
import random
import shutil
import struct
import subprocess
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

TUN: Final = Path("/dev/net/tun")
QUEUE_BYTES_MAX: Final = 32 * 2**10
_TUNSETIFF: Final = 0x400454CA
_IFF_TUN: Final = 0x0001
_IFF_NO_PI: Final = 0x1000
_MTU: Final = 1500


def missing() -> str:
    """Why namespaces cannot be used here; empty if they can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None:
        return "network namespaces need `ip` (apt install iproute2)"
    if not TUN.exists():
        return f"there is no {TUN}"
    return ""


@dataclass(slots=True)
class Way:
    """How packets travel one way. `loss` is the share that is lost; `down` loses all."""

    loss: float = 0.0
    bits_per_s: float = 0.0
    down: bool = False
    passed: int = 0
    lost: int = 0
    queue: deque[bytes] = field(default_factory=deque)
    queued_bytes: int = 0
    busy: bool = False


class Link:
    """What `linked` yields: `here` and `there` are the addresses, `prefix` starts a command in the other namespace."""

    def __init__(self, name: str, number: int, rng: random.Random) -> None:
        self.here, self.there = f"198.18.{number}.1", f"198.18.{number}.2"
        self.prefix = ("ip", "netns", "exec", name)
        self.out = Way()
        """From here to there."""
        self.back = Way()
        self._rng = rng

    def partition(self, *, out: bool = True, back: bool = True) -> None:
        """Lose everything that travels these ways."""
        self.out.down, self.back.down = out, back

    def lose(self, share: float) -> None:
        self.out.loss = self.back.loss = share

    def rate(self, bits_per_s: float) -> None:
        self.out.bits_per_s = self.back.bits_per_s = bits_per_s

    def heal(self) -> None:
        self.partition(out=False, back=False)
        self.lose(0)
        self.rate(0)

    def _pass(self, source: int, target: int, way: Way) -> None:
        """A packet is there to be read."""
        with contextlib.suppress(BlockingIOError):
            packet = os.read(source, 65536)
            if way.down or self._rng.random() < way.loss:
                way.lost += 1
            elif not way.bits_per_s and not way.queue:
                self._write(target, packet, way)
            elif way.queued_bytes + len(packet) > QUEUE_BYTES_MAX:
                way.lost += 1
            else:
                way.queue.append(packet)
                way.queued_bytes += len(packet)
                if not way.busy:
                    self._serve(target, way)

    def _serve(self, target: int, way: Way) -> None:
        """Send the oldest packet when the line has had the time for it."""
        way.busy = bool(way.queue)
        if way.queue:
            packet = way.queue.popleft()
            way.queued_bytes -= len(packet)
            took_s = len(packet) * 8 / way.bits_per_s if way.bits_per_s else 0

            def sent() -> None:
                with contextlib.suppress(OSError):  # the link has gone meanwhile
                    self._write(target, packet, way)
                    self._serve(target, way)

            asyncio.get_running_loop().call_later(took_s, sent)

    @staticmethod
    def _write(target: int, packet: bytes, way: Way) -> None:
        try:
            os.write(target, packet)
            way.passed += 1
        except BlockingIOError:
            way.lost += 1


@contextlib.contextmanager
def linked(seed: int) -> Iterator[Link]:
    """A namespace and the link to it, on the running event loop; both are gone after the block."""
    number = os.getpid() % 250 + 1
    name = f"weftline-{os.getpid()}"
    link = Link(name, number, random.Random(seed))
    loop = asyncio.get_running_loop()
    with contextlib.ExitStack() as stack:
        _ip("netns", "add", name)
        stack.callback(_ip, "netns", "del", name)
        near, far = stack.enter_context(_tun(f"wla{os.getpid()}")), stack.enter_context(_tun(f"wlb{os.getpid()}"))
        _ip("addr", "add", link.here, "peer", link.there, "dev", near.device)
        _ip("link", "set", near.device, "up", "mtu", str(_MTU))
        _ip("link", "set", far.device, "netns", name)
        _ip("-n", name, "addr", "add", link.there, "peer", link.here, "dev", far.device)
        _ip("-n", name, "link", "set", far.device, "up", "mtu", str(_MTU))
        _ip("-n", name, "link", "set", "lo", "up")
        loop.add_reader(near.file, link._pass, near.file, far.file, link.out)
        stack.callback(loop.remove_reader, near.file)
        loop.add_reader(far.file, link._pass, far.file, near.file, link.back)
        stack.callback(loop.remove_reader, far.file)
        yield link


@dataclass(slots=True, frozen=True)
class _Tun:
    device: str
    file: int


@contextlib.contextmanager
def _tun(device: str) -> Iterator[_Tun]:
    """A tun device, which lives as long as its file."""
    file = os.open(TUN, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        fcntl.ioctl(file, _TUNSETIFF, struct.pack("16sH22x", device.encode(), _IFF_TUN | _IFF_NO_PI))
        yield _Tun(device, file)
    finally:
        os.close(file)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, timeout=10)
