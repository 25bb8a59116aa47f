"""Bodies that are larger than a message pass through real processes in parts, and none of these holds them."""

import contextlib
import hashlib
import json
import os
import re
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from gateway.hints import READ_MAX
from gateway.store import Store
from tests.processes import Process, started

MIB = 2**20
GROWTH_MAX = 24 * MIB
BODY_MAX = 64 * MIB
BLOB_MAX = 96 * MIB


class Engine(ThreadingHTTPServer):
    """What a worker needs of Ollama, and what came: (path, bytes, digest). It reads no further than `held` allows."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.came: list[tuple[str, int, str]] = []
        self.broken = 0
        self.blobs: set[str] = set()
        self.stall_at: int | None = None
        """So many bytes of a body are read; then `stalled` says so, and it waits for `go_on`."""
        self.stalled = threading.Event()
        self.go_on = threading.Event()
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def stall(self, at: int | None) -> None:
        self.stall_at = at
        self.stalled.clear()
        self.go_on.clear()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        self.broken += 1


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Engine

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        details = {"family": "llama", "families": ["llama"]}
        models = [{"name": "m:latest", "model": "m:latest", "size": 1, "digest": "d" * 64, "details": details}]
        answers: dict[str, Any] = {"/api/version": {"version": "0.24.0"}, "/api/tags": {"models": models}}
        self._answer(answers.get(self.path, {"models": []}))

    def do_HEAD(self) -> None:
        self.send_response(200 if self.path.rpartition("/")[2] in self.server.blobs else 404)
        self.end_headers()

    def do_POST(self) -> None:
        engine, left = self.server, int(self.headers["content-length"])
        sha256, size = hashlib.sha256(), 0
        while left:
            if engine.stall_at is not None and size >= engine.stall_at:
                engine.stalled.set()
                assert engine.go_on.wait(30)
            piece = self.rfile.read(min(left, 2**16))
            if not piece:
                raise ConnectionResetError
            sha256.update(piece)
            size, left = size + len(piece), left - len(piece)
        if self.path == "/api/show":
            self._answer({"capabilities": ["completion"]})
            return
        engine.came.append((self.path, size, sha256.hexdigest()))
        if self.path.startswith("/api/blobs/"):
            engine.blobs.add(self.path.rpartition("/")[2])
            self._answer(None, 201)
        else:
            done = {"model": "m", "message": {"role": "assistant", "content": "seen"}, "done": True, "eval_count": 1}
            self._answer(done)

    def _answer(self, document: Any, status: int = 200) -> None:
        body = b"" if document is None else json.dumps(document).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@dataclass
class Parts:
    broker: Process
    gateway: Process
    workers: dict[str, Process]
    engines: dict[str, Engine]
    url: str
    workers_address: str
    gateways_address: str
    headers: dict[str, str]
    stack: contextlib.ExitStack

    @property
    def processes(self) -> dict[str, Process]:
        return {"broker": self.broker, "gateway": self.gateway, **self.workers}

    def start_worker(self, name: str) -> None:
        arguments = ("--broker", self.workers_address, "--name", name, "--ollama", self.engines[name].url)
        self.workers[name] = self.stack.enter_context(started("workers", *arguments))
        self.workers[name].find("registered")

    def start_broker(self) -> None:
        addresses = ("--gateways", self.gateways_address, "--workers", self.workers_address)
        self.broker = self.stack.enter_context(started("broker", *addresses))
        self.broker.find("listening")

    def spooled(self) -> int:
        """Files without a name that the gateway has open."""
        found = 0
        for fd in Path(f"/proc/{self.gateway.pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                found += "(deleted)" in os.readlink(fd)
        return found


def wait_until(condition: Callable[[], bool], what: str, timeout_s: float = 20.0) -> None:
    pause = threading.Event()
    for _ in range(int(timeout_s / 0.02)):
        if condition():
            return
        pause.wait(0.02)
    raise AssertionError(f"not within {timeout_s} s: {what}")


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Parts]:
    folder = tmp_path_factory.mktemp("large")
    with contextlib.closing(Store.open(folder)) as store:
        _, secret = store.add_token("app", scopes=("inference", "models:read", "models:write"), models=("*",))
        store.set_alias("image-model", "m")
    config = folder / "weftline.toml"
    config.write_text(
        f"[gateway]\nbody_bytes_max = {BODY_MAX}\nblob_bytes_max = {BLOB_MAX}\nspool_bytes_max = {2 * BLOB_MAX}\n"
        "[worker]\npoll_interval_s = 0.5\n"
    )
    with contextlib.ExitStack() as stack:
        engines = {name: Engine() for name in ("host-1", "host-2")}
        for engine in engines.values():
            stack.callback(engine.server_close)
            stack.callback(engine.shutdown)
        broker = stack.enter_context(
            started("broker", "--gateways", "tcp://127.0.0.1:*", "--workers", "tcp://127.0.0.1:*")
        )
        listening = broker.find(r"gateways=(\S+) workers=(\S+)")
        gateway = stack.enter_context(
            started(
                *("gateway", "--broker", listening[1], "--listen", "127.0.0.1:0", "--data-dir", str(folder)),
                *("--config", str(config)),
            )
        )
        url = gateway.find(r"listening url=ws(\S+)")[1]
        headers = {"authorization": f"Bearer {secret}"}
        running = Parts(broker, gateway, {}, engines, f"http{url}", listening[2], listening[1], headers, stack)
        for name in engines:
            running.start_worker(name)
        wait_until(lambda: httpx.get(f"http{url}/readyz", trust_env=False).json()["workers"] == 2, "all are there")
        yield running


@pytest.fixture
def http(parts: Parts) -> Iterator[httpx.Client]:
    for engine in parts.engines.values():
        engine.came.clear()
        engine.stall(None)
    with httpx.Client(base_url=parts.url, headers=parts.headers, trust_env=False, timeout=60) as client:
        yield client
    for engine in parts.engines.values():
        engine.go_on.set()
    wait_until(lambda: parts.spooled() == 0, "nothing is left of a body")


def chat(size: int, model: str = "m") -> bytes:
    """A chat with an image, of about so many bytes."""
    image = b"iVBOR" + hashlib.sha256(b"image").hexdigest().encode() * (size // 64)
    message = b'{"role":"user","content":"what is this?","images":["%b"]}' % image
    return b'{"messages":[%b],"model":"%b","stream":false}' % (message, model.encode())


def came(parts: Parts) -> list[tuple[str, int, str]]:
    return [request for engine in parts.engines.values() for request in engine.came]


def memory(process: Process) -> int:
    """Bytes that only this process has in memory: a file that it looks at is not its own."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    found = re.search(r"RssAnon:\s+(\d+) kB", status)
    assert found is not None
    return int(found[1]) * 1024


