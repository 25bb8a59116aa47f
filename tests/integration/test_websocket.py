"""The client protocol over real sockets: every message, every refusal, every bound."""

import asyncio
import contextlib
import json
from collections.abc import Iterator
from typing import Any

import httpx
import msgpack
import pytest
import websockets

from cli.keys import create_client
from gateway.store import Store
from tests.fabric import Fabric
from tests.wsclient import Wire, authenticated, connect, sign
from workers.embedded.simulated import Settings, transcript


def generate(ref: str = "1", **more: Any) -> dict[str, Any]:
    return {"type": "generate", "id": ref, "model": "llama2", "prompt": "hello", **more}


async def text_of(wire: Wire, ref: str) -> tuple[str, dict[str, Any]]:
    """The text of a stream and its last message; `seq` must count every event."""
    text, seq = "", 0
    while True:
        message = await wire.hear()
        if message.get("id") != ref:
            continue
        if message["type"] == "stream_token":
            assert message["seq"] == seq
            seq += 1
            text += message["token"]
        elif message["type"] in ("stream_end", "error"):
            return text, message


# What works -----------------------------------------------------------------------------------------------------------


async def test_generate_streams_the_whole_text(fabric: Fabric) -> None:
    async with authenticated(fabric) as wire:
        await wire.send(generate(options={"max_tokens": 20, "seed": 7}))
        start = await wire.hear()
        assert (start["type"], start["id"], start["model"]) == ("stream_start", "1", "llama2")
        text, end = await text_of(wire, "1")
        assert text == transcript("hello", 7, 20)
        assert end["totalTokens"] == 20
        assert end["doneReason"] == "length"
        assert end["host"].startswith("worker-")
        assert (end["attempts"], end.get("migrated", False)) == (1, False)
        assert end["promptTokens"] == 1
        assert set(end["timings"]) == {"queueMs", "loadMs", "firstTokenMs"}
        assert isinstance(end["elapsedTime"], int)
        assert end["timestamp"] >= start["timestamp"] > 1_700_000_000_000


async def test_num_predict_wins_over_max_tokens(fabric: Fabric) -> None:
    async with authenticated(fabric) as wire:
        await wire.send(generate(options={"max_tokens": 20, "num_predict": 3}))
        _, end = await text_of(wire, "1")
        assert end["totalTokens"] == 3


async def test_chat_keeps_to_its_conversation(fabric: Fabric) -> None:
    async with authenticated(fabric) as wire:
        message = {"role": "user", "content": "hello"}
        chat = {"type": "chat", "id": "c", "model": "llama2", "messages": [message], "options": {"num_predict": 5}}
        await wire.send(chat)
        text, end = await text_of(wire, "c")
        assert text == transcript("hello", 0, 5)
        assert end["totalTokens"] == 5


async def test_embed_gives_one_vector_per_input(fabric: Fabric) -> None:
    async with authenticated(fabric) as wire:
        await wire.send({"type": "embed", "id": "e", "model": "simulated-embed", "input": ["one", "two"]})
        result = await wire.hear()
        assert (result["type"], result["id"], result["model"]) == ("embed_result", "e", "simulated-embed")
        assert len(result["embeddings"]) == 2
        assert abs(sum(x * x for x in result["embeddings"][0]) - 1) < 1e-6
        assert result["promptTokens"] == 2


async def test_models_and_ping(fabric: Fabric) -> None:
    async with authenticated(fabric) as wire:
        await wire.send({"type": "models"})
        assert (await wire.hear())["models"] == ["llama2", "simulated", "simulated-embed"]
        await wire.send({"type": "ping", "unknown": "fields are ignored"})
        assert (await wire.hear())["type"] == "pong"


async def test_several_streams_at_once_on_one_connection(fabric: Fabric) -> None:
    async with authenticated(fabric) as wire:
        for number in range(20):
            await wire.send(generate(str(number), prompt=f"p{number}", options={"num_predict": 30}))
        texts = {str(number): "" for number in range(20)}
        running = set(texts)
        while running:
            message = await wire.hear_until("stream_token", "stream_end")
            if message["type"] == "stream_end":
                running.discard(message["id"])
            else:
                texts[message["id"]] += message["token"]
        assert texts == {str(number): transcript(f"p{number}", 0, 30) for number in range(20)}


