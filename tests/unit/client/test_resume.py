"""Requests outlive the lines they run on: against gateways that drop them at every point of a stream."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any

import pytest
from weftline_client import (
    AsyncClient,
    AuthenticationError,
    Client,
    ConnectionLostError,
    ConnectionPool,
    InvalidRequestError,
    NotConnectedError,
    NotFoundError,
    QuotaExceededError,
    RateLimitedError,
    Reconnect,
    RequestCancelledError,
    ResumeGapError,
    SlowConsumerError,
    WeftlineError,
    WorkerLostError,
    aio,
)

from tests.unit.client.fake_gateway import MODELS, FakeGateway, Line

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey
    from weftline_client import Stream

Message = dict[str, Any]

AT_ONCE = Reconnect(delay_first_s=0, delay_max_s=0)
WORDS = ["the ", "sky ", "is ", "blue"]


async def cut(line: Line) -> None:
    line.drop()


async def drain(line: Line) -> None:
    await line.send("draining")
    await line.socket.close(1001)


async def fail(line: Line) -> None:
    await line.socket.close(1011)


async def bid_farewell(line: Line) -> None:
    await line.socket.close(1000)


async def say(line: Line, request_id: str, first: int, end: int) -> None:
    """Some of WORDS, by their seqs."""
    for seq in range(first, end):
        await line.token(request_id, WORDS[seq], seq)


def refuse(code: str, **fields: Any) -> Any:
    async def answer(line: Line, message: Message) -> None:
        await line.send("error", id=message["id"], error="no", code=code, **fields)

    return answer


def in_turn(*scripts: Any) -> Any:
    """A script that does another thing each time; the last for ever."""
    left = list(scripts)

    async def answer(line: Line, message: Message) -> None:
        await (left.pop(0) if len(left) > 1 else left[0])(line, message)

    return answer


async def read_into(tokens: list[str], stream: Stream) -> None:
    async for token in stream:
        tokens.append(token)  # noqa: PERF401 - they are wanted although an error follows


async def nothing(_: Line, __: Message) -> None:
    pass


async def drop_at_once(line: Line, _: Message) -> None:
    line.drop()


def told(gateway: FakeGateway) -> list[Any]:
    """What the gateway was told, in short: kinds, and of resumptions lastSeq."""
    return [
        ("resume", message["lastSeq"]) if message["type"] == "resume" else message["type"]
        for message in gateway.received
    ]


class Door:
    """Lets the first line in; the others wait before their challenge until it is opened."""

    def __init__(self, gateway: FakeGateway) -> None:
        self.knocked = asyncio.Event()
        self.open = asyncio.Event()
        self._gateway = gateway
        gateway.opening = self

    async def __call__(self, line: Line) -> None:
        if line is not self._gateway.lines[0]:
            self.knocked.set()
            waits = [asyncio.create_task(wait) for wait in (self.open.wait(), line.socket.wait_closed())]
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            for wait in waits:
                wait.cancel()


# --- a line that drops ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["json", "msgpack"])
@pytest.mark.parametrize("drop", [cut, drain, fail, bid_farewell])
@pytest.mark.parametrize("read", [0, 2, 4])
async def test_a_stream_goes_on(
    encoding: Any, drop: Callable[[Line], Awaitable[None]], read: int, gateway: FakeGateway, settings: Message
) -> None:
    """It is dropped before its first token, in the middle, and between the last token and the end."""
    reached = asyncio.Event()

    async def begin(line: Line, message: Message) -> None:
        await line.send("stream_start", id=message["id"], model="tiny")
        await say(line, message["id"], 0, read)
        if read:
            await reached.wait()
        await drop(line)

    async def go_on(line: Line, message: Message) -> None:
        first = message["lastSeq"] + 1
        if first == 0:
            await line.send("stream_start", id=message["id"], model="tiny")
        await say(line, message["id"], max(0, first - 1), len(WORDS))  # one of them a repeat
        await line.end(message["id"], len(WORDS), migrated=True)

    gateway.scripts |= {"generate": begin, "resume": go_on}
    async with AsyncClient(**settings, encoding=encoding, reconnect=AT_ONCE) as client:
        stream = client.generate("why?", stream=True)
        tokens = []
        async for token in stream:
            tokens.append(token)
            if len(tokens) == read:
                reached.set()
        assert client.active == 0
    assert tokens == WORDS
    assert [token.seq for token in tokens] == [0, 1, 2, 3]
    assert (stream.result.text, stream.result.model, stream.result.migrated) == ("the sky is blue", "tiny", True)
    assert told(gateway) == ["generate", ("resume", read - 1)]
    assert [line.authenticated["resume"] for line in gateway.lines] == [True, True]


async def test_lines_that_drop_while_they_open(gateway: FakeGateway, settings: Message) -> None:
    """Two before the challenge, one after it was answered, one as soon as it is told of the request."""

    async def open_or_not(line: Line) -> None:
        number = len(gateway.lines)
        if number in (2, 3):
            line.drop()
        elif number == 4:
            await line.send("challenge", challenge="v1-x")
            await line.socket.recv()
            line.drop()

    async def go_on(line: Line, message: Message) -> None:
        await say(line, message["id"], 1, 4)
        await line.end(message["id"], 4)

    async def begin(line: Line, message: Message) -> None:
        await say(line, message["id"], 0, 1)
        await client.ping()  # so the client has the token
        line.drop()

    gateway.opening = open_or_not
    gateway.scripts |= {"generate": begin, "resume": in_turn(drop_at_once, go_on)}
    async with AsyncClient(**settings, reconnect=AT_ONCE) as client:
        assert (await client.generate("why?")).text == "the sky is blue"
        assert sum("_mend" in repr(task) for task in asyncio.all_tasks()) == 1
    assert told(gateway) == ["generate", "ping", ("resume", 0), ("resume", 0)]
    assert len(gateway.lines) == 6


@pytest.mark.parametrize("kind", ["generate", "chat", "embed"])
async def test_what_never_arrived_is_sent_again(kind: str, gateway: FakeGateway, settings: Message) -> None:
    whole = gateway.scripts[kind]
    gateway.scripts[kind] = in_turn(drop_at_once, whole)
    async with AsyncClient(**settings, reconnect=AT_ONCE) as client:
        if kind == "generate":
            assert (await client.generate("hi", migrate=False)).text == "hi"
        elif kind == "chat":
            assert (await client.chat([{"role": "user", "content": "hi"}])).text == "hi"
        else:
            assert (await client.embed("abc")).embeddings == [[3.0, 1.0]]
    assert told(gateway) == [kind, ("resume", -1), kind]
    assert gateway.received[0] == gateway.received[2]


async def test_embeddings_are_resumed(gateway: FakeGateway, settings: Message) -> None:
    async def embedded(line: Line, message: Message) -> None:
        await line.send("embed_result", id=message["id"], model="tiny", embeddings=[[1.0]])

    gateway.scripts |= {"embed": drop_at_once, "resume": embedded}
    async with AsyncClient(**settings, reconnect=AT_ONCE) as client:
        assert (await client.embed("abc", "tiny")).embeddings == [[1.0]]
    assert told(gateway) == ["embed", ("resume", -1)]


async def test_a_line_that_has_dropped_before_the_client_noticed(
    gateway: FakeGateway, settings: Message, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with AsyncClient(**settings, reconnect=AT_ONCE) as client:
        send = client._send

        async def fail_once(*_: object) -> None:
            monkeypatch.setattr(client, "_send", send)
            gateway.lines[0].drop()
            raise ConnectionLostError("in this moment")

        monkeypatch.setattr(client, "_send", fail_once)
        assert (await client.generate("hi")).text == "hi"
        monkeypatch.setattr(client, "_send", fail_once)
        client._resume = False
        with pytest.raises(ConnectionLostError, match="in this moment"):
            await client.generate("hi")


async def test_the_first_sending_did_arrive(gateway: FakeGateway, settings: Message) -> None:
    async def go_on(line: Line, message: Message) -> None:
        await say(line, message["id"], 0, 4)
        await line.end(message["id"], 4)

    gateway.scripts["generate"] = in_turn(drop_at_once, refuse("DUPLICATE_ID"))
    gateway.scripts["resume"] = in_turn(refuse("NOT_FOUND"), go_on)
    async with AsyncClient(**settings, reconnect=AT_ONCE) as client:
        assert (await client.generate("why?")).text == "the sky is blue"
    assert told(gateway) == ["generate", ("resume", -1), "generate", ("resume", -1)]


# --- what cannot be resumed -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        ("NOT_FOUND", ConnectionLostError),
        ("RESUME_GAP", ResumeGapError),
        ("WORKER_LOST", WorkerLostError),
        ("QUOTA_EXCEEDED", QuotaExceededError),
    ],
)
async def test_the_error_keeps_what_had_come(
    code: str, kind: type[WeftlineError], gateway: FakeGateway, settings: Message
) -> None:
    async def begin(line: Line, message: Message) -> None:
        await say(line, message["id"], 0, 2)
        await line.socket.close(1001)

    gateway.scripts |= {"generate": begin, "resume": refuse(code)}
    async with AsyncClient(**settings, reconnect=AT_ONCE) as client:
        stream = client.generate("why?", stream=True)
        tokens: list[str] = []
        with pytest.raises(kind) as error:
            await read_into(tokens, stream)
        assert type(error.value) is kind
        assert tokens == ["the ", "sky "]
        assert (error.value.partial, error.value.request_id) == ("the sky ", stream.id)
        assert client.active == 0
        assert await client.models() == MODELS
    assert told(gateway) == ["generate", ("resume", 1), "models"]


@pytest.mark.parametrize(("code", "kind"), [("NOT_FOUND", ConnectionLostError), ("DUPLICATE_ID", InvalidRequestError)])
async def test_it_is_resumed_only_once_more(
    code: str, kind: type[WeftlineError], gateway: FakeGateway, settings: Message
) -> None:
    gateway.scripts["generate"] = in_turn(drop_at_once, refuse("DUPLICATE_ID"))
    gateway.scripts["resume"] = in_turn(refuse("NOT_FOUND"), refuse(code))
    async with AsyncClient(**settings, reconnect=AT_ONCE) as client:
        with pytest.raises(kind):
            await client.generate("why?")
    assert told(gateway) == ["generate", ("resume", -1), "generate", ("resume", -1)]


async def test_not_found_without_a_break_is_the_servers_word(gateway: FakeGateway, settings: Message) -> None:
    gateway.scripts["generate"] = refuse("NOT_FOUND")
    async with AsyncClient(**settings) as client:
        with pytest.raises(NotFoundError):
            await client.generate("why?")
    assert told(gateway) == ["generate"]


async def test_no_new_line(settings: Message, rsa_key: RSAPrivateKey) -> None:
    async def begin(line: Line, message: Message) -> None:
        await say(line, message["id"], 0, 2)
        gateway._server.close()  # and all its lines, with 1001

    async with FakeGateway({"me": rsa_key.public_key()}) as gateway:
        gateway.scripts["generate"] = begin
        policy = Reconnect(delay_first_s=0, tries_max=2)
        async with AsyncClient(**settings | {"server_url": gateway.url}, reconnect=policy) as client:
            with pytest.raises(ConnectionLostError, match=r"reconnecting failed: .*refused") as error:
                await client.generate("why?")
    assert error.value.partial == "the sky "


async def test_a_client_that_is_revoked_meanwhile(gateway: FakeGateway, settings: Message) -> None:
    async def begin(line: Line, message: Message) -> None:
        await say(line, message["id"], 0, 2)
        gateway.clients.clear()
        await line.socket.close(1008)

    gateway.scripts["generate"] = begin
    async with AsyncClient(**settings, reconnect=AT_ONCE) as client:
        with pytest.raises(ConnectionLostError, match="reconnecting failed: Unknown client") as error:
            await client.generate("why?")
        assert error.value.partial == "the sky "
        with pytest.raises(AuthenticationError):
            await client.generate("why?")
    assert len(gateway.lines) == 2


@pytest.mark.parametrize("arguments", [{"resume": False, "reconnect": AT_ONCE}, {"reconnect": None}])
async def test_resuming_turned_off(arguments: Message, gateway: FakeGateway, settings: Message) -> None:
    gateway.scripts["generate"] = drop_at_once
    async with AsyncClient(**settings, **arguments) as client:
        with pytest.raises(ConnectionLostError):
            await client.generate("why?")
        if arguments["reconnect"]:
            assert await client.models() == MODELS
    assert "resume" not in gateway.lines[0].authenticated
    assert told(gateway) == ["generate"] + ["models"] * (len(gateway.lines) - 1)


async def test_a_request_that_fells_every_line_ends(gateway: FakeGateway, settings: Message) -> None:
    """Whether each gateway finds it or not; and the client lives on, as do its other requests."""
    over = asyncio.Event()

    async def hold(line: Line, message: Message) -> None:
        await line.token(message["id"], "a", 0)

    async def resume(line: Line, message: Message) -> None:
        if message["id"] != "harmless":
            await refuse("NOT_FOUND")(line, message)
            return
        await line.token(message["id"], "a", message["lastSeq"] + 1)
        await over.wait()
        await line.end(message["id"], 1)

    gateway.scripts |= {"chat": hold, "generate": drop_at_once, "resume": resume}
    async with AsyncClient(**settings, reconnect=Reconnect(delay_first_s=0, tries_max=3)) as client:
        harmless = asyncio.create_task(client.chat([], request_id="harmless"))
        await gateway.got("chat")
        with pytest.raises(ConnectionLostError):
            await client.generate("kill")
        over.set()
        await harmless
        assert await client.models() == MODELS
    assert told(gateway).count("generate") == 4
    assert len(gateway.lines) == 5


async def test_vain_tries_lengthen_the_wait(
    gateway: FakeGateway, settings: Message, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempts: list[int] = []

    def note(_: Reconnect, attempt: int, __: object) -> float:
        attempts.append(attempt)
        return 0

    monkeypatch.setattr(Reconnect, "delay_s", note)
    gateway.scripts |= {"generate": drop_at_once, "resume": drop_at_once}
    async with AsyncClient(**settings, reconnect=Reconnect(tries_max=3)) as client:
        with pytest.raises(ConnectionLostError):
            await client.generate("kill")
        assert await client.models() == MODELS
    assert attempts == [0, 1, 2, 0]


# --- a crowd ----------------------------------------------------------------------------------------------------------


async def test_resumptions_that_are_too_many_at_once(
    gateway: FakeGateway, settings: Message, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are sent again as slowly as the gateway asks, and those beyond the burst are spaced."""
    monkeypatch.setattr(aio, "MEND_BURST", 3)
    monkeypatch.setattr(aio, "MEND_PAUSE_S", 0.001)
    spans: list[float] = []

    async def note(span: float) -> None:
        spans.append(span)
        await asyncio.sleep(0)

    async def end(line: Line, message: Message) -> None:
        await line.end(message["id"], 0)

    busy = refuse("RATE_LIMITED", retryAfterMs=20)
    gateway.scripts |= {"generate": in_turn(*[nothing] * 5, drop_at_once), "resume": in_turn(busy, busy, end)}
    async with AsyncClient(**settings, reconnect=AT_ONCE) as client:
        requests = [asyncio.create_task(client.generate("hi")) for _ in range(6)]
        await gateway.got("generate", 5)
        monkeypatch.setattr(aio, "sleep", note)
        await asyncio.gather(*requests)
    assert told(gateway).count(("resume", -1)) == 8
    assert len([span for span in spans if span]) >= 5
    assert max(spans) == 0.02


