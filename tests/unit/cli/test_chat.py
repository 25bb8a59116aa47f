"""`weftline chat` and `weftline models` against a gateway that says what it is told to."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from anyio.from_thread import BlockingPortal
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from cli.chat import default_model, parse_options
from cli.main import main
from common.errors import ProcessError, UsageError
from tests.unit.cli.conftest import write_config
from tests.unit.client.fake_gateway import FakeGateway, Line, echo

Capture = pytest.CaptureFixture[str]


# One question ---------------------------------------------------------------------------------------------------------


def test_the_answer_and_nothing_else_is_on_stdout(config: Path, gateway: FakeGateway, capsys: Capture) -> None:
    assert main(["chat", "--key", str(config), "Why is it?"]) == 0
    shown = capsys.readouterr()
    assert shown.out == "Why is it?\n"
    assert shown.err == ""
    (asked,) = [message for message in gateway.received if message["type"] == "chat"]
    assert asked["messages"] == [{"role": "user", "content": "Why is it?"}]
    assert asked["model"] == "llama2"


def test_model_system_and_options_are_sent(config: Path, gateway: FakeGateway) -> None:
    arguments = ["--model", "tiny", "--system", "Be brief.", "--option", "temperature=0", "--option", "stop=END"]
    assert main(["chat", "--key", str(config), *arguments, "Hello"]) == 0
    asked = gateway.received[-1]
    assert asked["model"] == "tiny"
    assert asked["messages"][0] == {"role": "system", "content": "Be brief."}
    assert asked["options"] == {"temperature": 0, "stop": "END"}
    assert [message["type"] for message in gateway.received] == ["chat"]  # it need not ask for models


def test_json_is_an_object_per_line(config: Path, gateway: FakeGateway, capsys: Capture) -> None:
    async def script(line: Line, message: dict[str, Any]) -> None:
        await line.send("pulling", id=message["id"], model="tiny", status="pulling manifest")
        await line.send("queued", id=message["id"], position=2, etaMs=500)
        await echo(line, message)

    gateway.scripts["chat"] = script
    assert main(["chat", "--key", str(config), "--json", "so be it"]) == 0
    *events, result = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert events == [
        {"type": "pulling", "status": "pulling manifest"},
        {"type": "queued", "position": 2, "etaMs": 500},
        {"type": "token", "text": "so ", "seq": 0},
        {"type": "token", "text": "be ", "seq": 1},
        {"type": "token", "text": "it", "seq": 2},
    ]
    assert (result["type"], result["text"], result["totalTokens"]) == ("result", "so be it", 3)
    assert (result["host"], result["doneReason"]) == ("gpu-1", "stop")
    assert result["timings"] == {"queueMs": 1, "loadMs": 2, "firstTokenMs": 3}


@pytest.fixture
def piped(monkeypatch: pytest.MonkeyPatch) -> Iterator[io.TextIOBase]:
    """Text written here and closed is what is piped into the command."""
    reading, writing = os.pipe()
    with os.fdopen(reading) as stdin, os.fdopen(writing, "w") as pipe:
        monkeypatch.setattr("sys.stdin", stdin)
        yield pipe


def test_a_piped_prompt(config: Path, piped: io.TextIOBase, capsys: Capture) -> None:
    piped.write("from a pipe\n")
    piped.close()
    assert main(["chat", "--key", str(config)]) == 0
    assert capsys.readouterr().out == "from a pipe\n"


def test_piped_text_follows_the_prompt(config: Path, gateway: FakeGateway, piped: io.TextIOBase) -> None:
    piped.write("a file")
    piped.close()
    assert main(["chat", "--key", str(config), "Summarise:"]) == 0
    assert gateway.received[-1]["messages"][-1]["content"] == "Summarise:\n\na file"


def test_an_empty_pipe_alone_is_a_usage_error(config: Path, piped: io.TextIOBase, capsys: Capture) -> None:
    piped.close()
    assert main(["chat", "--key", str(config)]) == 2
    assert "the prompt is empty" in capsys.readouterr().err


def test_an_empty_pipe_does_not_matter_beside_a_prompt(config: Path, piped: io.TextIOBase, capsys: Capture) -> None:
    piped.close()
    assert main(["chat", "--key", str(config), "Hello"]) == 0
    assert capsys.readouterr().out == "Hello\n"


# What is wrong --------------------------------------------------------------------------------------------------------


def test_an_unknown_model_fails_with_those_there_are(config: Path, gateway: FakeGateway, capsys: Capture) -> None:
    async def script(line: Line, message: dict[str, Any]) -> None:
        error = "model 'nope' is on no host; there are: llama2"
        await line.send("error", id=message["id"], error=error, code="MODEL_NOT_FOUND", models=["llama2"])

    gateway.scripts["chat"] = script
    assert main(["chat", "--key", str(config), "--model", "nope", "--json", "Hello"]) == 1
    shown = capsys.readouterr()
    assert shown.err == "weftline: model 'nope' is on no host; there are: llama2 (MODEL_NOT_FOUND)\n"
    assert json.loads(shown.out)["code"] == "MODEL_NOT_FOUND"


def test_what_came_before_an_error_is_shown(config: Path, gateway: FakeGateway, capsys: Capture) -> None:
    async def script(line: Line, message: dict[str, Any]) -> None:
        await line.token(message["id"], "half", 0)
        await line.send("error", id=message["id"], error="its host died", code="WORKER_LOST")

    gateway.scripts["chat"] = script
    assert main(["chat", "--key", str(config), "Hello"]) == 1
    shown = capsys.readouterr()
    assert shown.out == "half\n"
    assert "its host died (WORKER_LOST)" in shown.err


def test_without_a_key_it_says_how_to_make_one(capsys: Capture) -> None:
    assert main(["models"]) == 77
    assert "weftline keys create NAME" in capsys.readouterr().err


def test_a_key_that_is_named_and_missing(tmp_path: Path, capsys: Capture) -> None:
    config = write_config(tmp_path, b"", "ws://127.0.0.1:1")
    (tmp_path / "me_key.pem").unlink()
    assert main(["models", "--key", str(config)]) == 77
    assert f"there is no client key {tmp_path / 'me_key.pem'}" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["not JSON", "{}", "[]"])
def test_a_config_that_is_none(content: str, tmp_path: Path, capsys: Capture) -> None:
    path = tmp_path / "x_config.json"
    path.write_text(content)
    assert main(["chat", "--key", str(path), "Hello"]) == 2
    assert "is not a client's config" in capsys.readouterr().err


def test_a_key_file_that_is_none(tmp_path: Path, capsys: Capture) -> None:
    config = write_config(tmp_path, b"not a key", "ws://127.0.0.1:1")
    assert main(["models", "--key", str(config)]) == 2
    assert "Failed to load private key" in capsys.readouterr().err


def test_an_unknown_client_is_not_authenticated(tmp_path: Path, gateway: FakeGateway, capsys: Capture) -> None:
    pem = Ed25519PrivateKey.generate().private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    config = write_config(tmp_path, pem, gateway.url, "stranger")
    assert main(["chat", "--key", str(config), "Hello"]) == 77
    assert "the gateway refuses this client's key" in capsys.readouterr().err


def test_no_gateway_is_unreachable(config: Path, capsys: Capture) -> None:
    assert main(["models", "--key", str(config), "--url", "ws://127.0.0.1:1"]) == 69
    assert "the gateway can't be reached: ws://127.0.0.1:1" in capsys.readouterr().err


def test_a_client_revoked_in_an_answer_is_refused_not_unreachable(
    config: Path, gateway: FakeGateway, capsys: Capture
) -> None:
    async def script(line: Line, message: dict[str, Any]) -> None:
        await line.token(message["id"], "half", 0)
        gateway.clients.clear()
        await line.socket.close(1008, "this client was revoked")

    gateway.scripts["chat"] = script
    assert main(["chat", "--key", str(config), "Hello"]) == 77
    shown = capsys.readouterr()
    assert shown.out == "half\n"
    assert "the gateway refuses this client's key" in shown.err
    assert "can't be reached" not in shown.err


def test_an_answer_that_is_lost_though_the_gateway_is_there(
    config: Path, gateway: FakeGateway, capsys: Capture
) -> None:
    async def script(line: Line, message: dict[str, Any]) -> None:
        await line.token(message["id"], "half", 0)
        line.drop()

    gateway.scripts["chat"] = script
    assert main(["chat", "--key", str(config), "Hello"]) == 69
    assert "the server no longer has the request" in capsys.readouterr().err


def test_no_host_and_no_broker_are_unreachable(config: Path, gateway: FakeGateway, capsys: Capture) -> None:
    async def script(line: Line, message: dict[str, Any]) -> None:
        await line.send("error", id=message["id"], error="the broker does not answer", code="NO_WORKERS")

    gateway.scripts["chat"] = script
    assert main(["chat", "--key", str(config), "Hello"]) == 69
    assert "the broker does not answer (NO_WORKERS). See what `weftline doctor` says" in capsys.readouterr().err


@pytest.mark.parametrize(("given", "meant"), [("127.0.0.1:3000", "ws://127.0.0.1:3000"), ("http://h", "ws://h")])
def test_a_url_that_is_none_is_a_usage_error(given: str, meant: str, config: Path, capsys: Capture) -> None:
    assert main(["models", "--key", str(config), "--url", given]) == 2
    assert f"{given!r} is not the URL of a gateway; it must read like {meant}\n" in capsys.readouterr().err


def test_the_key_is_found_beside_its_config_after_both_were_moved(config: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    moved.mkdir()
    for path in (config, tmp_path / "me_key.pem"):
        path.rename(moved / path.name)
    assert main(["models", "--key", str(moved / config.name)]) == 0


def test_the_key_where_the_config_says_goes_before_one_beside_it(config: Path, tmp_path: Path, capsys: Capture) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / config.name).write_bytes(config.read_bytes())
    (other / "me_key.pem").write_text("another's")
    assert main(["models", "--key", str(other / config.name)]) == 0


def test_a_bad_option_is_a_usage_error(config: Path, capsys: Capture) -> None:
    assert main(["chat", "--key", str(config), "--option", "temperature", "Hello"]) == 2
    assert "--option must read KEY=VALUE" in capsys.readouterr().err


# Models ---------------------------------------------------------------------------------------------------------------


def test_models(config: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEFTLINE_KEY", str(config))
    assert main(["models"]) == 0
    assert capsys.readouterr().out == "llama2\ntiny\n"
    assert main(["models", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == ["llama2", "tiny"]


def test_no_models(config: Path, gateway: FakeGateway, capsys: Capture) -> None:
    gateway.scripts["models"] = lambda line, _: line.send("models_result", models=[])
    assert main(["models", "--key", str(config)]) == 0
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "No model can be served" in shown.err
    assert main(["chat", "--key", str(config), "Hello"]) == 69
    assert "no model can be served now" in capsys.readouterr().err


def test_no_model_to_choose() -> None:
    with pytest.raises(ProcessError, match="weftline doctor"):
        default_model([])


def test_options_are_json_where_they_read_as_it() -> None:
    assert parse_options(["a=1", "b=0.5", 'c=["x"]', "d=word", "e=", "f=x=y", "g=true"]) == {
        "a": 1,
        "b": 0.5,
        "c": ["x"],
        "d": "word",
        "e": "",
        "f": "x=y",
        "g": True,
    }
    with pytest.raises(UsageError):
        parse_options(["=1"])


# A conversation -------------------------------------------------------------------------------------------------------


def _type(monkeypatch: pytest.MonkeyPatch, *lines: str | type[BaseException]) -> None:
    """What the person types, one line after the other; an exception is a key like Ctrl-C."""
    typed = iter(lines)

    def read(_prompt: str = "") -> str:
        line = next(typed)
        if isinstance(line, str):
            return line
        raise line

    monkeypatch.setattr("builtins.input", read)


def _conversations(gateway: FakeGateway) -> list[list[str]]:
    return [[turn["content"] for turn in m["messages"]] for m in gateway.received if m["type"] == "chat"]


def test_a_conversation_keeps_its_context(
    config: Path, gateway: FakeGateway, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    _type(monkeypatch, "one", "", '"""two', 'lines"""', KeyboardInterrupt, "three", EOFError)
    assert main(["chat", "--key", str(config)]) == 0
    assert _conversations(gateway) == [
        ["one"],
        ["one", "one", "two\nlines"],
        ["one", "one", "two\nlines", "two\nlines", "three"],
    ]
    shown = capsys.readouterr()
    assert shown.out == "one\ntwo\nlines\nthree\n"
    assert "Ctrl-D or /bye leaves" in shown.err


def test_a_question_that_fails_is_told_and_forgotten(
    config: Path, gateway: FakeGateway, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    async def script(line: Line, message: dict[str, Any]) -> None:
        if message["messages"][-1]["content"] == "bad":
            await line.send("error", id=message["id"], error="the engine failed", code="BACKEND_ERROR")
        else:
            await echo(line, message)

    gateway.scripts["chat"] = script
    _type(monkeypatch, "bad", "good", "/bye")
    assert main(["chat", "--key", str(config)]) == 0
    assert _conversations(gateway) == [["bad"], ["good"]]
    assert "weftline: the engine failed (BACKEND_ERROR)" in capsys.readouterr().err


def test_a_lost_line_is_opened_again(
    config: Path, gateway: FakeGateway, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """The first answer can't be resumed: the gateway, made anew, has forgotten it."""

    async def script(line: Line, message: dict[str, Any]) -> None:
        gateway.scripts["chat"] = echo
        await line.token(message["id"], "half", 0)
        line.drop()

    gateway.scripts["chat"] = script
    _type(monkeypatch, "lost", "found", "/bye")
    assert main(["chat", "--key", str(config)]) == 0
    shown = capsys.readouterr()
    assert "connecting again" in shown.err
    assert shown.out == "half\nfound\n"


