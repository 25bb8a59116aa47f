"""The scheduler seen from outside: real broker, gateway and workers, and simulated engines that differ.

Nothing here measures time. What is asserted is the order in which clients are told things, where requests went, and
what the engines themselves counted.
"""

import asyncio
import contextlib
import itertools
import json
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
from weftline_client import AsyncClient, DeadlineExceededError, Result, WeftlineError

from cli.fleet import ask
from common.protocol import Query, short_name
from tests.fabric import Fabric
from tests.processes import ROOT, Process
from tests.processes import started as running
from workers.embedded.simulated import Settings

GB = 10**9
Message = dict[str, Any]
Outcome = Result | WeftlineError
Asked = asyncio.Task[Outcome]

pytestmark = pytest.mark.timeout(60)


@dataclass
class Stage:
    """Clients of a fabric, what they were told in order of arrival, and what becomes of their requests."""

    fabric: Fabric
    group: asyncio.TaskGroup
    clients: dict[str, AsyncClient]
    told: list[Message] = field(default_factory=list)
    news: asyncio.Event = field(default_factory=asyncio.Event)

    def ask(
        self, ref: str, *, client: str = "a", model: str = "llama2", prompt: str = "", tokens: int = 10, **more: Any
    ) -> Asked:
        """Send a request of that id; those of one client are sent in the order in which they are asked."""
        options = {"num_predict": tokens, **more.pop("options", {})}

        async def run() -> Outcome:
            try:
                params = {"request_id": ref, "options": options, **more}
                result: Result = await self.clients[client].generate(prompt or ref, model, **params)
                return result
            except WeftlineError as error:
                return error

        return self.group.create_task(run())

    async def heard(self, kind: str, *refs: str) -> None:
        """Wait until clients were told this of all these requests."""
        while not {*refs} <= {*self.order(kind)}:
            self.news.clear()
            await self.news.wait()

    def order(self, kind: str) -> list[str]:
        """The requests in the order in which this was first told of them."""
        return list(dict.fromkeys(message["id"] for message in self.told if message["type"] == kind))

    def all_told(self, kind: str, ref: str) -> list[Message]:
        return [message for message in self.told if message["type"] == kind and message["id"] == ref]

    def on_message(self, message: Message) -> None:
        self.told.append(message)
        self.news.set()


@contextlib.asynccontextmanager
async def stage(fabric: Fabric) -> AsyncIterator[Stage]:
    """A connection for each of the fabric's `clients`."""
    async with asyncio.timeout(50), contextlib.AsyncExitStack() as stack:
        clients = {
            name: await stack.enter_async_context(
                AsyncClient.from_config(fabric.config_of(name), server_url=fabric.url)
            )
            for name in fabric.clients
        }
        async with asyncio.TaskGroup() as group:
            running = Stage(fabric, group, clients)
            for client in clients.values():
                for kind in ("queued", "stream_start", "stream_end", "error"):
                    client.on(kind, running.on_message)
            yield running


def started(
    folder: Path, *engines: Settings, clients: Sequence[str] | Mapping[str, Mapping[str, Any]] = ("a",), **more: Any
) -> Fabric:
    limits = clients if isinstance(clients, Mapping) else {name: {} for name in clients}
    gateway = {"anonymous": True, **more.pop("gateway_settings", {})}
    return Fabric(folder, engines=list(engines), clients=limits, gateway_settings=gateway, **more)


async def results(*asked: Asked) -> list[Result]:
    """Of requests that all end well."""
    outcomes = await asyncio.gather(*asked)
    assert all(isinstance(outcome, Result) for outcome in outcomes), outcomes
    return [outcome for outcome in outcomes if isinstance(outcome, Result)]


def load(fabric: Fabric, engine: int, model: str) -> None:
    """Let an engine load a model, and wait until the fabric knows of it."""
    body = {"model": model}
    httpx.post(f"{fabric.engine_urls[engine]}/api/generate", json=body, trust_env=False).raise_for_status()

    def known() -> bool:
        assert fabric.addresses is not None
        question = partial(ask, fabric.addresses.gateways, Query(id=1, what="hosts"))
        return any(
            told.resident and short_name(told.name) == model and said.url == fabric.engine_urls[engine]
            for host in fabric.call(question).hosts
            for said in host.engines
            for told in said.models
        )

    fabric.until(known, f"the broker knows that engine {engine} has {model} in memory")