async def test_a_gateway_that_is_always_too_busy(gateway: FakeGateway, settings: Message) -> None:
    gateway.scripts |= {"generate": drop_at_once, "resume": refuse("RATE_LIMITED", retryAfterMs=1)}
    async with AsyncClient(**settings, reconnect=Reconnect(delay_first_s=0, tries_max=3)) as client:
        with pytest.raises(RateLimitedError):
            await client.generate("hi")
    assert told(gateway) == ["generate", *[("resume", -1)] * 3]


class Fabric:
    """Gateways in front of one fabric that keeps requests: it runs each once, and lines drop every `life` messages."""

    def __init__(self, gateways: list[FakeGateway], *, life: int) -> None:
        self.life = life
        self.words: dict[str, list[str]] = {}
        self.spoken: dict[Line, int] = {}
        for gateway in gateways:
            gateway.scripts |= {"generate": self.generate, "resume": self.resume}

    async def generate(self, line: Line, message: Message) -> None:
        if message["id"] in self.words:
            await refuse("DUPLICATE_ID")(line, message)
            return
        self.words[message["id"]] = [f"{message['prompt']}.{number} " for number in range(40)]
        await self.play(line, message["id"], -1)

    async def resume(self, line: Line, message: Message) -> None:
        if message["id"] not in self.words:
            await refuse("NOT_FOUND")(line, message)
            return
        await self.play(line, message["id"], message["lastSeq"])

    async def play(self, line: Line, request_id: str, last_seq: int) -> None:
        words = self.words[request_id]
        for seq in range(last_seq + 1, len(words)):
            self.spoken[line] = self.spoken.get(line, 0) + 1
            if self.spoken[line] > self.life:
                line.drop()
                return
            await line.token(request_id, words[seq], seq)
            await asyncio.sleep(0)
        await line.end(request_id, len(words))


