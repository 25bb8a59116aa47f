"""Six processes started by hand share the load, survive each other, and end when told."""

import contextlib
import json
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from weftline_client import Client, ConnectionLostError

from tests.processes import ROOT, Process, started
from workers.embedded.simulated import transcript


@dataclass
class Parts:
    """broker, gateway, two workers and two engines."""

    broker: Process
    gateway: Process
    workers: list[Process]
    engines: list[Process]
    gateways_address: str
    workers_address: str
    url: str
    engine_urls: list[str]
    config: Path

    def weftline(self, *arguments: str) -> Any:
        """Run a command of `weftline` and return its JSON."""
        result = subprocess.run(
            [sys.executable, "-m", "cli.main", *arguments, "--json"],
            capture_output=True,
            text=True,
            timeout=30,
            cwd=ROOT,
            check=True,
        )
        return json.loads(result.stdout)

    def hosts(self) -> set[str]:
        return {host["name"] for host in self.weftline("hosts", "--broker", self.gateways_address)}

    def busy(self) -> list[int]:
        """What each engine itself counts."""
        counts = []
        for url in self.engine_urls:
            slots = httpx.get(f"{url}/debug/slots", trust_env=False).json()["models"].values()
            counts.append(sum(slot["busy"] for slot in slots))
        return counts


@pytest.fixture
def parts(tmp_path: Path) -> Iterator[Parts]:
    with contextlib.ExitStack() as stack:

        def start(module: str, *arguments: str) -> Process:
            return stack.enter_context(started(module, *arguments))

        created = subprocess.run(
            [
                sys.executable,
                "-m",
                "cli.main",
                "keys",
                "create",
                "app",
                "--out",
                str(tmp_path / "keys"),
                "--data-dir",
                str(tmp_path / "data"),
            ],
            capture_output=True,
            text=True,
            cwd=ROOT,
            check=False,
        )
        assert created.returncode == 0, created.stderr
        engines = [
            start("workers.embedded", "--simulated", "--tokens-per-s", "200", "--slots", "2", "--listen", "127.0.0.1:0")
            for _ in range(2)
        ]
        broker = start("broker", "--gateways", "tcp://127.0.0.1:*", "--workers", "tcp://127.0.0.1:*")
        listening = broker.find(r"gateways=(\S+) workers=(\S+)")
        gateway = start(
            *("gateway", "--broker", listening[1], "--listen", "127.0.0.1:0", "--data-dir", str(tmp_path / "data"))
        )
        url = gateway.find(r"listening url=(\S+)")[1]
        engine_urls = [engine.find(r"engine listening on (\S+)")[1] for engine in engines]
        for engine_url in engine_urls:  # so that hosts are alike: one is not loaded for a short wait
            httpx.post(f"{engine_url}/api/generate", json={"model": "llama2"}, trust_env=False).raise_for_status()
        workers = [
            start("workers", "--broker", listening[2], "--name", f"host-{n}", "--ollama", f"{engine_url},slots=2")
            for n, engine_url in enumerate(engine_urls, 1)
        ]
        for worker in workers:
            worker.find("registered")
        config = tmp_path / "keys" / "app_config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"serverUrl": url}))
        running = Parts(broker, gateway, workers, engines, listening[1], listening[2], url, engine_urls, config)
        wait_until(lambda: running.hosts() == {"host-1", "host-2"}, "both workers are registered")
        yield running


def wait_until(condition: Any, what: str, timeout_s: float = 10.0) -> None:
    """Wait for what no event tells a test."""
    pause = threading.Event()
    for _ in range(int(timeout_s / 0.02)):
        if condition():
            return
        pause.wait(0.02)
    raise AssertionError(f"not within {timeout_s} s: {what}")


def test_two_workers_share_the_load(parts: Parts) -> None:
    with Client.from_config(parts.config) as client:
        streams = [client.generate(f"p{n}", stream=True, options={"num_predict": 1000}) for n in range(4)]
        threads = [threading.Thread(target=lambda s=stream: list(s)) for stream in streams]
        for thread in threads:
            thread.start()
        wait_until(lambda: parts.busy() == [2, 2], "four streams fill both engines")
        jobs = parts.weftline("ps", "--broker", parts.gateways_address)
        assert sorted(job["host"] for job in jobs) == ["host-1", "host-1", "host-2", "host-2"]
        for thread in threads:
            thread.join(30)
        for number, stream in enumerate(streams):
            assert stream.result.text == transcript(f"p{number}", 0, 1000)
        assert {stream.result.host for stream in streams} == {"host-1", "host-2"}


def test_a_killed_idle_worker_leaves_the_list_and_costs_no_request(parts: Parts) -> None:
    parts.workers[0].signal(signal.SIGKILL)
    wait_until(lambda: parts.hosts() == {"host-2"}, "the dead worker is off the list", 4.0)
    with Client.from_config(parts.config) as client:
        assert client.generate("p", options={"num_predict": 3}).host == "host-2"