# Where a request goes -------------------------------------------------------------------------------------------------


async def test_what_is_loaded_somewhere_is_not_loaded_elsewhere_for_light_work(tmp_path: Path) -> None:
    engine = Settings(slots=2, load_s=0.5, tokens_per_s=500)
    with started(tmp_path, engine, engine) as fabric:
        load(fabric, 1, "llama2")
        async with stage(fabric) as scene:
            ended = [*itertools.chain.from_iterable([await results(scene.ask(f"r{n}")) for n in range(8)])]
            ended += await results(scene.ask("x"), scene.ask("y"))
        assert {result.host for result in ended} == {"worker-2"}
        assert fabric.models(0) == {}
        assert fabric.models(1)["llama2"]["loads"] == 1


async def test_a_busy_model_is_never_evicted(tmp_path: Path) -> None:
    """Memory for one of two models, as the operator says. The second waits for the first."""
    engine = Settings(
        slots=2,
        tokens_per_s=100,
        load_s=0.1,
        models=("one", "two"),
        sizes_bytes={"one:latest": 4 * GB, "two:latest": 5 * GB},
        memory_bytes=8 * GB,
    )
    with started(tmp_path, engine) as fabric:
        async with stage(fabric) as scene:
            first = scene.ask("one-1", model="one", tokens=100)
            await scene.heard("stream_start", "one-1")
            second = scene.ask("two-1", model="two")
            await scene.heard("queued", "two-1")
            third = scene.ask("one-2", model="one", tokens=20)
            await results(first, second, third)
            assert scene.order("stream_start")[-1] == "two-1"
            assert scene.order("stream_end")[-1] == "two-1"
        assert {name: counts["evicted_busy"] for name, counts in fabric.models(0).items()} == {"one": 0, "two": 0}
        assert {name: counts["loads"] for name, counts in fabric.models(0).items()} == {"one": 1, "two": 1}


async def test_what_an_engine_holds_is_learnt_where_nobody_says_it(tmp_path: Path) -> None:
    """One model at a time. The first try makes a busy one leave, perhaps another before that was seen; no more do."""
    engine = Settings(slots=1, tokens_per_s=100, models=("one", "two"), loaded_max=1)
    with started(tmp_path, engine) as fabric:
        async with stage(fabric) as scene:
            for turn in range(4):
                first = scene.ask(f"one-{turn}", model="one", tokens=40)
                await scene.heard("stream_start", f"one-{turn}")
                await results(first, scene.ask(f"two-{turn}", model="two", tokens=40))
        assert sum(counts["evicted_busy"] for counts in fabric.models(0).values()) <= 2


async def test_a_large_model_goes_where_it_fits(tmp_path: Path) -> None:
    """Both hosts have it on disk; the smaller one could run it only in part on its GPU."""
    small = Settings(
        slots=1, tokens_per_s=200, models=("big",), sizes_bytes={"big:latest": 10 * GB}, memory_bytes=6 * GB
    )
    large = replace(small, memory_bytes=24 * GB)
    with started(tmp_path, small, large) as fabric:
        async with stage(fabric) as scene:
            ended = await results(*(scene.ask(f"r{n}", model="big") for n in range(4)))
        assert {result.host for result in ended} == {"worker-2"}
        assert fabric.models(0) == {}


async def test_a_model_goes_where_the_rules_say(tmp_path: Path) -> None:
    engine = Settings(slots=1, tokens_per_s=200)
    with started(
        tmp_path,
        engine,
        engine,
        engine,
        clients=("a", "guest"),
        workers=[{"labels": ("gpu=small",)}, {"labels": ("gpu=big",)}, {"labels": ("gpu=big",)}],
        broker_settings={"settle_s": 0.0, "rules": ("model=llama2 on gpu=big", "client=guest not host=worker-3")},
    ) as fabric:
        for index in (1, 2):
            load(fabric, index, "llama2")
        async with stage(fabric) as scene:
            mine = [scene.ask(f"a-{n}") for n in range(6)]
            guests = [scene.ask(f"g-{n}", client="guest") for n in range(3)]
            others = [scene.ask(f"o-{n}", model="simulated", client="guest") for n in range(3)]
            assert {result.host for result in await results(*mine)} == {"worker-2", "worker-3"}
            assert {result.host for result in await results(*guests)} == {"worker-2"}
            assert {result.host for result in await results(*others)} <= {"worker-1", "worker-2"}
        assert "llama2" not in fabric.models(0)