@pytest.fixture
async def gateways(rsa_key: RSAPrivateKey) -> AsyncIterator[list[FakeGateway]]:
    async with FakeGateway({"me": rsa_key.public_key()}) as one, FakeGateway({"me": rsa_key.public_key()}) as other:
        yield [one, other]


def text_of(prompt: object) -> str:
    return "".join(f"{prompt}.{number} " for number in range(40))


@pytest.mark.parametrize("pooled", [False, True])
async def test_many_streams_over_lines_that_drop_again_and_again(
    pooled: bool, gateways: list[FakeGateway], settings: Message
) -> None:
    Fabric(gateways, life=57)
    arguments = settings | {"server_url": [gateway.url for gateway in gateways], "reconnect": AT_ONCE}
    async with ConnectionPool(**arguments, size=2) if pooled else AsyncClient(**arguments) as client:

        async def read(prompt: int) -> tuple[str, list[int]]:
            tokens = [token async for token in client.generate(str(prompt), stream=True)]
            return "".join(tokens), [token.seq for token in tokens]

        results = await asyncio.gather(*map(read, range(20)))
        assert results == [(text_of(prompt), list(range(40))) for prompt in range(20)]
        for each in client.clients if isinstance(client, ConnectionPool) else [client]:
            assert (each.active, len(each._left)) == (0, 0)
    assert all(len(gateway.lines) >= 5 for gateway in gateways)


