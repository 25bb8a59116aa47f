"""A model of hosts with Ollama: how long loading, reading and writing take, and what is evicted.

What is modelled, and how (time in s, sizes in GB, rates in tokens/s):

- **Rates** are those of a model of 5 GB; both fall with the size of a model, for reading is bound by arithmetic and
  writing by memory bandwidth, and the weights are passed over once in either.
- **Memory**: a model takes 1.1 times its size, all of it on the GPU: one that does not fit is not on the host at all.
  Models stay until they are evicted (OLLAMA_KEEP_ALIVE=-1).
- **Loading** takes base + size / bandwidth, one model at a time on a host.
- **Eviction** as Ollama's (server/sched.go): a request whose model is not in memory goes to a line, and its first makes
  room by evicting idle models, the least recently used first. A busy one is never evicted: then the first waits,
  and all behind it too. Requests whose model is in memory go past that line.
- **Slots**: each model runs so many requests at once (OLLAMA_NUM_PARALLEL); further ones wait in the host, unbounded.
- **Reading** a prompt is serial on a host. While it lasts, all that writes there goes on at half speed.
- **Writing**: b streams on a host, of whatever models, take 1 + 0.15·(b - 1) times as long for a token as one alone.
- **Prefix cache**: each model in memory has a cache of blocks (512 tokens), least recently used out first, in the
  host's RAM (8 GiB a model) and its share of the GPU memory that no model takes. A token needs 64 KiB · sqrt(size). A
  prompt's leading blocks that are there are not read again. Its blocks are there once it is read; what was written
  is not. An unloaded model's cache is lost.
"""

import heapq
import math
import tomllib
from collections import OrderedDict, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Final

import msgspec

from bench.sim.formats import BLOCK_TOKENS
from bench.sim.workload import Ask, ModelSpec, hit_tokens
from common.errors import UsageError

SIZE_REFERENCE_GB: Final = 5.0
MEMORY_FACTOR: Final = 1.1
SLOWDOWN: Final = 0.15
READING_SHARE: Final = 0.5
KV_BYTES: Final = 64 * 2**10

Positive = Annotated[float, msgspec.Meta(gt=0)]


class HostSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A host, as in a file of hosts; `models_max` 0: as many as fit."""

    name: Annotated[str, msgspec.Meta(min_length=1, max_length=64)]
    vram_gb: Positive
    prefill_tps: Positive
    decode_tps: Positive
    load_gbps: Positive = 2.0
    load_base_s: Annotated[float, msgspec.Meta(ge=0)] = 3.0
    slots: Annotated[int, msgspec.Meta(ge=1)] = 4
    models_max: Annotated[int, msgspec.Meta(ge=0)] = 0
    cache_ram_gib: Annotated[float, msgspec.Meta(ge=0)] = 8.0

    def fits(self, model: ModelSpec) -> bool:
        """Whether it could ever hold it."""
        return memory_gb(model) <= self.vram_gb


DEFAULT_HOSTS: Final = (
    # About what llama.cpp does with 8B models of 4 bits on these.
    HostSpec(name="a-4090", vram_gb=24, prefill_tps=7000, decode_tps=125),
    HostSpec(name="b-3090", vram_gb=24, prefill_tps=4500, decode_tps=100),
    HostSpec(name="c-l4", vram_gb=24, prefill_tps=2500, decode_tps=45, load_gbps=1.0),
    HostSpec(name="d-a6000", vram_gb=48, prefill_tps=5000, decode_tps=95),
    HostSpec(name="e-l40s", vram_gb=48, prefill_tps=8000, decode_tps=100),
    HostSpec(name="f-a100", vram_gb=80, prefill_tps=9000, decode_tps=140, load_gbps=3.0),
    HostSpec(name="g-4060ti", vram_gb=16, prefill_tps=2500, decode_tps=50),
    HostSpec(name="h-t4", vram_gb=16, prefill_tps=1200, decode_tps=38, load_gbps=1.0),
)


class _File(msgspec.Struct):
    hosts: Annotated[tuple[HostSpec, ...], msgspec.Meta(min_length=1)]


def read_hosts(file: Path) -> tuple[HostSpec, ...]:
    """Hosts of a file: TOML with tables [[hosts]], or JSON {"hosts": [...]}, with the fields of `HostSpec`.

    Raises:
        UsageError: it cannot be read, or is wrong, or two hosts have the same name.
    """
    try:
        data = file.read_bytes()
        if file.suffix == ".json":
            hosts = msgspec.json.decode(data, type=_File).hosts
        else:
            hosts = msgspec.convert(tomllib.loads(data.decode()), _File, strict=False).hosts
    except OSError as error:
        raise UsageError(f"cannot read the hosts in {file}: {error.strerror}") from None
    except (msgspec.MsgspecError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{file} does not describe hosts: {error}") from None
    if len({host.name for host in hosts}) < len(hosts):
        raise UsageError(f"{file} has two hosts of the same name")
    return hosts


def memory_gb(model: ModelSpec) -> float:
    """What it takes of a GPU."""
    return model.size_gb * MEMORY_FACTOR


def largest_gb(hosts: Sequence[HostSpec]) -> float:
    """The size of the largest model that one of them holds."""
    return max(host.vram_gb for host in hosts) / MEMORY_FACTOR


@dataclass(slots=True, eq=False)
class Job:
    """A request and when it came how far; `work` is the virtual time at which its writing began, and ends."""

    number: int
    ask: Ask
    attempt: int = 0
    host: "Host | None" = None
    told_eta_s: float | None = None
    leased_at: float | None = None
    arrived_at: float = 0.0
    loaded_at: float = 0.0
    begun_at: float | None = None
    first_at: float | None = None
    end_at: float | None = None
    shed: bool = False
    hit: int = 0
    work: tuple[float, float] = (0.0, 0.0)
    events: int = 0


@dataclass(slots=True, eq=False)
class _Loaded:
    """A model in memory; not `ready` while it is being loaded."""

    model: ModelSpec
    used_at: float
    ready: bool = False
    running: int = 0
    waiting: deque[Job] = field(default_factory=deque)
    cache: OrderedDict[int, None] = field(default_factory=OrderedDict)

    @property
    def idle(self) -> bool:
        return self.ready and not self.running and not self.waiting


class Host:
    """One host. Give it jobs; call `step` at `due`, never later."""

    def __init__(self, spec: HostSpec) -> None:
        self.spec = spec
        self.loads = 0
        self.computing_s = 0.0
        self.loaded: dict[str, _Loaded] = {}
        self._line: deque[Job] = deque()
        self._loading: tuple[float, _Loaded] | None = None
        self._to_read: deque[Job] = deque()
        self._reading: tuple[float, Job] | None = None
        # Writing is measured in seconds of a stream that has the host to itself: `_work` of them have passed so far.
        self._writing: list[tuple[float, int, Job]] = []
        self._work = 0.0
        self._at = 0.0

    def take(self, job: Job, now: float) -> None:
        """A request arrives."""
        self._progress(now)
        job.host, job.arrived_at = self, now
        loaded = self.loaded.get(job.ask.model.name)
        if loaded is not None:
            self._enter(loaded, job, now)
        else:
            self._line.append(job)
            self._load(now)

    def due(self) -> float:
        """When something happens next, if nothing arrives."""
        due = min(self._loading[0] if self._loading else math.inf, self._reading[0] if self._reading else math.inf)
        if self._writing:
            due = min(due, self._at + max(0.0, self._writing[0][0] - self._work) * self._slowness())
        return due

    def step(self, now: float) -> list[tuple[Job, bool]]:
        """What has happened by now, in order: who wrote its first token, and (True) who came to its end."""
        happened: list[tuple[Job, bool]] = []
        while (at := self.due()) <= now:
            self._progress(at)
            ended: Job | None = None
            if self._loading is not None and self._loading[0] <= at:
                self._has_loaded(self._loading[1], at)
            elif self._reading is not None and self._reading[0] <= at:
                job = self._reading[1]
                self._has_read(job, at)
                happened.append((job, False))
                ended = job if job.ask.output_tokens < 2 else None
            else:
                end, _, ended = heapq.heappop(self._writing)
                self._work = max(self._work, end)
            if ended is not None:
                self._has_ended(ended, at)
                happened.append((ended, True))
        return happened

    def written(self, now: float) -> Iterator[tuple[Job, int]]:
        """Who writes now, and how many tokens it has written."""
        self._progress(now)
        for end, _, job in self._writing:
            start = job.work[0]
            yield job, 1 + int((job.ask.output_tokens - 1) * (self._work - start) / (end - start) + 1e-9)

    def load_s(self, model: ModelSpec) -> float:
        """How long loading it takes."""
        return self.spec.load_base_s + model.size_gb / self.spec.load_gbps

    def prefill_tps(self, model: ModelSpec) -> float:
        """How fast it reads."""
        return self.spec.prefill_tps * SIZE_REFERENCE_GB / model.size_gb

    def decode_tps(self, model: ModelSpec) -> float:
        """How fast it writes one stream alone."""
        return self.spec.decode_tps * SIZE_REFERENCE_GB / model.size_gb

    def load(self, model: ModelSpec, read_tps: float, written_tps: float) -> float:
        """The share of its time that so many tokens a second take, as many streams at once as it has slots."""
        together = (1 + SLOWDOWN * (self.spec.slots - 1)) / self.spec.slots
        return read_tps / self.prefill_tps(model) + written_tps * together / self.decode_tps(model)

    def _slowness(self) -> float:
        return (1 + SLOWDOWN * (len(self._writing) - 1)) / (READING_SHARE if self._reading else 1)

    def _progress(self, now: float) -> None:
        """Time passes in which nothing changes."""
        if now > self._at:
            if self._writing or self._reading:
                self.computing_s += now - self._at
            if self._writing:
                self._work += (now - self._at) / self._slowness()
            self._at = now

    def _enter(self, loaded: _Loaded, job: Job, now: float) -> None:
        if loaded.ready:
            job.loaded_at = now
        loaded.waiting.append(job)
        self._fill(loaded, now)

    def _fill(self, loaded: _Loaded, now: float) -> None:
        """Begin what has a slot."""
        while loaded.ready and loaded.waiting and loaded.running < self.spec.slots:
            job = loaded.waiting.popleft()
            job.begun_at = now
            loaded.running += 1
            self._to_read.append(job)
        self._read(now)

    def _read(self, now: float) -> None:
        if self._reading is None and self._to_read:
            job = self._to_read.popleft()
            cache = self.loaded[job.ask.model.name].cache
            blocks = job.ask.blocks
            run = next((index for index, block in enumerate(blocks) if block not in cache), len(blocks))
            job.hit = hit_tokens(run, job.ask.prompt_tokens)
            for block in reversed(blocks[:run]):
                cache.move_to_end(block)
            self._reading = now + (job.ask.prompt_tokens - job.hit) / self.prefill_tps(job.ask.model), job

    def _has_read(self, job: Job, now: float) -> None:
        """The first token is there."""
        self._reading = None
        job.first_at = now
        loaded = self.loaded[job.ask.model.name]
        for block in reversed(job.ask.blocks):  # so that the ends of prompts are forgotten before their beginnings
            loaded.cache[block] = None
            loaded.cache.move_to_end(block)
        self._trim(loaded)
        if job.ask.output_tokens >= 2:
            end = self._work + (job.ask.output_tokens - 1) / self.decode_tps(job.ask.model)
            job.work = self._work, end
            heapq.heappush(self._writing, (end, job.number, job))
        self._read(now)

    def _has_ended(self, job: Job, now: float) -> None:
        job.end_at = now
        loaded = self.loaded[job.ask.model.name]
        loaded.running -= 1
        loaded.used_at = now
        self._fill(loaded, now)
        self._load(now)

    def _load(self, now: float) -> None:
        """Serve the line of those whose model is not in memory."""
        while self._line and self._loading is None:
            model = self._line[0].ask.model
            loaded = self.loaded.get(model.name)
            if loaded is None:
                if not self._make_room(model):
                    return
                loaded = self.loaded[model.name] = _Loaded(model, now)
                self._loading = now + self.load_s(model), loaded
                self.loads += 1
                self._share_caches()
            self._enter(loaded, self._line.popleft(), now)

    def _make_room(self, model: ModelSpec) -> bool:
        """Evict what is idle, if that suffices."""
        idle = sorted((entry for entry in self.loaded.values() if entry.idle), key=lambda entry: entry.used_at)
        victims: list[_Loaded] = []
        while not self._fits(model, victims):
            if not idle:
                return False
            victims.append(idle.pop(0))
        for victim in victims:
            del self.loaded[victim.model.name]
        return True

    def _fits(self, model: ModelSpec, without: Sequence[_Loaded]) -> bool:
        stay = [entry.model for entry in self.loaded.values() if entry not in without]
        if 0 < self.spec.models_max <= len(stay):
            return False
        return sum(map(memory_gb, [*stay, model])) <= self.spec.vram_gb

    def _has_loaded(self, loaded: _Loaded, now: float) -> None:
        self._loading = None
        loaded.ready, loaded.used_at = True, now
        for job in loaded.waiting:
            job.loaded_at = now
        self._fill(loaded, now)
        self._load(now)

    def cache_blocks(self, model: ModelSpec) -> int:
        """How many blocks its cache holds, with the models that are in memory now."""
        spare_gb = self.spec.vram_gb - sum(memory_gb(entry.model) for entry in self.loaded.values())
        room = self.spec.cache_ram_gib * 2**30 + spare_gb * 1e9 / len(self.loaded)
        return int(room / (KV_BYTES * math.sqrt(model.size_gb) * BLOCK_TOKENS))

    def _share_caches(self) -> None:
        for loaded in self.loaded.values():
            self._trim(loaded)

    def _trim(self, loaded: _Loaded) -> None:
        room = self.cache_blocks(loaded.model)
        while len(loaded.cache) > room:
            loaded.cache.popitem(last=False)