@contextlib.contextmanager
def watched(parts: Parts) -> Iterator[dict[str, int]]:
    """By how much each process grew at most."""
    before = {name: memory(process) for name, process in parts.processes.items()}
    most = dict.fromkeys(before, 0)
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.002):
            for name, process in parts.processes.items():
                most[name] = max(most[name], memory(process) - before[name])

    watching = threading.Thread(target=watch)
    watching.start()
    try:
        yield most
    finally:
        over.set()
        watching.join()


def test_a_large_body_arrives_as_it_was_sent_and_nobody_holds_it(parts: Parts, http: httpx.Client) -> None:
    body = chat(40 * MIB)
    http.post("/api/chat", content=chat(2 * MIB)).raise_for_status()
    for engine in parts.engines.values():
        engine.came.clear()
    with watched(parts) as grown:
        answer = http.post("/api/chat", content=body)
    assert (answer.status_code, answer.json()["message"]["content"]) == (200, "seen")
    assert came(parts) == [("/api/chat", len(body), hashlib.sha256(body).hexdigest())]
    assert max(grown.values()) < GROWTH_MAX, grown


def test_a_body_whose_length_is_not_announced(parts: Parts, http: httpx.Client) -> None:
    body = chat(5 * MIB)
    pieces = (body[start : start + 100_000] for start in range(0, len(body), 100_000))
    assert http.post("/v1/chat/completions", content=pieces).status_code == 200
    assert came(parts) == [("/v1/chat/completions", len(body), hashlib.sha256(body).hexdigest())]