async def test_the_synchronous_client(gateways: list[FakeGateway], settings: Message) -> None:
    Fabric(gateways, life=25)

    def run() -> None:
        urls = [gateway.url for gateway in gateways]
        with Client(**settings | {"server_url": urls, "reconnect": AT_ONCE}) as client:
            assert "".join(client.generate("a", stream=True)) == text_of("a")
            assert client.generate("b").text == text_of("b")

    await asyncio.to_thread(run)
    assert sum(len(gateway.lines) for gateway in gateways) >= 4


# --- leaving and stopping while there is no line ----------------------------------------------------------------------


async def hold(line: Line, message: Message) -> None:
    """Two tokens, and then nothing more until the line is cut by `Down`."""
    await say(line, message["id"], 0, 2)


class Down:
    """A stream of which two tokens were read, and whose line then dropped; `door` opens the next."""

    def __init__(self, gateway: FakeGateway, client: AsyncClient) -> None:
        gateway.scripts["generate"] = hold
        self.gateway = gateway
        self.door = Door(gateway)
        self.stream = client.generate("why?", stream=True)
        self.tokens = aiter(self.stream)

    async def __aenter__(self) -> Down:
        assert [await anext(self.tokens), await anext(self.tokens)] == ["the ", "sky "]
        self.gateway.lines[0].drop()
        await self.door.knocked.wait()
        return self

    async def __aexit__(self, *_: object) -> None:
        self.door.open.set()