def test_requests_of_a_dead_worker_that_had_not_started_go_elsewhere(parts: Parts) -> None:
    """The engine of one host says nothing; its worker dies; the client sees nothing of it."""
    hang = {"kind": "hang", "after": 0, "count": 10}
    httpx.post(f"{parts.engine_urls[0]}/debug/faults", json=hang, trust_env=False).raise_for_status()
    with Client.from_config(parts.config) as client:
        streams = [client.generate(f"p{n}", stream=True, options={"num_predict": 5}) for n in range(4)]
        threads = [threading.Thread(target=lambda s=stream: list(s)) for stream in streams]
        for thread in threads:
            thread.start()
        wait_until(lambda: parts.busy()[0] == 2, "two requests hang")
        parts.workers[0].signal(signal.SIGKILL)
        for thread in threads:
            thread.join(30)
        for number, stream in enumerate(streams):
            assert stream.result.text == transcript(f"p{number}", 0, 5)
            assert stream.result.host == "host-2"
        assert sorted(stream.result.attempts or 0 for stream in streams) == [1, 1, 2, 2]


def test_a_worker_that_stops_for_a_while_comes_back(parts: Parts) -> None:
    parts.workers[0].signal(signal.SIGSTOP)
    try:
        wait_until(lambda: parts.hosts() == {"host-2"}, "the stopped worker is off the list")
    finally:
        parts.workers[0].signal(signal.SIGCONT)
    wait_until(lambda: parts.hosts() == {"host-1", "host-2"}, "it is back")


def test_an_engine_that_dies_is_noticed_and_so_is_its_return(parts: Parts) -> None:
    port = parts.engine_urls[0].rsplit(":", 1)[1]
    parts.engines[0].signal(signal.SIGKILL)
    parts.engines[0].wait()

    def ups() -> list[bool]:
        hosts = parts.weftline("hosts", "--broker", parts.gateways_address)
        return [engine["up"] for host in sorted(hosts, key=lambda h: h["name"]) for engine in host["engines"]]

    wait_until(lambda: ups() == [False, True], "the engine is down")
    with Client.from_config(parts.config) as client:
        assert client.generate("p", options={"num_predict": 3}).host == "host-2"
    with started("workers.embedded", "--simulated", "--listen", f"127.0.0.1:{port}"):
        wait_until(lambda: ups() == [True, True], "the engine is back")


def test_a_broker_that_restarts_is_found_again_by_all(parts: Parts) -> None:
    parts.broker.signal(signal.SIGKILL)
    parts.broker.wait()
    with started("broker", "--gateways", parts.gateways_address, "--workers", parts.workers_address):
        wait_until(lambda: parts.hosts() == {"host-1", "host-2"}, "both workers are back")
        http_url = parts.url.replace("ws://", "http://")
        wait_until(lambda: httpx.get(f"{http_url}/readyz", trust_env=False).status_code == 200, "the gateway is ready")
        with Client.from_config(parts.config) as client:
            assert client.generate("p", options={"num_predict": 3}).text == transcript("p", 0, 3)


def test_stop_reaches_the_engine(parts: Parts) -> None:
    with Client.from_config(parts.config) as client:
        stream = client.generate("p", stream=True, options={"num_predict": 10_000})
        for _ in stream:
            assert sum(parts.busy()) == 1
            break  # leaving the loop stops the request
        wait_until(lambda: sum(parts.busy()) == 0, "the engine is idle")


def test_every_part_ends_when_told(parts: Parts) -> None:
    with Client.from_config(parts.config, reconnect=None) as client:
        stream = client.generate("p", stream=True, options={"num_predict": 10_000})
        tokens = iter(stream)
        next(tokens)
        parts.gateway.signal(signal.SIGINT)  # at once: SIGTERM lets the stream finish
        with pytest.raises(ConnectionLostError):
            list(tokens)
    assert parts.gateway.wait() == 0
    for process in (*parts.workers, parts.broker, *parts.engines):
        process.signal(signal.SIGTERM)
        assert process.wait() == 0


def test_up_runs_everything_and_takes_its_parts_along(tmp_path: Path) -> None:
    """`weftline up`, killed with -9, leaves nothing behind; started again it ends cleanly with Ctrl-C."""
    ports = port, gateways, workers = [free_port() for _ in range(3)]
    config = tmp_path / "up.toml"
    config.write_text(
        f'[up]\nport = {port}\ngateways = "tcp://127.0.0.1:{gateways}"\nworkers_port = "tcp://127.0.0.1:{workers}"\n'
    )
    arguments = ["up", "--engine", "simulated", "--workers", "2", "--data-dir", str(tmp_path), "--config", str(config)]
    with started("cli.main", *arguments) as up:
        up.find("weftline is up")
        up.find("simulated engine")
        key = up.find(r"client key\s+(\S+)")[1]
        with Client.from_config(key) as client:
            assert client.generate("p", options={"num_predict": 4}).text == transcript("p", 0, 4)
        up.signal(signal.SIGKILL)
        up.wait()
        wait_until(lambda: not any(map(listens, ports)), "every part of the dead `up` has ended")
    with started("cli.main", *arguments) as up:
        up.find("weftline is up")
        another = subprocess.run(
            [sys.executable, "-m", "cli.main", *arguments], capture_output=True, text=True, timeout=30, cwd=ROOT
        )
        assert another.returncode == 1
        assert f"another `weftline up` (process {up.pid}) runs on the data dir {tmp_path}" in another.stderr
        up.signal(signal.SIGINT)
        assert up.wait() == 0
        up.find("Stopped")
        assert not any(map(listens, ports))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
