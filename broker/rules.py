"""Which hosts may serve which models and clients, as the operator says. Pure.

A rule reads `model=PATTERN on KEY=VALUE` or `client=PATTERN not KEY=VALUE`, and so on: what matches the pattern runs
only on hosts that have the label, or never on them. `host=NAME` is a label of every host. All rules that match must
agree.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Final

from common.errors import UsageError
from common.protocol import full_name

if TYPE_CHECKING:
    from broker.state import Worker

_RULE: Final = re.compile(r"(model|client)=(\S+) (on|not) ([\w.-]+=[\w.:-]+)")
CACHE_MAX: Final = 10_000


@dataclass(slots=True, frozen=True)
class Rule:
    """See above."""

    kind: str
    pattern: str
    wanted: bool
    label: str

    @classmethod
    def read(cls, text: str) -> "Rule":
        """Raises UsageError: it is none."""
        match = _RULE.fullmatch(text.strip())
        if match is None:
            raise UsageError(f"a rule reads `model=PATTERN on KEY=VALUE` or `client=PATTERN not KEY=VALUE`: {text!r}")
        kind, pattern, how, label = match.groups()
        return cls(
            kind,
            full_name(pattern) if kind == "model" and not set("*?[") & set(pattern) else pattern,
            how == "on",
            label,
        )


class Rules:
    """All of them."""

    def __init__(self, rules: Sequence[str]) -> None:
        self._rules = [Rule.read(text) for text in rules]
        self._matching: dict[tuple[str, str], tuple[Rule, ...]] = {}

    def allow(self, model: str, client: str, worker: "Worker") -> bool:
        """Whether that client's request for that model may run there."""
        return all(
            (rule.label in worker.labels or rule.label == f"host={worker.name}") == rule.wanted
            for rule in self.matching(model, client)
        )

    def matching(self, model: str, client: str) -> tuple[Rule, ...]:
        """Those that are for that client's requests for that model."""
        if not self._rules:
            return ()
        key = model, client
        matching = self._matching.get(key)
        if matching is None:
            if len(self._matching) >= CACHE_MAX:
                self._matching.clear()
            matching = self._matching[key] = tuple(
                rule for rule in self._rules if fnmatchcase(model if rule.kind == "model" else client, rule.pattern)
            )
        return matching