async def until_stopped(line: Line, message: Message) -> None:
    """A server that goes on with the stream when it has to, and is told to stop."""
    await say(line, message["id"], 2, 3)
    await line.stopped(message["id"]).wait()
    await line.end(message["id"], 3, "cancelled")


async def test_leaving_while_there_is_no_line(gateway: FakeGateway, settings: Message) -> None:
    speak = asyncio.Event()

    async def go_on(line: Line, message: Message) -> None:
        await speak.wait()
        await until_stopped(line, message)

    gateway.scripts["resume"] = go_on
    async with AsyncClient(**settings, reconnect=AT_ONCE) as client:
        async with Down(gateway, client) as down:
            await down.stream.aclose()
            assert client.active == 0
            with pytest.raises(RequestCancelledError):
                _ = down.stream.result
        await client.ping()
        await gateway.got("resume")
        await client.ping()
        assert "stop" not in told(gateway)  # it would be answered as `resume` is, if it came first
        speak.set()
        assert (await gateway.got("stop"))["id"] == down.stream.id
        await client.ping()
        assert client._left == {}
        assert down.stream.text == "the sky "
    assert [kind for kind in told(gateway) if kind != "ping"] == ["generate", ("resume", 1), "stop"]


async def test_a_stop_that_was_lost_with_the_line(gateway: FakeGateway, settings: Message) -> None:
    gateway.scripts |= {
        "generate": hold,
        "stop": in_turn(drop_at_once, gateway.scripts["stop"]),
        "resume": until_stopped,
    }
    async with AsyncClient(**settings, reconnect=AT_ONCE) as client:
        async with client.generate("why?", stream=True) as stream:
            await anext(aiter(stream))
        await gateway.got("stop", 2)
        await client.ping()
        assert client._left == {}
    kinds = [kind for kind in told(gateway) if kind != "ping"]
    assert kinds[0] == "generate"
    assert kinds[1] == "stop"
    assert kinds[2] in (("resume", 0), ("resume", 1))
    assert kinds[3:] == ["stop"]


@pytest.mark.parametrize("code", ["NOT_FOUND", "RESUME_GAP"])
async def test_what_was_left_is_forgotten_when_the_server_has_forgotten_it(
    code: str, gateway: FakeGateway, settings: Message
) -> None:
    gateway.scripts["resume"] = refuse(code)
    async with AsyncClient(**settings, reconnect=AT_ONCE) as client:
        async with Down(gateway, client) as down:
            await down.stream.aclose()
        await gateway.got("resume")
        await client.ping()
        assert client._left == {}
    assert told(gateway)[:2] == ["generate", ("resume", 1)]
    assert "stop" not in told(gateway)