async def test_clients_that_differ_in_num_ctx_reload_nothing_where_the_gateway_settles_it(tmp_path: Path) -> None:
    engine = Settings(slots=2, tokens_per_s=500, load_s=0.05)
    with started(tmp_path, engine, gateway_settings={"num_ctx": ("llama2:*=4096",)}) as fabric:
        async with stage(fabric) as scene:
            await results(*(scene.ask(f"r{n}", options={"num_ctx": 1024 * (1 + n % 4)}) for n in range(12)))
            # The control: of a model without such a policy, each context length is a load.
            for n in (1, 2):
                await results(scene.ask(f"s{n}", model="simulated", options={"num_ctx": 1024 * n}))
        assert fabric.models(0)["llama2"]["loads"] == 1
        assert fabric.models(0)["simulated"]["loads"] == 2


async def test_a_conversation_goes_on_where_it_began(tmp_path: Path) -> None:
    """Two hosts are warm; by what they say of their prompts, nothing is read twice."""
    engine = Settings(slots=2, tokens_per_s=500, prefill_tokens_per_s=10_000, cache_prompts=8)
    with started(tmp_path, engine, engine) as fabric:
        for index in (0, 1):
            load(fabric, index, "llama2")

        async def turn(client: httpx.AsyncClient, messages: list[Message]) -> Message:
            """Say the next thing; the engine's own last word."""
            body = {"model": "llama2", "messages": messages, "stream": False, "options": {"num_predict": 20}}
            answer: Message = (await client.post("/api/chat", json=body)).raise_for_status().json()
            messages += [answer["message"], {"role": "user", "content": "and then?"}]
            return answer

        talks: list[list[Message]] = [
            [
                {"role": "system", "content": " ".join(f"s{talk}-{word}" for word in range(1000))},
                {"role": "user", "content": "What now?"},
            ]
            for talk in range(4)
        ]
        whole_ns = 100_000_000
        async with httpx.AsyncClient(base_url=fabric.http_url, trust_env=False, timeout=30) as client:
            answers = await asyncio.gather(*(turn(client, talk) for talk in talks))
            assert all(answer["prompt_eval_duration"] > whole_ns for answer in answers)
            assert {counts["served"] for index in (0, 1) for counts in fabric.models(index).values()} == {3}, (
                "two talks on each, beside what loaded the model"
            )
            later = [
                answer
                for order in ((0, 1, 2, 3), (3, 1, 0, 2), (2, 3, 1, 0))
                for answer in await asyncio.gather(*(turn(client, talks[talk]) for talk in order))
            ]
        hits = [answer for answer in later if answer["prompt_eval_duration"] < whole_ns / 10]
        assert len(hits) == len(later) == 12


async def test_the_faster_host_gets_more(tmp_path: Path) -> None:
    """Nobody says which it is; one request of each tells."""
    fast, slow = Settings(slots=2, tokens_per_s=400), Settings(slots=2, tokens_per_s=40)
    with started(tmp_path, slow, fast) as fabric:
        for index in (0, 1):
            load(fabric, index, "llama2")
        async with stage(fabric) as scene:
            await results(*(scene.ask(f"first-{n}", tokens=40) for n in range(4)))
            alone = [(await results(scene.ask(f"alone-{n}", tokens=40)))[0].host for n in range(5)]
            assert alone == ["worker-2"] * 5
            hosts = Counter(
                result.host for result in await results(*(scene.ask(f"r{n}", tokens=40) for n in range(30)))
            )
        assert hosts["worker-2"] > 3 * hosts["worker-1"]


# In which order -------------------------------------------------------------------------------------------------------


async def test_a_flood_of_one_client_does_not_keep_the_others_waiting(tmp_path: Path) -> None:
    engine = Settings(slots=2, tokens_per_s=500)
    with started(tmp_path, engine, clients=("flood", "b", "c")) as fabric:
        async with stage(fabric) as scene:
            flood = [scene.ask(f"flood-{n}", client="flood") for n in range(80)]
            await scene.heard("queued", "flood-79")
            others = [scene.ask(f"{name}-{n}", client=name) for n in range(10) for name in "bc"]
            await results(*others)
            before = Counter(ref.partition("-")[0] for ref in scene.order("stream_end"))
            assert before["b"] == before["c"] == 10
            assert before["flood"] < 45, "what it had before the others came, and as much as each of them since"
            await results(*flood)