async def test_both_paths_serve_websockets(fabric: Fabric) -> None:
    async with websockets.connect(f"{fabric.url}/ws", proxy=None) as connection:
        assert json.loads(await connection.recv())["type"] == "challenge"


async def test_msgpack_carries_the_same_maps(fabric: Fabric) -> None:
    async with websockets.connect(
        fabric.url, subprotocols=[websockets.Subprotocol("weftline.msgpack")], proxy=None
    ) as connection:
        challenge = msgpack.unpackb(await connection.recv())
        answer = {
            "type": "authenticate",
            "clientId": fabric.client_id,
            "signature": sign(fabric, challenge["challenge"]),
        }
        await connection.send(msgpack.packb(answer))
        assert msgpack.unpackb(await connection.recv())["success"] is True
        await connection.send(msgpack.packb(generate(options={"num_predict": 3})))
        messages: list[dict[str, Any]] = []
        while not messages or messages[-1]["type"] != "stream_end":
            messages.append(msgpack.unpackb(await connection.recv()))
        assert "".join(m["token"] for m in messages if m["type"] == "stream_token") == transcript("hello", 0, 3)
        await connection.send(b"\xc1")
        assert msgpack.unpackb(await connection.recv())["code"] == "INVALID_MESSAGE"


async def test_stop_ends_the_stream_and_frees_the_engine(fabric: Fabric) -> None:
    async with authenticated(fabric) as wire:
        await wire.send(generate("s", options={"num_predict": 100_000}))
        await wire.hear_until("stream_token", ref="s")
        await wire.send({"type": "stop", "id": "s"})
        end = await wire.hear_until("stream_end", "error", ref="s")
        assert (end["type"], end["doneReason"]) == ("stream_end", "cancelled")
        assert 0 < end["totalTokens"] < 100_000
        fabric.until(lambda: fabric.busy() == 0, "the engines are idle after a stop")


async def test_a_client_that_leaves_frees_the_engine(fabric: Fabric) -> None:
    async with authenticated(fabric) as wire:
        await wire.send(generate("s", options={"num_predict": 100_000}))
        await wire.hear_until("stream_token", ref="s")
        wire.connection.transport.abort()
    fabric.until(lambda: fabric.busy() == 0, "the engines are idle after the client left")


async def test_who_did_not_ask_for_resuming_cannot_resume(fabric: Fabric) -> None:
    async with authenticated(fabric) as wire:
        await wire.send({"type": "resume", "id": "gone", "lastSeq": 4})
        answer = await wire.hear()
        assert (answer["code"], answer["id"]) == ("NOT_FOUND", "gone")


# Bad input ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sent", "code", "ref", "words"),
    [
        ("not json", "INVALID_MESSAGE", None, "not JSON"),
        ("[1]", "INVALID_MESSAGE", None, "map"),
        ('{"id": "1"}', "UNKNOWN_TYPE", "1", "None"),
        ({"type": "shutdown", "id": "7"}, "UNKNOWN_TYPE", "7", "shutdown"),
        ({"type": "generate", "id": "1", "model": "llama2"}, "INVALID_MESSAGE", "1", "prompt"),
        ({"type": "generate", "id": "1", "model": "", "prompt": "p"}, "INVALID_MESSAGE", "1", "model"),
        ({"type": "generate", "id": "1", "model": "m", "prompt": 5}, "INVALID_MESSAGE", "1", "prompt"),
        ({"type": "generate", "id": "", "model": "m", "prompt": "p"}, "INVALID_MESSAGE", "", "id"),
        ({"type": "generate", "id": 5, "model": "m", "prompt": "p"}, "INVALID_MESSAGE", None, "id"),
        (generate(priority="first"), "INVALID_MESSAGE", "1", "priority"),
        (generate(deadlineMs=0), "INVALID_MESSAGE", "1", "deadlineMs"),
        ({"type": "chat", "id": "1", "model": "m", "messages": "hi"}, "INVALID_MESSAGE", "1", "messages"),
        ({"type": "embed", "id": "1", "model": "m", "input": {}}, "INVALID_MESSAGE", "1", "input"),
        ({"type": "stop", "id": "never"}, "NOT_FOUND", "never", "no such stream"),
        ({"type": "generate", "id": "1", "model": "nope", "prompt": "p"}, "MODEL_NOT_FOUND", "1", "llama2"),
    ],
)
async def test_bad_input_gets_a_code_and_costs_nothing_else(
    fabric: Fabric, sent: Any, code: str, ref: str | None, words: str
) -> None:
    async with authenticated(fabric) as wire:
        await wire.send(sent)
        error = await wire.hear()
        assert (error["type"], error["code"], error.get("id")) == ("error", code, ref)
        assert words in error["error"]
        await wire.send(generate("after", options={"num_predict": 2}))
        text, _ = await text_of(wire, "after")
        assert text == transcript("hello", 0, 2)