def test_a_line_that_comes_back_to_a_stranger_ends_it(
    config: Path, gateway: FakeGateway, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    async def script(line: Line, message: dict[str, Any]) -> None:
        gateway.clients.clear()
        line.drop()

    gateway.scripts["chat"] = script
    _type(monkeypatch, "lost", "never asked", "/bye")
    assert main(["chat", "--key", str(config)]) == 77
    assert "the gateway refuses this client's key" in capsys.readouterr().err


# At a terminal --------------------------------------------------------------------------------------------------------


async def _talk_until_stopped(line: Line, message: dict[str, Any]) -> None:
    """Wait in the queue, say one word, and go on only when told to stop."""
    await line.send("pulling", id=message["id"], model="tiny", status="pulling dde5", total=200, completed=50)
    await line.send("queued", id=message["id"], position=3)
    await line.send("queued", id=message["id"], position=1, etaMs=4_500)
    await line.send("stream_start", id=message["id"], model=message["model"])
    await line.token(message["id"], "hmm", 0, thinking="let me see")
    await line.token(message["id"], "once ", 1)
    await line.stopped(message["id"]).wait()
    await line.end(message["id"], 2, "cancelled")


@pytest.mark.skipif(sys.platform == "win32", reason="needs pseudo-terminals")
class TestTerminal:
    """A person at a pseudo-terminal."""

    def test_ctrl_c_stops_the_answer_and_the_conversation_goes_on(
        self, config: Path, gateway: FakeGateway, portal: BlockingPortal
    ) -> None:
        gateway.scripts["chat"] = _talk_until_stopped
        with _Terminal(["chat", "--key", str(config)]) as terminal:
            terminal.expect(">>> ")
            terminal.write("tell me\n")
            terminal.expect("no host has tiny yet: pulling dde5, 25 %")
            terminal.expect("number 3 in the queue")
            terminal.expect("number 1 in the queue, about 4.5 s more")
            terminal.expect("let me see")
            terminal.expect("once ")
            terminal.write("\x03")
            portal.call(gateway.got, "stop")
            terminal.expect(">>> ")
            gateway.scripts["chat"] = echo
            terminal.write("go on\n")
            terminal.expect("go on\r\n>>> ")
            assert terminal.finish("\x04") == 0
        assert _conversations(gateway)[1] == ["tell me", "hmmonce ", "go on"]

    def test_ctrl_c_in_a_single_answer_is_130(self, config: Path, gateway: FakeGateway, portal: BlockingPortal) -> None:
        gateway.scripts["chat"] = _talk_until_stopped
        with _Terminal(["chat", "--key", str(config), "tell me"]) as terminal:
            terminal.expect("once ")
            assert terminal.finish("\x03") == 130
        portal.call(_gone, gateway)


async def _gone(gateway: FakeGateway) -> None:
    await gateway.lines[-1].socket.wait_closed()


_COMMAND = """
import fcntl, signal, sys, termios
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background of a shell
fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # the terminal that Ctrl-C comes from
from cli.main import main
sys.exit(main())
"""


class _Terminal:
    """A command on a terminal of 80 columns. Waiting for text that never comes fails after `PATIENCE_S`."""

    PATIENCE_S = 20.0

    def __init__(self, arguments: Sequence[str]) -> None:
        import pty

        self._fd, child = pty.openpty()
        self._seen = ""
        environment = os.environ | {"TERM": "dumb", "COLUMNS": "80"}
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _COMMAND, *arguments],
                stdin=child,
                stdout=child,
                stderr=child,
                env=environment,
                start_new_session=True,
            )
        finally:
            os.close(child)

    def __enter__(self) -> "_Terminal":
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait()
        os.close(self._fd)

    def write(self, text: str) -> None:
        os.write(self._fd, text.encode())

    def expect(self, text: str) -> None:
        """Read until `text`, and past it."""
        import select

        give_up = time.monotonic() + self.PATIENCE_S
        while text not in self._seen:
            ready, _, _ = select.select([self._fd], [], [], max(0, give_up - time.monotonic()))
            assert ready, f"{text!r} did not come after {self._seen!r}"
            self._seen += os.read(self._fd, 65536).decode()
        self._seen = self._seen.partition(text)[2]

    def finish(self, text: str) -> int:
        """Type the last thing; the exit status."""
        self.write(text)
        return self._process.wait(self.PATIENCE_S)