async def test_a_weight_of_two_is_twice_as_much(tmp_path: Path) -> None:
    engine = Settings(slots=1, tokens_per_s=1000)
    limits = {"gate": {}, "heavy": {"weight": 2.0}, "light": {}}
    with started(tmp_path, engine, clients=limits) as fabric:
        async with stage(fabric) as scene:
            gate = scene.ask("gate", client="gate", tokens=500)
            await scene.heard("stream_start", "gate")
            asked = [scene.ask(f"{name}-{n}", client=name) for n in range(40) for name in ("heavy", "light")]
            await scene.heard("queued", "heavy-39", "light-39")
            await results(gate, *asked)
            served = [ref.partition("-")[0] for ref in scene.order("stream_end") if ref != "gate"]
        first = Counter(served[:45])
        assert 1.5 <= first["heavy"] / first["light"] <= 2.5, first


async def test_no_more_of_a_clients_requests_run_than_it_may(tmp_path: Path) -> None:
    engine = Settings(slots=4, tokens_per_s=200)
    with started(tmp_path, engine, clients={"bound": {"running_max": 1}, "free": {}}) as fabric:
        async with stage(fabric) as scene:
            bound = [scene.ask(f"bound-{n}", client="bound") for n in range(5)]
            free = [scene.ask(f"free-{n}", client="free", tokens=40) for n in range(3)]
            await results(*bound, *free)
            story = [m["type"] for m in scene.told if m["type"] != "queued" and m["id"].startswith("bound")]
            assert story == ["stream_start", "stream_end"] * 5
            others = [m["type"] for m in scene.told if m["type"] != "queued" and m["id"].startswith("free")]
            assert others == ["stream_start"] * 3 + ["stream_end"] * 3


async def test_the_urgent_overtake_the_normal_and_those_a_batch(tmp_path: Path) -> None:
    """Whoever asks; what runs already is not disturbed."""
    engine = Settings(slots=1, tokens_per_s=200)
    with started(tmp_path, engine, clients=("a", "b")) as fabric:
        async with stage(fabric) as scene:
            gate = scene.ask("gate", tokens=100, priority="batch")
            await scene.heard("stream_start", "gate")
            asked = [gate]
            for priority in ("batch", "normal", "interactive"):
                refs = [f"{priority}-{client}" for client in "ab"]
                asked += [scene.ask(ref, client=ref[-1], priority=priority) for ref in refs]
                await scene.heard("queued", *refs)
            await results(*asked)
            order = [ref.partition("-")[0] for ref in scene.order("stream_start")]
            assert order == ["gate"] + ["interactive"] * 2 + ["normal"] * 2 + ["batch"] * 2


async def test_a_deadline_that_cannot_be_met_costs_nobody_anything(tmp_path: Path) -> None:
    """How fast a host reads is known from one request: a prompt that takes longer than its deadline is not begun."""
    engine = Settings(slots=1, tokens_per_s=500, prefill_tokens_per_s=1000)
    with started(tmp_path, engine) as fabric:
        async with stage(fabric) as scene:
            await results(scene.ask("first", prompt="word " * 300))
            late, fine = (
                scene.ask("late", prompt="news " * 6000, deadline_ms=3000),
                scene.ask("fine", deadline_ms=30_000),
            )
            await results(fine)
            outcome = await late
            assert isinstance(outcome, DeadlineExceededError)
            assert "cannot be met" in str(outcome)
        assert fabric.models(0)["llama2"]["served"] == 2