async def test_an_unknown_model_is_answered_with_those_there_are(fabric: Fabric) -> None:
    async with authenticated(fabric) as wire:
        await wire.send(generate(model="nope"))
        error = await wire.hear()
        assert error["models"] == ["llama2", "simulated", "simulated-embed"]


async def test_an_id_in_use_is_refused_and_its_owner_goes_on(fabric: Fabric) -> None:
    async with authenticated(fabric) as wire:
        await wire.send(generate("d", options={"num_predict": 5000}))
        await wire.send(generate("d"))
        error = await wire.hear_until("error")
        assert (error["code"], error["id"]) == ("DUPLICATE_ID", "d")
        await wire.send({"type": "stop", "id": "d"})
        await wire.hear_until("stream_end", ref="d")
        await wire.send(generate("d", options={"num_predict": 1}))
        assert (await wire.hear_until("stream_end", ref="d"))["totalTokens"] == 1


async def test_an_engines_own_refusal_reaches_the_client(fabric: Fabric) -> None:
    async with authenticated(fabric) as wire:
        await wire.send(generate(model="simulated-embed"))
        error = await wire.hear_until("error")
        assert (error["code"], error["id"]) == ("INVALID_MESSAGE", "1")
        assert "does not support generate" in error["error"]


async def test_a_deadline_that_passes_stops_the_request(fabric: Fabric) -> None:
    async with authenticated(fabric) as wire:
        await wire.send(generate("d", options={"num_predict": 100_000}, deadlineMs=50))
        error = await wire.hear_until("error")
        assert (error["code"], error["id"]) == ("DEADLINE_EXCEEDED", "d")
        fabric.until(lambda: fabric.busy() == 0, "the engines are idle after a deadline")


# Authentication -------------------------------------------------------------------------------------------------------


async def test_a_wrong_signature_is_refused_and_the_line_closed(fabric: Fabric) -> None:
    async with connect(fabric) as wire:
        result = await wire.authenticate(fabric, signature="AAAA")
        assert (result["type"], result["success"]) == ("auth_result", False)
        wrong = result["error"]
        assert (await wire.closed())[0] == 1008
    async with connect(fabric) as wire:
        result = await wire.authenticate(fabric, clientId="nobody")
        assert result["error"] == wrong, "an unknown client must look like a wrong signature"


async def test_a_signature_counts_for_its_own_challenge_only(fabric: Fabric) -> None:
    async with connect(fabric) as first, connect(fabric) as second:
        challenge = await first.hear()
        await second.hear()
        stolen = {
            "type": "authenticate",
            "clientId": fabric.client_id,
            "signature": sign(fabric, challenge["challenge"]),
        }
        await second.send(stolen)
        assert (await second.hear())["success"] is False


async def test_a_revoked_client_is_refused(fabric: Fabric) -> None:
    with contextlib.closing(Store.open(fabric.folder)) as store:
        files = create_client(store, "refused", fabric.folder / "keys")
        store.revoke("refused")
    async with connect(fabric) as wire:
        challenge = await wire.hear()
        stranger = Fabric.__new__(Fabric)
        stranger.private_key_path = files.private
        signature = sign(stranger, challenge["challenge"])
        await wire.send({"type": "authenticate", "clientId": "refused", "signature": signature})
        assert (await wire.hear())["success"] is False


