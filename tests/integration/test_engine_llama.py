"""Real inference by llama.cpp with two tiny models, through real sockets and processes."""

import asyncio
import contextlib
import json
import math
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from workers.embedded.llama import LlamaBackend
from workers.embedded.server import running

MODELS = Path(__file__).parents[1] / "data" / "models"
FILES = {"tiny": MODELS / "wordnet-tiny-1m.Q8_0.gguf", "bert": MODELS / "tiny-bert.gguf"}
# The tiny model's own answers are a sentence long; an array of so many numbers keeps it at work.
ENDLESS = {"type": "array", "items": {"type": "integer"}, "minItems": 1500}

pytestmark = pytest.mark.engine


@contextlib.asynccontextmanager
async def engine(*, slots: int = 1) -> AsyncIterator[httpx.AsyncClient]:
    backend = await LlamaBackend.open(FILES, slots=slots)
    async with running(backend) as url, httpx.AsyncClient(base_url=url, trust_env=False, timeout=60) as client:
        yield client


async def ask(client: httpx.AsyncClient, path: str = "/api/generate", **body: Any) -> dict[str, Any]:
    response = await client.post(path, json={"model": "tiny", "stream": False} | body)
    assert response.status_code == 200, response.text
    return dict(response.json())


async def lines(client: httpx.AsyncClient, path: str = "/api/generate", **body: Any) -> list[dict[str, Any]]:
    async with client.stream("POST", path, json={"model": "tiny"} | body) as response:
        assert response.status_code == 200
        return [json.loads(line) async for line in response.aiter_lines()]


@pytest.fixture(autouse=True)
def _others() -> None:
    """Engines that other tests keep running are none of ours."""
    OTHERS.clear()
    OTHERS.update(child.pid for child in children())


OTHERS: set[int] = set()


def children() -> list[psutil.Process]:
    found = [child for child in psutil.Process().children() if child.pid not in OTHERS]
    return [child for child in found if "workers.embedded.llama_process" in child.cmdline()]


GREEDY = {"temperature": 0, "seed": 1}


async def test_a_stream_ends_with_all_counts_and_durations() -> None:
    async with engine() as client:
        *chunks, final = await lines(client, prompt="dog", options=GREEDY)
        text = "".join(chunk["response"] for chunk in chunks)
        assert len(text) > 10
        assert (final["done"], final["done_reason"]) == (True, "stop")
        assert final["eval_count"] >= len(chunks) > 3
        assert final["prompt_eval_count"] == 4
        for name in ("total_duration", "load_duration", "prompt_eval_duration", "eval_duration"):
            assert final[name] > 0
        assert len(final["context"]) >= final["prompt_eval_count"] + len(chunks)
        whole = await ask(client, prompt="dog", options=GREEDY)
        assert whole["response"] == text


async def test_a_seed_fixes_the_answer() -> None:
    async with engine() as client:
        options = {"temperature": 1.5, "num_predict": 20}
        answers = [
            (await ask(client, prompt="cat", options=options | {"seed": seed}))["response"] for seed in (5, 5, 6)
        ]
        assert answers[0] == answers[1] != answers[2]


async def test_num_predict_and_stop_end_the_answer() -> None:
    async with engine() as client:
        cut = await ask(client, prompt="dog", options=GREEDY | {"num_predict": 3})
        assert (cut["done_reason"], cut["eval_count"]) == ("length", 3)
        whole = (await ask(client, prompt="dog", options=GREEDY))["response"]
        stop = whole[6:9]
        stopped = await ask(client, prompt="dog", options=GREEDY | {"stop": [stop]})
        assert (stopped["done_reason"], stopped["response"]) == ("stop", whole[: whole.find(stop)])


async def test_a_chat_is_its_rendered_prompt_and_can_be_continued_raw() -> None:
    async with engine() as client:
        messages = [{"role": "user", "content": "Dog"}]
        rendered = await ask(client, "/api/chat", messages=messages, _debug_render_only=True)
        prompt = rendered["_debug_info"]["rendered_template"]
        assert prompt == "<|user|>dog<|assistant|>"
        *chunks, final = await lines(client, "/api/chat", messages=messages, options=GREEDY)
        pieces = [chunk["message"]["content"] for chunk in chunks]
        assert final["message"] == {"role": "assistant", "content": ""}
        assert "context" not in final
        begun = "".join(pieces[:4])
        rest = await ask(client, prompt=prompt + begun, raw=True, options=GREEDY)
        assert begun + rest["response"] == "".join(pieces)


async def test_json_and_schemas_constrain_the_answer() -> None:
    async with engine() as client:
        answer = await ask(client, prompt="dog", format={"enum": ["yes", "no"]})
        assert json.loads(answer["response"]) in ("yes", "no")
        assert (await ask(client, prompt="dog", format="json", options={"num_predict": 1}))["response"][0] == "{"