@pytest.mark.parametrize("size", [3 * MIB, READ_MAX + MIB])
def test_an_alias_stands_for_its_model_in_a_large_body_too(parts: Parts, http: httpx.Client, size: int) -> None:
    body = chat(size, "image-model") + b"\n \n"
    assert http.post("/api/chat", content=body).status_code == 200
    expected = body.rstrip()[:-1] + b',"model":"m"}'
    assert came(parts) == [("/api/chat", len(expected), hashlib.sha256(expected).hexdigest())]


@pytest.mark.parametrize(
    ("head", "words"),
    [
        (b'{"model":"m","MODEL":"other","p":"', "write 'model', not 'MODEL'"),
        (b'{"Name":"m","p":"', "write 'name', not 'Name'"),
        (b'{"p":"', "model is required"),
        (b'{"model":7,"p":"', "not the JSON that was expected"),
        (b'["', "not the JSON that was expected"),
    ],
)
@pytest.mark.parametrize("size", [2 * MIB, READ_MAX + MIB])
def test_a_large_body_that_names_no_model(http: httpx.Client, head: bytes, words: str, size: int) -> None:
    response = http.post("/api/chat", content=head + b"x" * size + b'"}')
    assert (response.status_code, response.json()["code"]) == (400, "INVALID_MESSAGE")
    assert words in response.json()["error"]


def announced(parts: Parts, path: str, length: int, body: bytes) -> socket.socket:
    """A request that says that it has so many bytes."""
    address = urlsplit(parts.url)
    connection = socket.create_connection((address.hostname, address.port), timeout=20)
    head = f"POST {path} HTTP/1.1\r\nhost: localhost\r\nauthorization: {parts.headers['authorization']}\r\n"
    connection.sendall(f"{head}content-length: {length}\r\n\r\n".encode() + body)
    return connection


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("/api/chat", b'{"error":"a request may have at most 67108864 bytes","code":"TOO_LARGE"}'),
        ("/v1/chat/completions", b'"type":"api_error","param":null,"code":"TOO_LARGE"'),
        ("/v1/messages", b'"type":"request_too_large"'),
        (f"/api/blobs/sha256:{'0' * 64}", b"at most 100663296 bytes"),
    ],
)
def test_what_announces_itself_as_too_large_is_refused_at_once(parts: Parts, path: str, words: bytes) -> None:
    with announced(parts, path, 2**40, b"") as connection:
        answer = b""
        while words not in answer and (more := connection.recv(65536)):
            answer += more
        assert b" 413 " in answer
        assert words in answer