async def test_a_revocation_reaches_a_live_connection_and_its_streams(fabric: Fabric) -> None:
    with contextlib.closing(Store.open(fabric.folder)) as store:
        files = create_client(store, "leaving", fabric.folder / "keys")
        stranger = Fabric.__new__(Fabric)
        stranger.private_key_path, stranger.client_id = files.private, "leaving"
        async with connect(fabric) as wire:
            assert (await wire.authenticate(stranger))["success"] is True
            await wire.send(generate(options={"num_predict": 100_000}))
            await wire.hear_until("stream_token")
            store.revoke("leaving")
            async for _ in heard(wire):
                pass
            assert await wire.closed() == (1008, "this client was revoked")
    fabric.until(lambda: fabric.busy() == 0, "the engines are idle after a revocation")


async def test_a_text_frame_on_a_binary_connection_is_refused(fabric: Fabric) -> None:
    async with connect(fabric, subprotocols=[websockets.Subprotocol("weftline.msgpack")]) as wire:
        await wire.connection.recv()
        await wire.send({"type": "ping"})
        assert msgpack.unpackb(await wire.connection.recv())["code"] == "INVALID_MESSAGE"
        assert (await wire.closed())[0] == 1008


@pytest.mark.parametrize("sent", [generate(), {"type": "ping"}, {"type": "models"}, "garbage", b"\x00"])
async def test_messages_before_authentication_close_the_line(fabric: Fabric, sent: Any) -> None:
    async with connect(fabric) as wire:
        await wire.hear()
        await wire.send(sent)
        error = await wire.hear()
        assert error["code"] in ("AUTH_REQUIRED", "INVALID_MESSAGE")
        assert (await wire.closed())[0] == 1008


async def test_a_second_authenticate_closes_the_line(fabric: Fabric) -> None:
    async with authenticated(fabric) as wire:
        await wire.send({"type": "authenticate", "clientId": fabric.client_id, "signature": "AAAA"})
        assert (await wire.hear())["code"] == "INVALID_MESSAGE"
        assert (await wire.closed())[0] == 1008


# Bounds: a fabric of its own with small ones --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fabric]:
    bounds = {
        "frame_bytes_max": 20_000,
        "messages_per_s": 2.0,
        "messages_burst": 6,
        "streams_max": 3,
        "authenticate_s": 0.3,
        "unauthenticated_max": 3,
        "outbox_bytes_max": 4096,
        "origins": ("https://good.example",),
    }
    with Fabric(
        tmp_path_factory.mktemp("small"), engines=[Settings(slots=2)], gateway_settings=bounds, model="simulated"
    ) as running:
        yield running


async def test_an_oversize_prompt_is_answered_and_the_line_stays(small: Fabric) -> None:
    async with authenticated(small) as wire:
        await wire.send(generate(prompt="x" * 21_000))
        assert (await wire.hear())["code"] == "TOO_LARGE"
        await wire.send({"type": "ping"})
        assert (await wire.hear())["type"] == "pong"


async def test_a_frame_beyond_all_bounds_closes_the_line(small: Fabric) -> None:
    async with authenticated(small) as wire:
        await wire.send(generate(prompt="x" * 40_000))
        assert (await wire.closed())[0] == 1009


async def test_too_many_messages_are_refused_and_a_flood_closes_the_line(small: Fabric) -> None:
    async with authenticated(small) as wire:
        with contextlib.suppress(websockets.ConnectionClosed):
            for _ in range(30):
                await wire.send({"type": "resume", "id": "r", "lastSeq": 1})
        codes = [json.loads(message)["code"] async for message in heard(wire)]
        assert codes[:6] == ["NOT_FOUND"] * 6
        assert set(codes[6:]) == {"RATE_LIMITED"}
        assert (await wire.closed()) == (1008, "too many messages")


