"""Peers: how they are had, started and ended. No test installs one: a stand-in does what they do."""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import httpx
import psutil
import pytest

from bench.fabric import BenchError
from bench.peers import PEERS, LiteLLM, Nginx, OllamaHerd, Peer, ensure

SERVER = """
import http.server, pathlib, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/up" else 404)
        self.end_headers()
    def log_message(self, *_): pass
pathlib.Path("started").touch()
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


class StandIn(Peer):
    """A server that answers /up, or a script that ends."""

    name = "stand-in"
    ready = "/up"
    script = SERVER
    there = True

    def installed(self) -> bool:
        return self.there

    async def install(self) -> None:
        raise BenchError("it is nowhere to be had")

    async def version(self) -> str:
        return "1"

    def command(self, folder: Path, engine_url: str, port: int, token: str) -> tuple[Sequence[str], Mapping[str, str]]:
        return (sys.executable, "-c", self.script, str(port)), {"STAND_IN": "1"}


async def test_a_peer_runs_for_the_length_of_the_block(tmp_path: Path) -> None:
    async with StandIn(tmp_path).running(tmp_path / "home", "http://127.0.0.1:1") as running:
        (started,) = running.processes
        assert started.is_running()
        assert (tmp_path / "home/started").exists()
        environment = started.environ()
        assert environment["STAND_IN"] == "1"
        assert environment["HOME"] == str(tmp_path / "home")
        assert "VIRTUAL_ENV" not in environment
        async with httpx.AsyncClient(base_url=running.url, trust_env=False) as client:
            assert (await client.get("/up")).status_code == 200
        await running.settled()
    assert not psutil.pid_exists(started.pid)
    await running.settled()  # there is nothing to wait for


async def test_a_peer_that_ends_at_its_start_tells_why(tmp_path: Path) -> None:
    peer = StandIn(tmp_path)
    peer.script = "print('the port is taken')"
    with pytest.raises(BenchError, match=r"(?s)stand-in ended at its start.*the port is taken"):
        async with peer.running(tmp_path / "home", "http://127.0.0.1:1"):
            pass


async def test_only_what_is_missing_is_installed_and_only_if_wanted(tmp_path: Path) -> None:
    peer = StandIn(tmp_path)
    await ensure(peer, install=True)
    peer.there = False
    with pytest.raises(BenchError, match="without --quick"):
        await ensure(peer, install=False)
    with pytest.raises(BenchError, match="nowhere to be had"):
        await ensure(peer, install=True)


async def test_what_cannot_be_installed_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "apt-get").write_text("#!/bin/sh\necho first\necho no network >&2\nexit 100\n")
    (tmp_path / "apt-get").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    with pytest.raises(BenchError, match=r"apt-get .*failed: no network"):
        await Nginx(tmp_path / "cache").install()
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    with pytest.raises(BenchError, match="no apt-get"):
        await Nginx(tmp_path / "cache").install()


async def test_a_broken_installation_is_none(tmp_path: Path) -> None:
    """Only what came to its end counts; and the folder is another for another version."""
    peer = OllamaHerd(tmp_path)
    (tmp_path / peer.requirement / "bin").mkdir(parents=True)
    (tmp_path / peer.requirement / "bin/herd").touch()
    assert not peer.installed()
    (tmp_path / peer.requirement / "installed").touch()
    assert peer.installed()
    assert peer.requirement == f"ollama-herd=={await peer.version()}"


@pytest.mark.parametrize("kind", PEERS)
def test_peers_listen_on_loopback_only_and_tell_nobody(
    kind: type[Peer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "nginx").touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    command, environment = kind(tmp_path).command(tmp_path, "http://127.0.0.1:11434", 12345, "sk-key")
    assert all(isinstance(part, str) for part in command)
    if kind is Nginx:
        config = (tmp_path / "nginx.conf").read_text()
        assert "listen 127.0.0.1:12345;" in config
        assert "server 127.0.0.1:11434;" in config
        assert "proxy_buffering off;" in config
        assert config.count("{") == config.count("}")
    else:
        assert command[command.index("--host") + 1] == "127.0.0.1"
        assert command[command.index("--port") + 1] == "12345"
    if kind is OllamaHerd:
        assert environment["FLEET_NODE_TELEMETRY"] == environment["FLEET_TELEMETRY"] == "false"
    if kind is LiteLLM:
        config = json.loads((tmp_path / "config.yaml").read_text())
        assert config["model_list"][0]["litellm_params"]["api_base"] == "http://127.0.0.1:11434"
        assert config["general_settings"]["master_key"] == "sk-key"
        assert command[command.index("--telemetry") + 1] == "False"