def test_what_turns_out_to_be_too_large_is_refused(http: httpx.Client) -> None:
    def pieces() -> Iterator[bytes]:
        yield b'{"model":"m","p":"'
        for _ in range(BODY_MAX // MIB):
            yield b"x" * MIB

    response = http.post("/api/chat", content=pieces())
    assert (response.status_code, response.json()["code"]) == (413, "TOO_LARGE")


def test_more_than_the_gateway_keeps_is_refused(parts: Parts, http: httpx.Client) -> None:
    with contextlib.ExitStack() as stack:
        for _ in range(3):  # they say that they are large, and come to 60 MiB each
            connection = announced(parts, "/api/chat", BODY_MAX, chat(60 * MIB)[: 60 * MIB])
            stack.enter_context(connection)
        wait_until(lambda: parts.spooled() == 3, "all of them are being kept")
        wait_until(lambda: http.post("/api/chat", content=chat(30 * MIB)).status_code == 503, "there is no room left")
    wait_until(lambda: parts.spooled() == 0, "they are gone")
    assert http.post("/api/chat", content=chat(30 * MIB)).status_code == 200


def test_whoever_leaves_before_all_was_sent_leaves_nothing(parts: Parts, http: httpx.Client) -> None:
    with announced(parts, "/api/chat", 20 * MIB, chat(8 * MIB)[: 8 * MIB]):
        wait_until(lambda: parts.spooled() == 1, "it is being kept")
    wait_until(lambda: parts.spooled() == 0, "it is gone")
    assert came(parts) == []


def stalled(parts: Parts) -> str:
    """The host whose engine stopped reading."""
    wait_until(lambda: any(engine.stalled.is_set() for engine in parts.engines.values()), "an engine stalls")
    return next(name for name, engine in parts.engines.items() if engine.stalled.is_set())


def test_whoever_leaves_while_it_is_passed_on_stops_it(parts: Parts, http: httpx.Client) -> None:
    for engine in parts.engines.values():
        engine.stall(10 * MIB)
    broken = {name: engine.broken for name, engine in parts.engines.items()}
    body = chat(30 * MIB)
    with announced(parts, "/api/chat", len(body), body):
        host = stalled(parts)
    wait_until(lambda: parts.spooled() == 0, "it is gone")
    parts.engines[host].go_on.set()
    wait_until(lambda: parts.engines[host].broken > broken[host], "the engine sees that its client left")
    assert came(parts) == []


@contextlib.contextmanager
def posting(http: httpx.Client, body: bytes) -> Iterator[list[httpx.Response]]:
    """A request of another thread; its answer is there at the end."""
    answers: list[httpx.Response] = []
    thread = threading.Thread(target=lambda: answers.append(http.post("/api/chat", content=body)))
    thread.start()
    try:
        yield answers
    finally:
        thread.join(60)


def test_a_host_that_dies_while_a_body_comes_is_replaced(parts: Parts, http: httpx.Client) -> None:
    body = chat(30 * MIB)
    for engine in parts.engines.values():
        engine.stall(10 * MIB)
    with posting(http, body) as answers:
        host = stalled(parts)
        for engine in parts.engines.values():
            engine.stall_at = None
        parts.workers[host].signal(signal.SIGKILL)
    parts.engines[host].go_on.set()
    assert [answer.status_code for answer in answers] == [200]
    assert came(parts) == [("/api/chat", len(body), hashlib.sha256(body).hexdigest())]
    parts.start_worker(host)


def test_a_body_goes_on_over_a_restart_of_the_broker(parts: Parts, http: httpx.Client) -> None:
    body = chat(30 * MIB)
    for engine in parts.engines.values():
        engine.stall(10 * MIB)
    with posting(http, body) as answers:
        host = stalled(parts)
        parts.broker.signal(signal.SIGKILL)
        parts.broker.wait()
        parts.engines[host].go_on.set()
        parts.start_broker()
    assert [answer.status_code for answer in answers] == [200]
    assert came(parts) == [("/api/chat", len(body), hashlib.sha256(body).hexdigest())]


def test_a_blob_is_sent_to_the_hosts_that_lack_it(parts: Parts, http: httpx.Client) -> None:
    wait_until(lambda: len(http.get("/fabric/models").json()["models"][0]["hosts"]) == 2, "both hosts are there")
    data = os.urandom(MIB) * 64
    digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
    path = f"/api/blobs/{digest}"
    assert http.head(path).status_code == 404
    assert http.post(f"{path}?hosts=host-1", content=data[: 3 * MIB]).json()["error"].startswith("digest mismatch")
    assert http.post(f"{path}?hosts=host-1", content=data).status_code == 201
    assert http.head(f"{path}?hosts=host-1").status_code == 200
    assert http.head(path).status_code == 404
    with watched(parts) as grown:
        assert (
            http.post(path, content=(data[start : start + MIB] for start in range(0, len(data), MIB))).status_code
            == 201
        )
    assert max(grown.values()) < GROWTH_MAX, grown
    sent = ("/api/blobs/" + digest, len(data), digest.removeprefix("sha256:"))
    assert parts.engines["host-1"].came == parts.engines["host-2"].came == [sent]
    assert http.head(path).status_code == 200
    assert http.post(path, content=b"not read").status_code == 200