async def test_stopping_while_there_is_no_line(gateway: FakeGateway, settings: Message) -> None:
    gateway.scripts["resume"] = until_stopped
    async with AsyncClient(**settings, reconnect=AT_ONCE) as client:
        async with Down(gateway, client) as down:
            await down.stream.stop()
            await client.stop(down.stream.id)
        assert [token async for token in down.tokens] == ["is "]
        assert down.stream.result.done_reason == "cancelled"
    assert told(gateway) == ["generate", ("resume", 1), "stop"]


async def test_stopping_while_it_is_being_resumed(gateway: FakeGateway, settings: Message) -> None:
    speak = asyncio.Event()

    async def go_on(line: Line, message: Message) -> None:
        await speak.wait()
        await until_stopped(line, message)

    gateway.scripts["resume"] = go_on
    async with AsyncClient(**settings, reconnect=AT_ONCE) as client:
        async with Down(gateway, client) as down:
            pass
        await gateway.got("resume")
        await down.stream.stop()
        await client.ping()
        assert "stop" not in told(gateway)
        speak.set()
        assert [token async for token in down.tokens] == ["is "]
        assert down.stream.result.done_reason == "cancelled"
    assert told(gateway) == ["generate", ("resume", 1), "ping", "stop"]


async def test_what_ended_meanwhile_need_not_be_stopped(gateway: FakeGateway, settings: Message) -> None:
    async def end(line: Line, message: Message) -> None:
        await line.end(message["id"], 2)

    gateway.scripts["resume"] = end
    async with AsyncClient(**settings, reconnect=AT_ONCE) as client:
        async with Down(gateway, client) as down:
            await down.stream.stop()
        assert [token async for token in down.tokens] == []
        assert down.stream.result.done_reason == "stop"
        await client.ping()
    assert told(gateway) == ["generate", ("resume", 1), "ping"]


async def test_what_was_stopped_is_not_sent_again(gateway: FakeGateway, settings: Message) -> None:
    door = Door(gateway)
    gateway.scripts["generate"] = drop_at_once
    async with AsyncClient(**settings, reconnect=AT_ONCE) as client:
        request = asyncio.create_task(client.generate("why?", request_id="mine"))
        await door.knocked.wait()
        await client.stop("mine")
        door.open.set()
        with pytest.raises(RequestCancelledError):
            await request
    assert told(gateway) == ["generate", ("resume", -1)]


@pytest.mark.parametrize("answer", ["NOT_FOUND", "DUPLICATE_ID"])
async def test_leaving_what_is_about_to_be_sent_again(answer: str, gateway: FakeGateway, settings: Message) -> None:
    """The gateway finds nothing, the user leaves, and then the second sending finds that the first had arrived."""
    sent_again = asyncio.Event()
    left = asyncio.Event()

    async def answer_late(line: Line, message: Message) -> None:
        sent_again.set()
        await left.wait()
        await refuse(answer)(line, message)

    gateway.scripts["generate"] = in_turn(drop_at_once, answer_late)
    gateway.scripts["resume"] = in_turn(refuse("NOT_FOUND"), until_stopped)
    async with AsyncClient(**settings, reconnect=AT_ONCE) as client:
        async with client.generate("why?", stream=True):
            await sent_again.wait()
        await client.ping()
        assert "stop" not in told(gateway)
        left.set()
        if answer == "DUPLICATE_ID":
            await gateway.got("stop")
        await client.ping()
        assert client._left == {}
    expected = ["generate", ("resume", -1), "generate"]
    if answer == "DUPLICATE_ID":
        expected += [("resume", -1), "stop"]
    assert [kind for kind in told(gateway) if kind != "ping"] == expected


