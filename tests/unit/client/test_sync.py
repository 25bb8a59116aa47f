"""The synchronous client. The gateway runs on the test's loop, so what blocks runs in another thread."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import sys
import threading
from typing import TYPE_CHECKING, Any

import pytest
from weftline_client import AuthenticationError, Client, NotConnectedError, RequestCancelledError, Token

from tests.unit.client.fake_gateway import MODELS, FakeGateway

if TYPE_CHECKING:
    from pathlib import Path

Message = dict[str, Any]

LONG = {"max_tokens": 1_000_000}


def background_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "weftline-client"]


async def test_requests(gateway: FakeGateway, settings: Message) -> None:
    def run() -> None:
        with Client(**settings) as client:
            assert client.connected
            assert len(background_threads()) == 1
            assert client.generate("hello there").text == "hello there"
            assert client.chat([{"role": "user", "content": "hi"}], "tiny").model == "tiny"
            assert client.embed(["ab"]).embeddings == [[2.0, 1.0]]
            assert client.models() == MODELS
            assert client.ping() > 0
            stream = client.generate("the sky is blue", stream=True)
            tokens = list(stream)
            assert tokens == ["the ", "sky ", "is ", "blue"]
            assert [token.seq for token in tokens if isinstance(token, Token)] == [0, 1, 2, 3]
            assert stream.result.total_tokens == 4
            with pytest.raises(RuntimeError, match="only once"):
                iter(stream)
            with client.chat([{"role": "user", "content": "a b"}], stream=True) as chat:
                assert list(chat) == ["a ", "b"]
        assert not client.connected

    await asyncio.to_thread(run)
    assert background_threads() == []


async def test_leaving_a_stream_stops_it(gateway: FakeGateway, settings: Message) -> None:
    def run() -> list[str]:
        left = []
        with Client(**settings) as client:
            stream = client.generate("on ", stream=True, options=LONG)
            for _ in stream:
                break
            left.append(stream.id)
            with client.generate("on ", stream=True, options=LONG) as stream:
                left.append(stream.id)
            dropped = client.generate("on ", stream=True, options=LONG)
            left.append(dropped.id)
            tokens = iter(dropped)
            next(tokens)
            del tokens
            gc.collect()
            assert client.generate("still here").text == "still here"
            with pytest.raises(RequestCancelledError):
                _ = stream.result
        return left

    left = await asyncio.to_thread(run)
    assert [message["id"] for message in gateway.received if message["type"] == "stop"] == left


async def test_stop_ends_a_stream_in_good_order(gateway: FakeGateway, settings: Message) -> None:
    def run() -> None:
        with Client(**settings) as client:
            stream = client.generate("on ", stream=True, options=LONG)
            tokens = iter(stream)
            next(tokens)
            stream.stop()
            assert len(list(tokens)) + 1 == stream.result.total_tokens
            assert stream.result.done_reason == "cancelled"

    await asyncio.to_thread(run)


async def test_many_threads_share_a_client(gateway: FakeGateway, settings: Message) -> None:
    client = Client(**settings)

    def read(prompt: str) -> str:
        return "".join(client.generate(prompt, stream=True))

    await asyncio.to_thread(client.connect)
    try:
        prompts = [f"{number} " for number in range(8)]
        texts = await asyncio.gather(*(asyncio.to_thread(read, prompt) for prompt in prompts))
        assert texts == prompts
    finally:
        await asyncio.to_thread(client.close)
    assert len(gateway.lines) == 1


INTERRUPTED = """
import os, signal
from weftline_client import Client
signal.signal(signal.SIGINT, signal.default_int_handler)  # it may be ignored by inheritance
with Client(os.environ["URL"], client_id="me", private_key=os.environ["PEM"]) as client:
    try:
        client.generate("on ", options={"max_tokens": 1_000_000})
    except KeyboardInterrupt:
        print(client.generate("after").text)
"""


async def test_ctrl_c_stops_the_request(gateway: FakeGateway, pem: str) -> None:
    environment = os.environ | {"URL": gateway.url, "PEM": pem}
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", INTERRUPTED, env=environment, stdout=asyncio.subprocess.PIPE
    )
    request_id = (await gateway.got("generate"))["id"]
    process.send_signal(signal.SIGINT)
    assert (await gateway.got("stop"))["id"] == request_id
    output, _ = await process.communicate()
    assert (output.strip(), process.returncode) == (b"after", 0)


async def test_without_a_line(gateway: FakeGateway, settings: Message) -> None:
    client = Client(**settings)
    client.close()
    with pytest.raises(NotConnectedError, match="call connect"):
        client.models()
    with pytest.raises(NotConnectedError, match="call connect"):
        list(client.generate("hi", stream=True))

    refused = Client(**settings | {"client_id": "nobody"})
    with pytest.raises(AuthenticationError):
        await asyncio.to_thread(refused.connect)
    assert background_threads() == []


async def test_callbacks(gateway: FakeGateway, settings: Message, caplog: pytest.LogCaptureFixture) -> None:
    seen: list[str] = []

    def run() -> None:
        with Client(**settings) as client:

            def ask(_: Message) -> None:
                client.ping()  # would wait for itself

            def note(message: Message) -> None:
                seen.append(message["token"])

            client.on("stream_token", note)
            client.on("stream_end", ask)
            client.generate("a b")
            client.off("stream_token", note)
            client.generate("c")

    await asyncio.to_thread(run)
    assert seen == ["a ", "b"]
    assert caplog.text.count("cannot be called from its own callbacks") == 2


async def test_from_config_and_a_second_connection(gateway: FakeGateway, pem: str, tmp_path: Path) -> None:
    (tmp_path / "key.pem").write_text(pem)
    config = tmp_path / "me_config.json"
    config.write_text(f'{{"serverUrl": "{gateway.url}", "clientId": "me", "privateKeyPath": "key.pem"}}')

    def run() -> None:
        client = Client.from_config(config)
        for _ in range(2):
            client.connect()
            assert client.models() == MODELS
            client.close()
            client.close()

    await asyncio.to_thread(run)
    assert len(gateway.lines) == 2