async def test_log_probabilities() -> None:
    async with engine() as client:
        first, *_ = await lines(
            client, prompt="dog", logprobs=True, top_logprobs=2, options=GREEDY | {"num_predict": 2}
        )
        (entry,) = first["logprobs"]
        assert entry["token"] == first["response"]
        assert entry["bytes"] == list(first["response"].encode())
        assert entry["top_logprobs"][0]["token"] == entry["token"]
        assert entry["logprob"] <= 0


async def test_openais_chat_is_the_engines_own() -> None:
    async with engine() as client:
        chat: dict[str, Any] = {"messages": [{"role": "user", "content": "Dog"}]}
        own = await ask(client, "/api/chat", **chat, options=GREEDY | {"top_p": 1.0})
        greedy = chat | GREEDY
        answer = await ask(client, "/v1/chat/completions", **greedy)
        assert answer["choices"][0]["message"] == own["message"]
        assert answer["usage"]["completion_tokens"] == own["eval_count"]
        rendered = await ask(client, "/v1/chat/completions", **chat, _debug_render_only=True)
        assert rendered["_debug_info"]["rendered_template"] == "<|user|>dog<|assistant|>"
        form = {"type": "json_schema", "json_schema": {"schema": {"enum": ["yes", "no"]}}}
        chosen = await ask(client, "/v1/chat/completions", **greedy, response_format=form)
        assert json.loads(chosen["choices"][0]["message"]["content"]) in ("yes", "no")
        told = await ask(client, "/v1/chat/completions", **greedy, logprobs=True, top_logprobs=2, max_tokens=2)
        content = told["choices"][0]["message"]["content"]
        entries = told["choices"][0]["logprobs"]["content"]
        assert "".join(entry["token"] for entry in entries) == content
        assert [len(entry["top_logprobs"]) for entry in entries] == [2, 2]
        body = {"model": "tiny", "stream": True, "logprobs": True, "max_tokens": 2} | greedy
        streamed = (await client.post("/v1/chat/completions", json=body)).text.split("\n\n")
        first = json.loads(streamed[0].removeprefix("data: "))["choices"][0]
        assert first["logprobs"]["content"][0]["token"] == first["delta"]["content"] == entries[0]["token"]


async def test_long_prompts_are_read_in_steps_and_too_long_ones_shortened() -> None:
    async with engine() as client:
        options = GREEDY | {"num_predict": 4}
        fits = await ask(client, prompt="cat " * 300, raw=True, options=options)
        assert 64 < fits["prompt_eval_count"] < 1024
        shortened = await ask(client, prompt="cat " * 3000, raw=True, options=options)
        assert shortened["prompt_eval_count"] == 512
        refused = await client.post("/api/generate", json={"model": "tiny", "prompt": "cat " * 3000, "truncate": False})
        assert (refused.status_code, refused.json()) == (400, {"error": "the input length exceeds the context length"})


async def test_an_old_turn_is_left_out_of_a_conversation_that_would_not_fit() -> None:
    async with engine() as client:
        turns = [{"role": "user", "content": "old " * 1200}, {"role": "user", "content": "new"}]
        rendered = await ask(client, "/api/chat", messages=turns, _debug_render_only=True)
        assert rendered["_debug_info"]["rendered_template"] == "<|user|>new<|assistant|>"


async def test_load_reload_unload() -> None:
    async with engine() as client:
        assert (await ask(client))["done_reason"] == "load"
        (child,) = children()
        (resident,) = (await client.get("/api/ps")).json()["models"]
        assert (resident["name"], resident["context_length"]) == ("tiny:latest", 1024)
        await ask(client, prompt="dog", options={"num_ctx": 256, "num_predict": 1})
        (reloaded,) = children()
        assert reloaded.pid != child.pid
        await ask(client, prompt="dog", options={"num_ctx": 256, "num_predict": 1})
        assert children() == [reloaded]
        assert (await client.get("/api/ps")).json()["models"][0]["context_length"] == 256
        assert (await ask(client, keep_alive=0))["done_reason"] == "unload"
        psutil.wait_procs([reloaded], timeout=10)
        assert not children()
    assert not children()


async def test_llama2_is_another_name_for_the_same_process() -> None:
    async with engine() as client:
        tags = {tag["name"]: tag["digest"] for tag in (await client.get("/api/tags")).json()["models"]}
        assert tags["llama2:latest"] == tags["tiny:latest"]
        await ask(client)
        await ask(client, model="llama2", options={"num_ctx": 8192})  # as much as the model has: the same as not asked
        assert len(children()) == 1


async def test_a_client_that_leaves_frees_llama_cpps_slot() -> None:
    async with engine() as client:
        body = {"model": "tiny", "prompt": "x", "format": ENDLESS}
        async with client.stream("POST", "/api/generate", json=body) as response:
            streamed = response.aiter_lines()
            assert not json.loads(await anext(streamed))["done"]
            async with asyncio.TaskGroup() as group:
                # llama.cpp has this one slot: the second answer can only come once it has let go of the first.
                second = group.create_task(ask(client, prompt="dog", options=GREEDY | {"num_predict": 2}))
                await streamed.aclose()  # type: ignore[attr-defined]
                assert (await second)["eval_count"] == 2
        slots = (await client.get("/debug/slots")).json()["models"]["tiny:latest"]
        assert (slots["loaded"], slots["slots"], slots["busy"], slots["waiting"], slots["served"]) == (True, 1, 0, 0, 2)