async def test_leaving_before_it_is_sent_again(
    gateway: FakeGateway, settings: Message, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server may have it all the same, so it is asked once more; but nothing is sent that nobody awaits."""
    monkeypatch.setattr(aio, "MEND_BURST", 1)
    monkeypatch.setattr(aio, "MEND_PAUSE_S", 0.0125)
    paused, refused, left = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def pause(span: float) -> None:
        if span == 0.0125:
            paused.set()
            await left.wait()
        else:
            await asyncio.sleep(span)

    monkeypatch.setattr(aio, "sleep", pause)
    door = Door(gateway)
    gateway.scripts["generate"] = drop_at_once
    async with AsyncClient(**settings, reconnect=AT_ONCE) as client:
        client.on("error", lambda _: refused.set())
        async with client.generate("why?", stream=True):
            await door.knocked.wait()
            async with client.generate("never sent", stream=True):
                door.open.set()
                await paused.wait()
                await refused.wait()
        left.set()
        await gateway.got("resume", 2)
        await client.ping()
        assert client._left == {}
    assert told(gateway) == ["generate", ("resume", -1), ("resume", -1), "ping"]


async def test_closing_while_there_is_no_line(gateway: FakeGateway, settings: Message) -> None:
    client = AsyncClient(**settings, reconnect=AT_ONCE)
    await client.connect()
    async with Down(gateway, client) as down:
        left = client.generate("never sent", stream=True)
        await left.start()
        await client.close()
        with pytest.raises(ConnectionLostError, match="closed") as error:
            await anext(down.tokens)
        assert error.value.partial == "the sky "
        with pytest.raises(NotConnectedError, match="closed"):
            _ = left.result
    assert client.active == 0
    gateway.scripts["generate"] = until_stopped
    await client.connect()
    await client.ping()
    await client.close()
    assert told(gateway) == ["generate", "ping"]  # nothing of before


async def test_closing_on_a_line_is_for_good(gateway: FakeGateway, settings: Message) -> None:
    gateway.scripts["generate"] = hold
    client = AsyncClient(**settings)
    await client.connect()
    stream = client.generate("why?", stream=True)
    tokens = aiter(stream)
    await anext(tokens)
    await client.close()
    with pytest.raises(ConnectionLostError, match="closed"):
        _ = [token async for token in tokens]
    await gateway.lines[0].socket.wait_closed()
    assert gateway.lines[0].socket.close_code == 1000
    assert client._left == {}


async def test_what_is_remembered_is_bounded(
    gateway: FakeGateway, settings: Message, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(aio, "LEFT_MAX", 2)
    gateway.scripts |= {"generate": hold, "resume": until_stopped}
    door = Door(gateway)
    async with AsyncClient(**settings, reconnect=AT_ONCE) as client:
        streams = [client.generate("why?", stream=True, images=[b"large"]) for _ in range(4)]
        for stream in streams:
            await stream.start()
        await gateway.got("generate", 4)
        gateway.lines[0].drop()
        await door.knocked.wait()
        for stream in streams:
            await stream.aclose()
        assert list(client._left) == [stream.id for stream in streams[2:]]
        assert all(request.message == {} for request in client._left.values())
        door.open.set()
        await gateway.got("stop", 2)
    assert [kind for kind in told(gateway) if kind != "generate"].count("stop") == 2


async def test_the_id_of_a_request_that_was_left_is_in_use_until_its_end(
    gateway: FakeGateway, settings: Message
) -> None:
    """What still comes with it would else be taken for the new request's."""
    gateway.scripts |= {"generate": in_turn(hold, gateway.scripts["generate"]), "stop": nothing}
    async with AsyncClient(**settings) as client:
        async with client.generate("why?", stream=True, request_id="mine"):
            pass
        assert list(client._left) == ["mine"]
        with pytest.raises(InvalidRequestError, match="in use"):
            await client.generate("why?", request_id="mine")
        await gateway.lines[-1].token("mine", "not yours", 0)
        await gateway.lines[-1].end("mine", 1, "cancelled")
        await client.ping()
        assert (await client.generate("hi", request_id="mine")).text == "hi"


async def test_a_slow_reader_is_stopped_on_the_next_line_if_need_be(gateway: FakeGateway, settings: Message) -> None:
    """Its stop is lost with the line; what still comes for it holds nobody up."""

    async def flood(line: Line, message: Message) -> None:
        for seq in range(4):
            await line.token(message["id"], "x", seq)

    async def flood_on(line: Line, message: Message) -> None:
        for seq in range(4, 400):
            await line.token(message["id"], "x", seq)
        await line.stopped(message["id"]).wait()
        await line.end(message["id"], 400, "cancelled")

    gateway.scripts |= {
        "generate": flood,
        "stop": in_turn(drop_at_once, gateway.scripts["stop"]),
        "resume": flood_on,
    }
    waits = 0
    async with AsyncClient(**settings, reconnect=AT_ONCE, stream_buffer=4, stall_timeout_s=0.01) as client:
        await_room = client._await_room

        async def count(request: Any) -> None:
            nonlocal waits
            waits += 1
            await await_room(request)

        client._await_room = count  # type: ignore[method-assign]
        stream = client.generate("why?", stream=True)
        await stream.start()
        await gateway.got("stop", 2)
        await client.ping()
        assert client._left == {}
        with pytest.raises(SlowConsumerError):
            assert [token async for token in stream] == ["x"] * 4
    assert waits == 1


# --- several gateways -------------------------------------------------------------------------------------------------


async def test_gateways_are_tried_in_order(
    gateways: list[FakeGateway], settings: Message, unused_tcp_port_factory: Callable[[], int]
) -> None:
    one, other = gateways
    nowhere = f"http://127.0.0.1:{unused_tcp_port_factory()}"
    urls = (nowhere, one.url, other.url)
    async with AsyncClient(**settings | {"server_url": urls}, reconnect=AT_ONCE) as client:
        assert client.server_url == one.url
        one.scripts["generate"] = drop_at_once
        assert (await client.generate("hi")).text == "hi"
        assert client.server_url == other.url
        assert told(other) == [("resume", -1), "generate"]
        other.scripts["generate"] = drop_at_once
        one.scripts["resume"] = lambda line, message: line.end(message["id"], 0)
        await client.generate("hi")  # by way of the one that does not answer
        assert client.server_url == one.url
    assert (len(one.lines), len(other.lines)) == (2, 1)


async def test_no_gateway(settings: Message, unused_tcp_port_factory: Callable[[], int]) -> None:
    urls = [f"ws://127.0.0.1:{unused_tcp_port_factory()}" for _ in range(2)]
    with pytest.raises(NotConnectedError, match=f"{urls[0]}.*refused.*; {urls[1]}.*refused"):
        await AsyncClient(**settings | {"server_url": urls}).connect()
    with pytest.raises(ValueError, match="at least one gateway"):
        AsyncClient(**settings | {"server_url": []})


async def test_a_refused_identity_is_refused_everywhere(gateways: list[FakeGateway], settings: Message) -> None:
    urls = [gateway.url for gateway in gateways]
    with pytest.raises(AuthenticationError):
        await AsyncClient(**settings | {"server_url": urls, "client_id": "nobody"}).connect()
    assert [len(gateway.lines) for gateway in gateways] == [1, 0]


# --- the deadline -----------------------------------------------------------------------------------------------------


async def test_what_is_sent_again_has_less_time(gateway: FakeGateway, settings: Message) -> None:
    door = Door(gateway)
    gateway.scripts["generate"] = in_turn(drop_at_once, gateway.scripts["generate"])
    async with AsyncClient(**settings, reconnect=AT_ONCE) as client:
        stream = client.generate("hi", stream=True, deadline_ms=60_000)
        stream._request.entered -= 1000  # its time runs from its sending
        await stream.start()
        await door.knocked.wait()
        stream._request.entered -= 20
        door.open.set()
        assert [token async for token in stream] == ["hi"]
    assert gateway.received[0]["deadlineMs"] == 60_000
    assert 0 < gateway.received[2]["deadlineMs"] <= 40_000
    assert gateway.received[2]["deadlineMs"] != 1


@pytest.mark.parametrize(("spent_s", "left_ms"), [(0, 5000), (2, 3000), (60, 1)])
def test_what_is_sent_later_has_less_time(spent_s: float, left_ms: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "monotonic", lambda: 100.0)
    request = aio._Request({"id": "r", "model": "tiny", "deadlineMs": 5000}, streamed=False)
    monkeypatch.setattr(time, "monotonic", lambda: 100.0 + spent_s)
    assert request.asked() == {"id": "r", "model": "tiny", "deadlineMs": left_ms}


# --- a gateway that is going to leave ---------------------------------------------------------------------------------


async def test_what_a_draining_gateway_refuses_goes_on_the_next_line(gateway: FakeGateway, settings: Message) -> None:
    async def leave(line: Line, message: Message) -> None:
        await line.send("draining")
        await refuse("SHUTTING_DOWN")(line, message)
        await line.socket.close(1001)

    async def serve(line: Line, message: Message) -> None:
        await say(line, message["id"], 0, 4)
        await line.end(message["id"], 4)

    gateway.scripts["generate"] = in_turn(leave, serve)
    async with AsyncClient(**settings, reconnect=AT_ONCE) as client:
        assert (await client.generate("why?")).text == "the sky is blue"
    assert told(gateway) == ["generate", "generate"]


async def test_shutting_down_without_draining_is_an_answer(gateway: FakeGateway, settings: Message) -> None:
    gateway.scripts["generate"] = refuse("SHUTTING_DOWN")
    async with AsyncClient(**settings, reconnect=AT_ONCE) as client:
        with pytest.raises(WeftlineError) as caught:
            await client.generate("why?")
    assert caught.value.code == "SHUTTING_DOWN"
