"""The HTTP surface, over the simulated backend, through real sockets."""

import asyncio
import contextlib
import json
import math
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from workers.embedded.server import running
from workers.embedded.simulated import Settings, SimulatedBackend, transcript


@contextlib.asynccontextmanager
async def engine(**settings: Any) -> AsyncIterator[httpx.AsyncClient]:
    backend = SimulatedBackend(Settings(**settings))
    async with running(backend) as url, httpx.AsyncClient(base_url=url, trust_env=False, timeout=20) as client:
        yield client


async def lines(client: httpx.AsyncClient, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    async with client.stream("POST", path, json=body) as response:
        assert response.status_code == 200
        assert response.headers["content-type"] == "application/x-ndjson"
        return [json.loads(line) async for line in response.aiter_lines()]


async def slots(client: httpx.AsyncClient, model: str = "simulated:latest") -> dict[str, Any]:
    models: dict[str, dict[str, Any]] = (await client.get("/debug/slots")).json()["models"]
    return models.get(model, {})


async def until_slots(client: httpx.AsyncClient, **wanted: int) -> None:
    """Ask until the slots are as wanted: what happens inside the engine has no other voice."""
    async with asyncio.timeout(10):
        while not wanted.items() <= (await slots(client)).items():  # noqa: ASYNC110
            await asyncio.sleep(0.002)


@contextlib.asynccontextmanager
async def stream(client: httpx.AsyncClient, prompt: str = "hang") -> AsyncIterator[AsyncIterator[str]]:
    body = {"model": "simulated", "prompt": prompt}
    async with client.stream("POST", "/api/generate", json=body) as response:
        yield response.aiter_lines()


async def test_a_stream_is_the_transcript_line_by_line() -> None:
    async with engine() as client:
        body = {"model": "simulated", "prompt": "Why?", "options": {"seed": 3, "num_predict": 5}}
        *chunks, final = await lines(client, "/api/generate", body)
        assert [chunk["response"] for chunk in chunks] == [f" {word}" for word in transcript("Why?", 3, 5).split()]
        assert all(list(chunk) == ["model", "created_at", "response", "done"] for chunk in chunks)
        assert not any(chunk["done"] for chunk in chunks)
        assert (final["response"], final["done"], final["done_reason"]) == ("", True, "length")
        assert (final["prompt_eval_count"], final["eval_count"]) == (1, 5)
        assert final["total_duration"] >= final["eval_duration"] > 0


async def test_a_chat_in_one_document() -> None:
    async with engine(answer_tokens=4) as client:
        body = {"model": "simulated", "messages": [{"role": "user", "content": "Why?"}], "stream": False}
        response = await client.post("/api/chat", json=body)
        assert response.headers["content-type"] == "application/json; charset=utf-8"
        answer = response.json()
        assert answer["message"] == {"role": "assistant", "content": transcript("Why?", 0, 4)}
        assert (answer["done"], answer["done_reason"]) == (True, "stop")


async def test_a_broken_stream_goes_on_from_its_rendered_prompt_and_text() -> None:
    async with engine(answer_tokens=10) as client, engine(answer_tokens=10) as other:
        chat = {"model": "simulated", "messages": [{"role": "user", "content": "Tell me."}]}
        rendered = await client.post("/api/chat", json=chat | {"_debug_render_only": True})
        prompt = rendered.json()["_debug_info"]["rendered_template"]
        whole = [chunk["message"]["content"] for chunk in await lines(client, "/api/chat", chat)]
        begun = "".join(whole[:4])
        rest = await lines(other, "/api/generate", {"model": "simulated", "prompt": prompt + begun, "raw": True})
        assert begun + "".join(chunk["response"] for chunk in rest) == "".join(whole)
        assert rest[-1]["done_reason"] == "stop"


async def test_a_stop_string_ends_the_answer_before_it() -> None:
    async with engine() as client:
        whole = transcript("Why?", 0, 20)
        stop = whole[33:37]
        chunks = await lines(
            client, "/api/generate", {"model": "llama2", "prompt": "Why?", "options": {"stop": [stop]}}
        )
        assert "".join(chunk["response"] for chunk in chunks) == whole[: whole.find(stop)]
        assert chunks[-1]["done_reason"] == "stop"


async def test_the_engine_says_what_it_is_and_has() -> None:
    async with engine(models=["one", "two:7b"]) as client:
        home = await client.get("/")
        assert (home.status_code, home.text) == (200, "Ollama is running")
        for path in ("/", "/api/tags", "/api/version"):
            assert (await client.head(path)).status_code == 200
        assert (await client.get("/api/version")).json()["engine"] == "weftline simulated"
        tags = (await client.get("/api/tags")).json()["models"]
        assert [tag["name"] for tag in tags] == ["one:latest", "two:7b", "simulated-embed:latest"]
        assert tags[0].keys() == {"name", "model", "modified_at", "size", "digest", "details"}
        shown = (await client.post("/api/show", json={"model": "two:7b"})).json()
        assert shown["capabilities"] == ["completion"]
        assert shown["details"] == tags[1]["details"]


@pytest.mark.parametrize(
    ("path", "body", "status", "error"),
    [
        ("/api/generate", {"model": "x"}, 404, "model 'x' not found"),
        ("/api/generate", {"model": ""}, 404, "model '' not found"),
        ("/api/generate", {"model": "a b"}, 400, "invalid model name"),
        ("/api/chat", {"model": "x"}, 404, "model 'x' not found"),
        ("/api/chat", {"model": ""}, 400, "model is required"),
        ("/api/embed", {"model": "x"}, 404, 'model "x" not found, try pulling it first'),
        ("/api/embed", {"model": ""}, 404, "model '' not found"),
        ("/api/embeddings", {"model": ""}, 400, "model is required"),
        ("/api/show", {"model": "x"}, 404, "model 'x' not found"),
        ("/api/show", {}, 400, "model is required"),
        (
            "/api/generate",
            {"model": "simulated", "prompt": "x", "think": True},
            400,
            '"simulated" does not support thinking',
        ),
        (
            "/api/generate",
            {"model": "simulated-embed", "prompt": "x"},
            400,
            '"simulated-embed" does not support generate',
        ),
        ("/api/chat", {"model": "simulated-embed", "messages": []}, 400, '"simulated-embed" does not support chat'),
        (
            "/api/generate",
            {"model": "simulated", "prompt": "x", "suffix": "y"},
            400,
            "registry.ollama.ai/library/simulated:latest does not support insert",
        ),
        (
            "/api/generate",
            {"model": "simulated", "prompt": "x", "raw": True, "system": "s"},
            400,
            "raw mode does not support template, system, or context",
        ),
        (
            "/api/generate",
            {"model": "simulated", "prompt": "x", "options": {"top_k": "a"}},
            500,
            'option "top_k" must be of type integer',
        ),
    ],
)
async def test_errors_are_ollamas(path: str, body: dict[str, Any], status: int, error: str) -> None:
    async with engine() as client:
        response = await client.post(path, json=body)
        assert (response.status_code, response.json()) == (status, {"error": error})
        assert response.headers["content-type"] == "application/json; charset=utf-8"


async def test_unknown_routes_and_wrong_methods() -> None:
    async with engine() as client:
        missing, wrong = await client.get("/api/nope"), await client.get("/api/generate")
        assert (missing.status_code, missing.text) == (404, "404 page not found")
        assert (wrong.status_code, wrong.text, wrong.headers["allow"]) == (405, "405 method not allowed", "POST")


async def test_empty_requests_load_and_unload() -> None:
    async with engine() as client:
        loaded = (await client.post("/api/generate", json={"model": "simulated"})).json()
        assert (loaded["response"], loaded["done"], loaded["done_reason"]) == ("", True, "load")
        (resident,) = (await client.get("/api/ps")).json()["models"]
        assert (resident["name"], resident["context_length"], resident["size_vram"]) == ("simulated:latest", 4096, 0)
        gone = (await client.post("/api/chat", json={"model": "simulated", "keep_alive": 0})).json()
        assert (gone["message"], gone["done_reason"]) == ({"role": "assistant", "content": ""}, "unload")
        assert (await client.get("/api/ps")).json() == {"models": []}


async def test_embeddings_have_length_one() -> None:
    async with engine(embedding_size=8) as client:
        body = {"model": "simulated-embed", "input": ["a b", "c"], "dimensions": 5}
        answer = (await client.post("/api/embed", json=body)).json()
        assert [len(vector) for vector in answer["embeddings"]] == [5, 5]
        assert all(math.isclose(math.hypot(*vector), 1) for vector in answer["embeddings"])
        assert answer["prompt_eval_count"] == 3
        empty = (await client.post("/api/embed", json={"model": "simulated-embed"})).json()
        assert empty == {"model": "simulated-embed", "embeddings": []}
        single = (await client.post("/api/embeddings", json={"model": "simulated-embed", "prompt": "a b"})).json()
        assert len(single["embedding"]) == 8


async def test_a_client_that_leaves_frees_its_slot_for_the_one_that_waits() -> None:
    async with engine(slots=1) as client:
        await client.post("/debug/faults", json={"kind": "hang", "after": 2})
        async with stream(client) as hanging:
            assert json.loads(await anext(hanging))["response"]
            async with asyncio.TaskGroup() as group:
                waiting = group.create_task(lines(client, "/api/generate", {"model": "simulated", "prompt": "next"}))
                await until_slots(client, busy=1, waiting=1)
                await hanging.aclose()  # type: ignore[attr-defined]
                assert (await waiting)[-1]["done"]
        await until_slots(client, busy=0, waiting=0, served=2)


async def test_no_more_requests_run_than_there_are_slots() -> None:
    async with engine(slots=2) as client, contextlib.AsyncExitStack() as stack:
        await client.post("/debug/faults", json={"kind": "hang", "after": 1, "count": 2})
        hanging = [await stack.enter_async_context(stream(client)) for _ in range(2)]
        for each in hanging:
            await anext(each)
        async with asyncio.TaskGroup() as group:
            waiting = group.create_task(lines(client, "/api/generate", {"model": "simulated", "prompt": "next"}))
            await until_slots(client, busy=2, waiting=1)
            waiting.cancel()
            await until_slots(client, busy=2, waiting=0)


async def test_a_client_that_leaves_during_a_load_aborts_it() -> None:
    async with engine(load_s=3600) as client:
        async with asyncio.TaskGroup() as group:
            loading = group.create_task(client.post("/api/generate", json={"model": "simulated"}))
            await until_slots(client, waiting=1)
            loading.cancel()
            await until_slots(client, waiting=0)
        assert not (await slots(client))["loaded"]


async def test_stopping_the_engine_cuts_running_streams() -> None:
    async with contextlib.AsyncExitStack() as stack:
        async with engine() as client:
            await client.post("/debug/faults", json={"kind": "hang", "after": 1})
            url = client.base_url
            other = await stack.enter_async_context(httpx.AsyncClient(base_url=url, trust_env=False, timeout=20))
            hanging = await stack.enter_async_context(stream(other))
            await anext(hanging)
        with pytest.raises(httpx.RemoteProtocolError):
            await anext(hanging)


# -- faults ----------------------------------------------------------------------------------------------------------


async def inject(client: httpx.AsyncClient, **fault: Any) -> None:
    assert (await client.post("/debug/faults", json=fault)).status_code == 200


async def test_fault_truncate_ends_the_body_without_its_last_line() -> None:
    async with engine() as client:
        await inject(client, kind="truncate", after=3)
        chunks = await lines(client, "/api/generate", {"model": "simulated", "prompt": "x"})
        assert "".join(chunk["response"] for chunk in chunks) == transcript("x", 0, 3)
        assert not any(chunk["done"] for chunk in chunks)


async def test_fault_die_mid_closes_the_connection() -> None:
    async with engine() as client:
        await inject(client, kind="die_mid", after=3)
        async with stream(client) as broken:
            assert [json.loads(await anext(broken))["done"] for _ in range(3)] == [False] * 3
            with pytest.raises(httpx.RemoteProtocolError):
                await anext(broken)


async def test_fault_error_line_comes_after_the_tokens() -> None:
    async with engine() as client:
        await inject(client, kind="error_line", after=2)
        *chunks, error = await lines(client, "/api/generate", {"model": "simulated", "prompt": "x"})
        assert len(chunks) == 2
        assert error == {"error": "injected fault"}


@pytest.mark.parametrize(
    ("kind", "status", "error"),
    [
        ("http_500", 500, "injected fault"),
        ("http_503", 503, "server busy, please try again.  maximum pending requests exceeded"),
    ],
)
async def test_fault_http_refuses_as_often_as_asked(kind: str, status: int, error: str) -> None:
    async with engine() as client:
        await inject(client, kind=kind, count=2, model="simulated")
        body = {"model": "simulated", "prompt": "x", "stream": False}
        assert (await client.post("/api/generate", json=body | {"model": "llama2"})).status_code == 200
        for _ in range(2):
            response = await client.post("/api/generate", json=body)
            assert (response.status_code, response.json()) == (status, {"error": error})
        assert (await client.post("/api/generate", json=body)).status_code == 200


async def test_fault_slow_first_only_delays() -> None:
    async with engine() as client:
        await inject(client, kind="slow_first", delay_s=0.05)
        answer = await lines(client, "/api/generate", {"model": "simulated", "prompt": "x"})
        assert answer[-1]["prompt_eval_duration"] >= 50_000_000


async def test_what_is_no_fault_is_refused() -> None:
    async with engine() as client:
        for fault in ({}, {"kind": "zork"}, {"kind": "hang", "afer": 1}, {"kind": "hang", "model": "a b"}):
            assert (await client.post("/debug/faults", json=fault)).status_code == 400


async def test_pace() -> None:
    async with engine(tokens_per_s=200, first_token_s=0.05, answer_tokens=21) as client:
        final = (await lines(client, "/api/generate", {"model": "simulated", "prompt": "x"}))[-1]
        # Never early: the last of 21 tokens is due 20 intervals after the first.
        assert final["eval_duration"] >= 99_000_000
        assert final["prompt_eval_duration"] == 50_000_000


async def test_a_prompt_takes_its_time_to_read_but_not_what_was_read_before() -> None:
    """What the engine says of it, as far as that does not hang on this machine."""
    async with engine(prefill_tokens_per_s=1e5, answer_tokens=2) as client:
        prompt = "word " * 1000
        options = {"num_predict": 2}
        first = (await lines(client, "/api/generate", {"model": "llama2", "prompt": prompt, "options": options}))[-1]
        assert (first["prompt_eval_count"], first["prompt_eval_duration"]) == (1000, 10_000_000)
        more = {"model": "llama2", "prompt": prompt + "and more", "options": options}
        again = (await lines(client, "/api/generate", more))[-1]
        assert (again["prompt_eval_count"], again["prompt_eval_duration"]) == (1002, 20_000)
        elsewhere = (await lines(client, "/api/generate", more | {"model": "simulated"}))[-1]
        assert elsewhere["prompt_eval_duration"] == 10_020_000, "each model has a cache of its own"


async def test_larger_models_take_longer_to_load_and_push_others_out() -> None:
    sizes = {"small:latest": 10**8, "large:latest": 10**9}
    settings = {"models": ["small", "large"], "sizes_bytes": sizes, "memory_bytes": 10**9, "load_bytes_per_s": 1e10}
    async with engine(answer_tokens=1, **settings) as client:
        assert {entry["name"]: entry["size"] for entry in (await client.get("/api/tags")).json()["models"]}.items() >= (
            sizes.items()
        )
        for model, at_least_ns in (("small", 10**7), ("large", 10**8)):
            answer = await client.post("/api/generate", json={"model": model, "prompt": "x", "stream": False})
            assert answer.json()["load_duration"] >= at_least_ns
        assert [entry["name"] for entry in (await client.get("/api/ps")).json()["models"]] == ["large:latest"]
        assert (await slots(client, "small:latest"))["evicted"] == 1


async def test_streams_that_slow_each_other_down_all_come_to_their_end() -> None:
    async with engine(tokens_per_s=2000, slowdown=1.0) as client:
        body = {"model": "llama2", "prompt": "x", "options": {"num_predict": 50}}
        async with asyncio.TaskGroup() as group:
            asked = [group.create_task(lines(client, "/api/generate", body)) for _ in range(3)]
        for task in asked:
            assert "".join(line["response"] for line in task.result()) == transcript("x", 0, 50)