async def test_requests_share_the_model_up_to_its_slots() -> None:
    async with engine(slots=2) as client:
        await ask(client)
        async with asyncio.TaskGroup() as group:
            answers = [group.create_task(ask(client, prompt=f"{n} dogs", options=GREEDY)) for n in range(5)]
        assert all(answer.result()["done"] for answer in answers)
        slots = (await client.get("/debug/slots")).json()["models"]["tiny:latest"]
        assert (slots["slots"], slots["busy"], slots["waiting"], slots["served"]) == (2, 0, 0, 6)


async def test_a_killed_process_fails_its_requests_and_is_replaced() -> None:
    async with engine(slots=2) as client:
        body = {"model": "tiny", "prompt": "x", "format": ENDLESS}
        async with client.stream("POST", "/api/generate", json=body) as response:
            streamed = response.aiter_lines()
            await anext(streamed)
            whole = asyncio.create_task(client.post("/api/generate", json=body | {"stream": False}))
            async with asyncio.timeout(10):
                while (await client.get("/debug/slots")).json()["models"]["tiny:latest"]["busy"] < 2:  # noqa: ASYNC110
                    await asyncio.sleep(0.002)
            (child,) = children()
            child.kill()
            last = [json.loads(line) async for line in streamed][-1]
            assert last == {"error": "llama.cpp has unexpectedly stopped"}
            failed = await whole
            assert (failed.status_code, failed.json()) == (500, last)
        assert (await ask(client, prompt="dog"))["done"]
        assert [other.pid for other in children()] != [child.pid]


async def test_a_process_killed_while_idle_is_replaced_unnoticed() -> None:
    async with engine() as client:
        await ask(client)
        (child,) = children()
        child.kill()
        async with asyncio.timeout(10):
            # Its end is for the engine to see: a test that waited for the child would take its exit status away.
            while (await client.get("/debug/slots")).json()["models"]["tiny:latest"]["loaded"]:  # noqa: ASYNC110
                await asyncio.sleep(0.002)
        assert (await ask(client, prompt="dog"))["done"]


async def test_a_file_llama_cpp_cannot_load(tmp_path: Path) -> None:
    whole = FILES["tiny"].read_bytes()
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(whole[: len(whole) // 2])
    backend = await LlamaBackend.open({"broken": broken})
    async with running(backend) as url, httpx.AsyncClient(base_url=url, trust_env=False) as client:
        failed = await client.post("/api/generate", json={"model": "broken", "prompt": "x"})
        assert failed.status_code == 500
        assert failed.json()["error"].startswith("llama.cpp could not load broken.gguf")


async def test_an_embedding_model() -> None:
    async with engine() as client:
        body = {"model": "bert", "input": ["a", "b"], "dimensions": 3}
        answer = (await client.post("/api/embed", json=body)).json()
        # What Ollama v0.24 answers for this file and these texts.
        assert answer["embeddings"][0] == pytest.approx([-0.24085712, -0.9705203, -0.0088327285], abs=1e-3)
        assert answer["embeddings"][1] == pytest.approx([-0.6740169, -0.6737193, 0.3029909], abs=1e-3)
        assert answer["prompt_eval_count"] == 6
        long = (await client.post("/api/embed", json={"model": "bert", "input": "a " * 2000})).json()
        assert math.isclose(math.hypot(*long["embeddings"][0]), 1, rel_tol=1e-6)
        refused = await client.post("/api/embed", json={"model": "bert", "input": "a " * 2000, "truncate": False})
        assert refused.status_code == 400
        refused = await client.post("/api/generate", json={"model": "bert", "prompt": "x"})
        assert (refused.status_code, refused.json()) == (400, {"error": '"bert" does not support generate'})


async def test_a_generative_model_embeds_as_well() -> None:
    async with engine() as client:
        answer = (await client.post("/api/embed", json={"model": "tiny", "input": "a"})).json()
        assert answer["embeddings"][0][:3] == pytest.approx([-0.010964363, -0.035936624, 0.21434836], abs=1e-3)


async def test_what_the_models_are() -> None:
    async with engine() as client:
        tiny = (await client.post("/api/show", json={"model": "tiny"})).json()
        assert tiny["details"]["parameter_size"] == "1.12M"
        assert (tiny["details"]["family"], tiny["details"]["quantization_level"]) == ("llama", "Q8_0")
        assert tiny["model_info"]["llama.context_length"] == 1024
        assert tiny["capabilities"] == ["completion"]
        assert "<|assistant|>" in tiny["template"]
        bert = (await client.post("/api/show", json={"model": "bert"})).json()
        assert bert["capabilities"] == ["embedding"]
