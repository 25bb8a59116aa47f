"""How fast each engine is with each model, learnt from what Ollama says of every request. Pure.

An estimate is the runner's own as soon as it has seen a request; before that the prior, which goes by the model's size,
scaled by how far other models on that engine, or other engines, were off it. So one request calibrates a host.
"""

from dataclasses import dataclass, field
from math import exp, log
from typing import Final

ALPHA: Final = 0.2
"""The weight of a new value, once there are several."""
DECAY: Final = 0.97
"""What of the weight of former requests stays with each new one, where a line is fitted."""
NS: Final = 1e-9
TOKENS_MIN: Final = 32
"""Fewer say little about a rate."""
LOAD_S_MIN: Final = 0.2
"""What an engine calls loading and takes less, is the look-up of a model that is loaded."""
SIZE_MIN: Final = 5e8

# Priors: a GPU of middling bandwidth, which reads all weights once for each token; and a disk.
TOKEN_BASE_S: Final = 0.003
BYTES_PER_S: Final = 5e11
PREFILL_BYTES_PER_S: Final = 2e13
LOAD_BASE_S: Final = 1.5
LOAD_BYTES_PER_S: Final = 1.2e9
BATCH_SLOPE: Final = 0.2
"""How much slower a token comes for each other request that runs on the engine, as long as nothing was seen."""
PROMPT_TOKENS: Final = 500.0
OUTPUT_TOKENS: Final = 200.0
TOKENS_PER_BYTE: Final = 0.25


@dataclass(slots=True)
class Mean:
    """An exponentially weighted mean; `n` values were seen."""

    value: float = 0.0
    n: int = 0

    def add(self, value: float) -> None:
        self.n += 1
        self.value += max(1 / self.n, ALPHA) * (value - self.value)

    def of(self, prior: float) -> float:
        return self.value if self.n else prior


@dataclass(slots=True)
class Fit:
    """Seconds per token against how many run beside: a weighted least-squares line."""

    weight: float = 0.0
    x: float = 0.0
    y: float = 0.0
    xx: float = 0.0
    xy: float = 0.0

    def add(self, x: float, y: float) -> None:
        self.weight = self.weight * DECAY + 1
        keep = (self.weight - 1) / self.weight
        self.x = self.x * keep + x / self.weight
        self.y = self.y * keep + y / self.weight
        self.xx = self.xx * keep + x * x / self.weight
        self.xy = self.xy * keep + x * y / self.weight

    def at(self, x: float) -> float:
        spread = self.xx - self.x * self.x
        slope = BATCH_SLOPE * self.y / (1 + BATCH_SLOPE * self.x)
        if spread > 0.1:
            slope = max(0.0, (self.xy - self.x * self.y) / spread)
        return max(self.y + slope * (x - self.x), self.y * 0.1)


@dataclass(slots=True)
class Scale:
    """By which factors an engine, or the fleet, is off the priors, as means of logarithms."""

    token: Mean = field(default_factory=Mean)
    prefill: Mean = field(default_factory=Mean)
    load: Mean = field(default_factory=Mean)


class Rates:
    """Of one model on one engine."""

    def __init__(self, size_bytes: int, engine: Scale, fleet: Scale) -> None:
        self.resize(size_bytes)
        self._engine = engine
        self._fleet = fleet
        self._token = Fit()
        self._prefill = Mean()
        self._load = Mean()

    def resize(self, size_bytes: int) -> None:
        """How large the model is, by which the priors go."""
        self.size = max(float(size_bytes), SIZE_MIN)

    def token_s(self, beside: float) -> float:
        """Seconds per token written, with so many other requests on the engine."""
        if self._token.weight:
            return self._token.at(beside)
        prior = self._scaled(TOKEN_BASE_S + self.size / BYTES_PER_S, self._engine.token, self._fleet.token)
        return prior * (1 + BATCH_SLOPE * beside)

    def prefill_s(self, tokens: float) -> float:
        """Seconds until so many tokens are read."""
        if self._prefill.n:
            return tokens * self._prefill.value
        return tokens * self._scaled(self.size / PREFILL_BYTES_PER_S, self._engine.prefill, self._fleet.prefill)

    @property
    def read(self) -> bool:
        """Whether it was seen reading."""
        return self._prefill.n > 0

    def load_s(self) -> float:
        """Seconds until the model is in memory."""
        if self._load.n:
            return self._load.value
        return self._scaled(LOAD_BASE_S + self.size / LOAD_BYTES_PER_S, self._engine.load, self._fleet.load)

    def known_load_s(self) -> float:
        """The same, but 0 as long as nothing was seen to be loaded there."""
        return self.load_s() if self._load.n or self._engine.load.n else 0.0

    def known_prefill_s(self, tokens: float) -> float:
        """`prefill_s`, but 0 as long as nothing was seen to be read there."""
        return self.prefill_s(tokens) if self._prefill.n or self._engine.prefill.n else 0.0

    def saw_tokens(self, count: int, ns: int, beside: float) -> None:
        """So many were written."""
        if count >= TOKENS_MIN and ns > 0:
            token_s = ns * NS / count
            self._token.add(beside, token_s)
            prior = (TOKEN_BASE_S + self.size / BYTES_PER_S) * (1 + BATCH_SLOPE * beside)
            self._learn(token_s / prior, self._engine.token, self._fleet.token)

    def saw_prefill(self, count: int, ns: int) -> None:
        """So many were read, none of them from the cache."""
        if count >= TOKENS_MIN and ns > 0:
            self._prefill.add(ns * NS / count)
            self._learn(ns * NS / count / (self.size / PREFILL_BYTES_PER_S), self._engine.prefill, self._fleet.prefill)

    def saw_load(self, ns: int) -> None:
        """It was loaded."""
        if ns * NS >= LOAD_S_MIN:
            self._load.add(ns * NS)
            prior = LOAD_BASE_S + self.size / LOAD_BYTES_PER_S
            self._learn(ns * NS / prior, self._engine.load, self._fleet.load)

    @staticmethod
    def _scaled(prior: float, engine: Mean, fleet: Mean) -> float:
        return prior * exp(engine.value if engine.n else fleet.value)

    @staticmethod
    def _learn(ratio: float, engine: Mean, fleet: Mean) -> None:
        engine.add(log(ratio))
        fleet.add(log(ratio))


class Arrivals:
    """How often something comes, per second: a count that halves after each half-life."""

    HALF_LIFE_S: Final = 120.0

    def __init__(self) -> None:
        self._count = 0.0
        self._at = 0.0

    def add(self, now: float, share: float = 1.0) -> None:
        self._count = self._decayed(now) + share
        self._at = now

    def per_s(self, now: float) -> float:
        return self._decayed(now) * log(2) / self.HALF_LIFE_S

    def _decayed(self, now: float) -> float:
        return self._count * exp(-log(2) * (now - self._at) / self.HALF_LIFE_S)
