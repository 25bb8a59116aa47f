"""What the fleet has, as Ollama's and OpenAI's APIs list it: the union over all hosts, by name."""

import asyncio
import contextlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime
from typing import Any, Final

import msgspec

from common.ollama import UNREADABLE
from common.protocol import Engine, Host, Model, short_name
from gateway.upstream import Upstream

FRESH_S: Final = 1.0
"""A list that is younger is shown again: a thousand clients that poll cost the broker one question a second."""

Allowed = Callable[[str], bool]


class Catalogue:
    """Asks the broker, at most once every FRESH_S. Who asks meanwhile gets the same answer, or the same error."""

    def __init__(self, upstream: Upstream) -> None:
        self._upstream = upstream
        self._clock = asyncio.get_running_loop().time
        self._asked_at = float("-inf")
        self._question: asyncio.Task[tuple[Host, ...]] | None = None

    def forget(self) -> None:
        """Ask anew the next time: something was done to models."""
        self._asked_at = float("-inf")

    async def hosts(self) -> tuple[Host, ...]:
        """All hosts, by name.

        Raises:
            FabricError: NO_WORKERS, no broker answers.
        """
        question = self._question
        if question is None or (self._clock() - self._asked_at > FRESH_S and question.done()):
            self._asked_at = self._clock()
            question = self._question = asyncio.create_task(self._ask())
        return await asyncio.shield(question)

    async def _ask(self) -> tuple[Host, ...]:
        snapshot = await self._upstream.query("hosts")
        return tuple(sorted(snapshot.hosts, key=lambda host: host.name))


def tags(hosts: Iterable[Host], allowed: Allowed, aliases: Mapping[str, str]) -> dict[str, Any]:
    """/api/tags: each name once, as the first host lists it. `digests` says who has what where hosts disagree."""
    models = []
    for name, having in _named(hosts, allowed, aliases).items():
        entry = _entry(having[0][2].listed) or _made_up(name, having[0][2])
        if name in aliases:
            entry |= {"name": name, "model": name, "alias": aliases[name]}
        digests: dict[str, list[str]] = {}
        for host, _, model in having:
            digests.setdefault(model.digest, []).append(host.name)
        if len(digests) > 1:
            entry["digests"] = digests
        models.append(entry)
    return {"models": models}


def ps(hosts: Iterable[Host], allowed: Allowed) -> dict[str, Any]:
    """/api/ps: a model that several engines hold is listed for each, with its `host`."""
    entries = []
    for host in hosts:
        for engine in host.engines:
            resident = {model.digest: model for model in engine.models if engine.up and model.resident}
            for model in resident.values():
                entry = _entry(model.running) or _made_up(model.name, model)
                if allowed(str(entry.get("name", model.name))):
                    entries.append(entry | {"host": host.name})
    return {"models": entries}


def version(hosts: Iterable[Host]) -> str:
    """The oldest of the versions that serve: what it can do all of them can."""
    versions = {engine.version for host in hosts for engine in host.engines if engine.up and engine.version}
    return min(versions, key=_version_key, default="0.0.0")


def openai_models(hosts: Iterable[Host], allowed: Allowed, aliases: Mapping[str, str]) -> dict[str, Any]:
    """/v1/models."""
    data = [openai_model(name, having[0][2]) for name, having in _named(hosts, allowed, aliases).items()]
    return {"object": "list", "data": data}


def openai_model(name: str, model: Model) -> dict[str, Any]:
    """/v1/models/NAME."""
    entry = _entry(model.listed)
    created = 0
    with contextlib.suppress(KeyError, ValueError, OverflowError):  # an engine need not say, nor so that it can be read
        created = int(datetime.fromisoformat(str(entry["modified_at"])).timestamp())
    return {"id": name, "object": "model", "created": created, "owned_by": "library"}


def fabric_models(hosts: Iterable[Host], allowed: Allowed) -> dict[str, Any]:
    """/fabric/models: by name, which hosts have each model, which hold it in memory, and how busy they are with it."""
    return {
        "models": [
            {
                "name": short_name(name),
                "hosts": [
                    {
                        "host": host.name,
                        "labels": host.labels,
                        "engine": engine.url,
                        "digest": model.digest,
                        "sizeBytes": model.size_bytes,
                        "embedding": model.embedding,
                        "resident": model.resident,
                        "slots": model.slots,
                        "busy": host.busy.get(engine.url, {}).get(model.digest, 0),
                        "draining": host.draining,
                    }
                    for host, engine, model in having
                ],
            }
            for name, having in _by_name(hosts, allowed).items()
        ]
    }


def find(hosts: Iterable[Host], name: str) -> Model | None:
    """A model by its full name."""
    having = _by_name(hosts, lambda other: other == name)
    return having[name][0][2] if name in having else None


def _named(
    hosts: Iterable[Host], allowed: Allowed, aliases: Mapping[str, str]
) -> dict[str, list[tuple[Host, Engine, Model]]]:
    """Models by the names that clients may use, those that stand for one among them."""
    every = _by_name(hosts, lambda _: True)
    found = every | {alias: every[model] for alias, model in aliases.items() if model in every}
    return {name: having for name, having in sorted(found.items()) if allowed(name)}


def _by_name(hosts: Iterable[Host], allowed: Allowed) -> dict[str, list[tuple[Host, Engine, Model]]]:
    found: dict[str, list[tuple[Host, Engine, Model]]] = {}
    for host, engine, model in _all(hosts):
        if allowed(model.name):
            found.setdefault(model.name, []).append((host, engine, model))
    return dict(sorted(found.items()))


def _all(hosts: Iterable[Host]) -> Iterator[tuple[Host, Engine, Model]]:
    for host in hosts:
        for engine in host.engines:
            if engine.up:
                for model in engine.models:
                    yield host, engine, model


def _entry(raw: bytes) -> dict[str, Any]:
    """An engine's own words, or nothing."""
    try:
        entry = msgspec.json.decode(raw)
    except UNREADABLE:
        return {}
    return entry if isinstance(entry, dict) else {}


def _made_up(name: str, model: Model) -> dict[str, Any]:
    return {"name": name, "model": name, "size": model.size_bytes, "digest": model.digest, "details": {}}


def _version_key(version: str) -> list[int]:
    return [int(number) for number in re.findall(r"[0-9]{1,9}", version.partition("-")[0])]
