"""What is asked: the requests of a trace, with the models and clients that it does not tell.

None of the public traces says who asked which model, so both are drawn, from a seed:

- Models: sizes in equal ratios from 2 to 40 GB (less if no host holds 40). Small ones tend to be popular: they are
  ranked by the logarithm of their size and a noise of 0.8, and model k has the weight 1/k (Zipf, exponent 1).
- Clients: client k begins a conversation with weight 1/k (Zipf again). Each has one to three models of its own, drawn
  by their weights; of these it asks the j-th with weight 1/j.
- Conversations: requests that share their first block belong together, to one client and one model. Blocks that more
  than 1 % of all requests begin with (a common system prompt) don't count for that. Without blocks each stands alone.
"""

import math
import random
from bisect import bisect_right
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Final

from bench.sim.formats import BLOCK_TOKENS, Row
from common.prefix import BOUNDARIES, HASH_BYTES

SIZE_GB_MIN: Final = 2.0
SIZE_GB_MAX: Final = 40.0
POPULARITY_NOISE: Final = 0.8
MODELS_OF_A_CLIENT_MAX: Final = 3
COMMON_SHARE: Final = 0.01
COMMON_MIN: Final = 10
TOKEN_BYTES: Final = 4
_BLOCK_BYTES: Final = BLOCK_TOKENS * TOKEN_BYTES
_MASK: Final = 2 ** (8 * HASH_BYTES) - 1


@dataclass(slots=True, frozen=True)
class ModelSpec:
    """A model: `size_gb` of weights."""

    name: str
    size_gb: float

    @property
    def digest(self) -> str:
        """As an engine would tell it."""
        return f"sha256:{self.name}"


@dataclass(slots=True, frozen=True)
class Ask:
    """A request, complete: what is read and what will have been written, which nobody knows before."""

    at_s: float
    client: str
    model: ModelSpec
    prompt_tokens: int
    output_tokens: int
    blocks: tuple[int, ...]
    flood: bool = False

    @property
    def cost(self) -> int:
        """In weighted tokens, as the VTC paper counts them (arXiv 2401.00588): what is written counts twice."""
        return self.prompt_tokens + 2 * self.output_tokens

    def prefix(self) -> tuple[bytes, ...]:
        """A chain as common/prefix.py makes it of texts: two agree as long as their blocks do."""
        hashes: list[bytes] = []
        known, until = 0, 0
        for index in range(bisect_right(BOUNDARIES, self.prompt_tokens * TOKEN_BYTES)):
            while until * _BLOCK_BYTES < BOUNDARIES[index]:
                known = hash((known, self.blocks[until]))  # of integers: the same in every process
                until += 1
            hashes.append((hash((known, index)) & _MASK).to_bytes(HASH_BYTES, "big"))
        return tuple(hashes)