async def test_a_stop_counts_even_beyond_the_rate(small: Fabric) -> None:
    async with authenticated(small) as wire:
        await wire.send(generate("s", options={"num_predict": 100_000}))
        for _ in range(7):
            await wire.send({"type": "ping"})
        assert (await wire.hear_until("error"))["code"] == "RATE_LIMITED"
        await wire.send({"type": "stop", "id": "s"})
        assert (await wire.hear_until("stream_end", ref="s"))["doneReason"] == "cancelled"


async def heard(wire: Wire) -> Any:
    with contextlib.suppress(websockets.ConnectionClosed):
        while True:
            yield await wire.connection.recv()


async def test_one_stream_too_many_is_refused(small: Fabric) -> None:
    async with authenticated(small) as wire:
        for number in range(4):
            await wire.send(generate(str(number), options={"num_predict": 100_000}))
        error = await wire.hear_until("error")
        assert (error["code"], error["id"]) == ("RATE_LIMITED", "3")
        assert error["retryAfterMs"] > 0
    small.until(lambda: small.busy() == 0, "the engines are idle")


async def test_a_waiting_request_is_told_its_place(small: Fabric) -> None:
    async with authenticated(small) as wire:
        for number in range(3):
            await wire.send(generate(str(number), options={"num_predict": 100_000}))
        queued = await wire.hear_until("queued")
        assert (queued["id"], queued["position"]) == ("2", 1)
        await wire.send({"type": "stop", "id": "2"})
        end = await wire.hear_until("stream_end", ref="2")
        assert (end["doneReason"], end["totalTokens"]) == ("cancelled", 0)
        wire.connection.transport.abort()
    small.until(lambda: small.busy() == 0, "the engines are idle")


async def test_who_does_not_authenticate_in_time_is_sent_away(small: Fabric) -> None:
    async with connect(small) as wire:
        await wire.hear()
        assert await wire.closed() == (1008, "not authenticated in time")


async def test_too_many_strangers_are_refused_at_the_door(small: Fabric) -> None:
    async with connect(small) as a, connect(small) as b, connect(small) as c:
        for wire in (a, b, c):
            await wire.hear()
        with pytest.raises(websockets.InvalidStatus) as refused:
            async with connect(small):
                pass
        assert refused.value.response.status_code == 503
        for wire in (a, b, c):
            await wire.closed()
    async with authenticated(small):
        pass


async def test_a_page_of_another_origin_is_refused(small: Fabric) -> None:
    with pytest.raises(websockets.InvalidStatus) as refused:
        async with connect(small, origin=websockets.Origin("https://evil.example")):
            pass
    assert refused.value.response.status_code == 403
    async with authenticated(small, origin=websockets.Origin("https://good.example")):
        pass


async def test_a_client_that_reads_late_misses_nothing(small: Fabric) -> None:
    """Its outbox fills, its streams pause, and what was let go is replayed when it reads."""
    async with authenticated(small, max_queue=1) as wire:
        await wire.send(generate("slow", options={"num_predict": 20_000}))
        await wire.hear_until("stream_start", ref="slow")
        small.until(lambda: small_pauses(small) > 0, "the streams pause")
        text, end = await asyncio.wait_for(text_of(wire, "slow"), 60)
        assert end["totalTokens"] == 20_000
        assert text == transcript("hello", 0, 20_000)


def small_pauses(fabric: Fabric) -> float:
    for line in httpx.get(f"{fabric.http_url}/metrics", trust_env=False).text.splitlines():
        if line.startswith("weftline_pauses_total"):
            return float(line.split()[1])
    raise AssertionError("no such metric")


# HTTP -----------------------------------------------------------------------------------------------------------------


def test_probes_and_metrics(fabric: Fabric) -> None:
    assert httpx.get(f"{fabric.http_url}/livez", trust_env=False).text == "ok\n"
    ready = httpx.get(f"{fabric.http_url}/readyz", trust_env=False)
    assert ready.status_code == 200
    assert ready.json()["models"] == ["llama2", "simulated", "simulated-embed"]
    metrics = httpx.get(f"{fabric.http_url}/metrics", trust_env=False)
    assert metrics.headers["content-type"].startswith("text/plain; version=0.0.4")
    for name in ("weftline_broker_connected 1.0", "weftline_fleet_workers 2.0", "weftline_first_token_seconds_bucket"):
        assert name in metrics.text
