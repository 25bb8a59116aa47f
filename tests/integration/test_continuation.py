"""A stream that was cut goes on on another engine: real servers, simulated words and real inference."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
from msgspec import json

from workers.continuation import RAW_PATH, Continuation
from workers.embedded.llama import LlamaBackend
from workers.embedded.server import running
from workers.embedded.simulated import Settings, SimulatedBackend, transcript

GENERATE, CHAT = "/api/generate", "/api/chat"
TOKENS = 40
JOBS = pytest.mark.parametrize(
    ("path", "prompt", "job"),
    [
        (GENERATE, "Why?", {"prompt": "Why?"}),
        (GENERATE, "Why?", {"prompt": "Why?", "raw": True}),
        (GENERATE, "Be brief.\n\nWhy?", {"prompt": "Why?", "system": "Be brief."}),
        (CHAT, "Why?", {"messages": [{"role": "user", "content": "Why?"}]}),
        (
            CHAT,
            "Why?\n\nBecause",
            {"messages": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because"}]},
        ),
    ],
)


@contextlib.asynccontextmanager
async def simulated(**settings: Any) -> AsyncIterator[httpx.AsyncClient]:
    backend = SimulatedBackend(Settings(answer_tokens=TOKENS, **settings))
    async with running(backend) as url, httpx.AsyncClient(base_url=url, trust_env=False, timeout=20) as client:
        yield client


async def stream(client: httpx.AsyncClient, path: str, body: bytes) -> list[bytes]:
    """The lines of an answer, as far as it came."""
    data = b""
    async with client.stream("POST", path, content=body) as response:
        assert response.status_code == 200
        with contextlib.suppress(httpx.RemoteProtocolError):
            async for piece in response.aiter_raw():
                data += piece
    return data.splitlines(keepends=True)


async def go_on(client: httpx.AsyncClient, path: str, body: bytes, events: Sequence[bytes]) -> list[bytes]:
    """The lines that a worker adds to `events` with the help of its engine, as far as that goes."""
    continuation = Continuation.plan(path, body, events)
    rendering = b""
    if continuation.render is not None:
        response = await client.post(path, content=continuation.render)
        assert response.status_code == 200
        rendering = response.content
    request = continuation.request(rendering)
    if request is None:
        return [continuation.ending()]
    dressed = b""
    async with client.stream("POST", RAW_PATH, content=request) as response:
        assert response.status_code == 200
        with contextlib.suppress(httpx.RemoteProtocolError):
            async for piece in response.aiter_raw():
                dressed += continuation.dress(piece[:17]) + continuation.dress(piece[17:])
                if continuation.done:
                    break
            else:
                dressed += continuation.eof()
    return dressed.splitlines(keepends=True)


def text_of(path: str, lines: Sequence[bytes]) -> str:
    decoded = [json.decode(line) for line in lines]
    return "".join(line["message"]["content"] if path == CHAT else line["response"] for line in decoded)


@JOBS
@pytest.mark.parametrize("options", [{"seed": 3}, {"seed": 3, "num_predict": TOKENS}])
async def test_wherever_it_is_cut_the_stream_is_the_transcript(
    path: str, prompt: str, job: dict[str, Any], options: dict[str, Any]
) -> None:
    body = json.encode({"model": "simulated", "options": options, **job})
    async with simulated() as first, simulated(slots=TOKENS + 1) as other:
        whole = await stream(first, path, body)
        assert text_of(path, whole) == transcript(prompt, 3, TOKENS)
        final = json.decode(whole[-1])
        async with asyncio.TaskGroup() as group:
            rests = [group.create_task(go_on(other, path, body, whole[:cut])) for cut in range(TOKENS + 1)]
        for cut, task in enumerate(rests):
            rest = task.result()
            assert text_of(path, whole[:cut] + rest) == transcript(prompt, 3, TOKENS)
            shapes = [json.decode(line).keys() for line in rest[:-1]]
            assert shapes == [json.decode(line).keys() for line in whole[cut:-1]]
            last = json.decode(rest[-1])
            assert (last["done"], last["done_reason"]) == (True, final["done_reason"])
            assert last["eval_count"] == final["eval_count"] == TOKENS
            assert last.get("prompt_eval_count", final["prompt_eval_count"]) == final["prompt_eval_count"]


@JOBS
async def test_hosts_that_die_one_after_the_other_leave_one_stream(path: str, prompt: str, job: dict[str, Any]) -> None:
    body = json.encode({"model": "simulated", "options": {"num_predict": TOKENS}, **job})
    events: list[bytes] = []
    for kind, after in (("die_mid", 7), ("truncate", 0), ("die_mid", 20), ("truncate", 5)):
        async with simulated() as client:
            await client.post("/debug/faults", json={"kind": kind, "after": after})
            events += await (go_on(client, path, body, events) if events else stream(client, path, body))
    assert text_of(path, events) == transcript(prompt, 0, 32)
    async with simulated() as client:
        events += await go_on(client, path, body, events)
    assert text_of(path, events) == transcript(prompt, 0, TOKENS)
    assert json.decode(events[-1])["eval_count"] == TOKENS


async def test_a_stop_string_across_the_seam_closes_the_engines_stream() -> None:
    whole = transcript("Why?", 0, TOKENS)
    words = whole.split()
    stop = f"{words[9][-2:]} {words[10]} {words[11][:1]}"
    body = json.encode({"model": "simulated", "prompt": "Why?", "options": {"stop": [stop]}})
    # An engine that does not hold the beginning of a stop string back delivered ten words.
    events = [json.encode({"response": f" {word}", "done": False}) + b"\n" for word in words[:10]]
    async with simulated(tokens_per_s=100.0) as client:
        (last,) = [json.decode(line) for line in await go_on(client, GENERATE, body, events)]
        assert (last["response"], last["done_reason"], last["eval_count"]) == ("", "stop", 12)
        async with asyncio.timeout(10):
            while (await client.get("/debug/slots")).json()["models"]["simulated:latest"]["busy"]:  # noqa: ASYNC110
                await asyncio.sleep(0.002)


@pytest.mark.engine
async def test_real_inference_goes_on_with_the_same_words() -> None:
    model = Path(__file__).parents[1] / "data" / "models" / "wordnet-tiny-1m.Q8_0.gguf"
    options = {"temperature": 0, "seed": 1, "num_predict": 30}
    jobs: list[tuple[str, dict[str, Any]]] = [
        (GENERATE, {"prompt": "dog"}),
        (GENERATE, {"prompt": "<|user|>music<|assistant|>", "raw": True}),
        (CHAT, {"messages": [{"role": "user", "content": "tree"}], "logprobs": True}),
    ]
    backend = await LlamaBackend.open({"tiny": model}, slots=1)
    async with running(backend) as url, httpx.AsyncClient(base_url=url, trust_env=False, timeout=60) as client:
        for path, job in jobs:
            body = json.encode({"model": "tiny", "options": options, **job})
            whole = await stream(client, path, body)
            final = json.decode(whole[-1])
            for cut in range(1, len(whole), 3):
                rest = await go_on(client, path, body, whole[:cut])
                assert text_of(path, whole[:cut] + rest) == text_of(path, whole)
                assert json.decode(rest[-1])["done_reason"] == final["done_reason"]
                if path == CHAT and len(rest) > 1:
                    assert "logprobs" in json.decode(rest[0])