def synthesise(
    rows: Sequence[Row], *, models: int, clients: int, seed: int, size_gb_max: float = SIZE_GB_MAX
) -> list[Ask]:
    """Give each row a client and a model."""
    rng = random.Random(seed)
    specs = _models(models, min(size_gb_max, SIZE_GB_MAX), rng)
    popularity = [1 / rank for rank in range(1, models + 1)]
    owned = [_own(popularity, rng) for _ in range(clients)]
    activity = [1 / rank for rank in range(1, clients + 1)]
    starts = Counter(block for row in rows for block in _blocks(row))
    common = max(COMMON_MIN, COMMON_SHARE * len(rows))
    conversations: dict[int, tuple[int, int]] = {}
    asks: list[Ask] = []
    for index, row in enumerate(rows):
        count = -(-row.prompt_tokens // BLOCK_TOKENS)
        # What the trace doesn't tell is nobody else's: negative numbers are in no trace.
        told = _blocks(row)
        blocks = told + tuple(-1 - index - len(rows) * rest for rest in range(count - len(told)))
        root = next((block for block in blocks if starts[block] <= common), -1 - index)
        if root not in conversations:
            client = rng.choices(range(clients), activity)[0]
            own = owned[client]
            conversations[root] = client, rng.choices(own, popularity[: len(own)])[0]
        client, model = conversations[root]
        asks.append(Ask(row.at_s, f"client{client:03}", specs[model], row.prompt_tokens, row.output_tokens, blocks))
    return asks


def _blocks(row: Row) -> tuple[int, ...]:
    """As many as the prompt has; a trace's negative ones are moved out of our way."""
    told = row.blocks[: -(-row.prompt_tokens // BLOCK_TOKENS)]
    return tuple(2 * block if block >= 0 else 1 - 2 * block for block in told)


def _models(count: int, size_gb_max: float, rng: random.Random) -> list[ModelSpec]:
    """By popularity."""
    low = min(SIZE_GB_MIN, size_gb_max)
    sizes = [low * (size_gb_max / low) ** (index / max(1, count - 1)) for index in range(count)]
    sizes.sort(key=lambda size: math.log(size) + rng.gauss(0, POPULARITY_NOISE))
    return [ModelSpec(f"m{rank:02}-{size:.0f}gb:latest", size) for rank, size in enumerate(sizes)]


def _own(popularity: Sequence[float], rng: random.Random) -> list[int]:
    """The models of a client, its favourite first."""
    own: list[int] = []
    for _ in range(min(rng.randint(1, MODELS_OF_A_CLIENT_MAX), len(popularity))):
        rest = [index for index in range(len(popularity)) if index not in own]
        own.append(rng.choices(rest, [popularity[index] for index in rest])[0])
    return own


def scaled(asks: Iterable[Ask], rate_scale: float, minutes: float | None) -> list[Ask]:
    """The same requests, so many times as often; only those of the first minutes then."""
    end_s = math.inf if minutes is None else 60 * minutes
    return [replace(ask, at_s=ask.at_s / rate_scale) for ask in asks if ask.at_s / rate_scale <= end_s]


def flooded(asks: Sequence[Ask], share: float, seed: int) -> tuple[list[Ask], str]:
    """In the middle third one client asks as much again as `share` times all others together; and who it is.

    The client is the one of median activity. Each request too many is like one of that time, but begins like none.
    """
    rng = random.Random(seed)
    counts = Counter(ask.client for ask in asks)
    client = sorted(counts, key=lambda name: (counts[name], name))[len(counts) // 2]
    own = [ask.model for ask in asks if ask.client == client]
    start, end = flood_period(asks)
    others = [ask for ask in asks if start <= ask.at_s < end and ask.client != client]
    extra: list[Ask] = []
    for number in range(round(share * len(others))):
        like = rng.choice(others)
        blocks = tuple(-(2**40) - 2**16 * number - index for index in range(len(like.blocks)))
        extra.append(
            replace(like, at_s=rng.uniform(start, end), client=client, model=rng.choice(own), blocks=blocks, flood=True)
        )
    return sorted([*asks, *extra], key=lambda ask: ask.at_s), client


def flood_period(asks: Sequence[Ask]) -> tuple[float, float]:
    """When the flood is: from, to."""
    end = asks[-1].at_s
    return end / 3, 2 * end / 3


def hit_tokens(blocks: int, prompt_tokens: int) -> int:
    """What is saved of a prompt whose first so many blocks are known: its last token is always computed."""
    return max(0, min(blocks * BLOCK_TOKENS, prompt_tokens - 1))


def one_cache(asks: Iterable[Ask], blocks_max: float = math.inf) -> float:
    """The share of prompt tokens that a single cache for all would save, of so many blocks, least recently used out."""
    cache: OrderedDict[tuple[str, int], None] = OrderedDict()
    saved = total = 0
    for ask in asks:
        blocks = [(ask.model.name, block) for block in ask.blocks]
        run = next((index for index, block in enumerate(blocks) if block not in cache), len(blocks))
        saved += hit_tokens(run, ask.prompt_tokens)
        total += ask.prompt_tokens
        for block in reversed(blocks):
            cache[block] = None
            cache.move_to_end(block)
        while len(cache) > blocks_max:
            cache.popitem(last=False)
    return saved / total if total else 0.0