async def test_who_waits_is_told_where_it_stands_and_how_long(tmp_path: Path) -> None:
    engine = Settings(slots=1, tokens_per_s=100)
    with started(tmp_path, engine) as fabric:
        async with stage(fabric) as scene:
            await results(scene.ask("first", tokens=60))  # from now on it is known how long such a request takes
            refs = [f"r{n}" for n in range(8)]
            asked = [scene.ask(ref, tokens=60) for ref in refs]
            await scene.heard("queued", *refs[1:])
            async with httpx.AsyncClient(trust_env=False) as client:
                metrics = (await client.get(f"{fabric.http_url}/metrics")).text
            assert "weftline_streams_waiting 7.0" in metrics
            await results(*asked)
            assert scene.order("stream_start") == ["first", *refs]
            for place, ref in enumerate(refs[1:], 1):
                told = scene.all_told("queued", ref)
                positions = [message["position"] for message in told]
                etas = [message["etaMs"] for message in told]
                assert positions[0] == place
                assert positions == sorted(positions, reverse=True)
                assert etas == sorted(etas, reverse=True)
            assert len(scene.all_told("queued", refs[-1])) >= 2
            first_etas = [scene.all_told("queued", ref)[0]["etaMs"] for ref in refs[1:]]
            assert first_etas == sorted(first_etas)


# Processes ------------------------------------------------------------------------------------------------------------


def test_processes_that_differ_as_their_flags_say(tmp_path: Path) -> None:
    """Labels, rules, memory and speed by the command line; what operators see of it."""

    def generate(model: str, prompt: str, tokens: int = 10) -> None:
        body = {"model": model, "prompt": prompt, "stream": False, "options": {"num_predict": tokens}}
        httpx.post(f"{url}/api/generate", json=body, trust_env=False, timeout=30).raise_for_status()

    def counts(engine: str) -> dict[str, dict[str, int]]:
        models: dict[str, dict[str, int]] = httpx.get(f"{engine}/debug/slots", trust_env=False).json()["models"]
        return models

    config = tmp_path / "weftline.toml"
    config.write_text(
        f"""
        [broker]
        rules = ["model=private on site=home"]
        [gateway]
        anonymous = true
        data_dir = "{tmp_path}"
        [worker]
        data_dir = "{tmp_path}"
        """
    )
    models = [word for name in ("large=5GB", "middle=4GB", "private=1GB") for word in ("--sim-model", name)]
    with contextlib.ExitStack() as stack:

        def start(module: str, *arguments: str) -> Process:
            return stack.enter_context(running(module, *arguments))

        flags = (
            "--simulated",
            *models,
            "--slots",
            "2",
            "--listen",
            "127.0.0.1:0",
            "--load-s",
            "0.1",
            "--slowdown",
            "0.1",
        )
        engines = [
            start("workers.embedded", *flags, "--memory", "8GB", "--tokens-per-s", "50"),
            start("workers.embedded", *flags, "--memory", "16GB", "--load-rate", "50GB", "--tokens-per-s", "500"),
        ]
        broker = start(
            "broker", "--gateways", "tcp://127.0.0.1:*", "--workers", "tcp://127.0.0.1:*", "--config", str(config)
        )
        addresses = broker.find(r"gateways=(\S+) workers=(\S+)")
        gateway = start(
            *("gateway", "--broker", addresses[1], "--listen", "127.0.0.1:0", "--config", str(config)),
        )
        url = gateway.find(r"listening url=(\S+)")[1].replace("ws://", "http://")
        urls = [engine.find(r"engine listening on (\S+)")[1] for engine in engines]
        for name, engine, memory, site in (("home", urls[0], "8GB", "home"), ("away", urls[1], "16GB", "away")):
            worker = start(
                *("workers", "--broker", addresses[2], "--name", name, "--label", f"site={site}"),
                *("--ollama", f"{engine},slots=2,memory={memory}", "--config", str(config)),
            )
            worker.find("registered")
        for n in range(3):
            generate("private", f"p{n}")
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda n: generate(("large", "middle")[n % 2], f"q{n}", 20), range(16)))
        assert counts(urls[0])["private:latest"]["served"] == 3
        assert "private:latest" not in counts(urls[1])
        assert not any(model["evicted_busy"] for engine in urls for model in counts(engine).values())
        hosts = json.loads(
            subprocess.run(
                [sys.executable, "-m", "cli.main", "hosts", "--broker", addresses[1], "--json"],
                capture_output=True,
                text=True,
                timeout=30,
                cwd=ROOT,
                check=True,
            ).stdout
        )
        assert [(host["name"], host["labels"], host["engines"][0]["memoryBytes"]) for host in hosts] == [
            ("away", ["site=away"], 16 * GB),
            ("home", ["site=home"], 8 * GB),
        ]
