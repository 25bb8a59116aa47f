"""`weftline chat`: a client of the gateway at the terminal.

The answer, and nothing else, goes to stdout; prompts, places in the queue and a model's thinking go to stderr.
"""

import contextlib
import json
import os
import stat
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Final

import typer
from weftline_client import (
    AuthenticationError,
    Client,
    ConnectionLostError,
    NotConnectedError,
    NoWorkersError,
    Result,
    WeftlineError,
)

from cli.fleet import age
from cli.settings import ClientSettings, KeyOption, ModelOption, UrlOption, websocket_url
from common import logs
from common.command import ConfigOption, DataDirOption, JsonOption
from common.errors import AuthError, ProcessError, UnreachableError, UsageError
from common.ollama import progress_words

_QUOTE: Final = '"""'
INTERRUPTED: Final = 130
"""Exit status after Ctrl-C: 128 + SIGINT, as in every shell."""


def chat(
    prompt: Annotated[
        str | None, typer.Argument(help="What to ask; text piped into stdin follows it. Neither: a conversation.")
    ] = None,
    model: ModelOption = None,
    system: Annotated[str | None, typer.Option(help="What the model is told first.")] = None,
    option: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="An option of Ollama, temperature=0; repeatable.")
    ] = None,
    url: UrlOption = None,
    key: KeyOption = None,
    data_dir: DataDirOption = None,
    as_json: JsonOption = False,
    config: ConfigOption = None,
) -> int:
    """Ask a model, and print its answer as it comes; without a prompt, hold a conversation with it."""
    settings = ClientSettings.load({"url": url, "key": key, "model": model, "data_dir": data_dir}, config=config)
    logs.setup(level=settings.log_level, fmt=settings.log_format)
    options = parse_options(option or ())
    text = _with_piped(prompt)
    if text is not None and not text.strip():
        raise UsageError("the prompt is empty.")
    with connected(settings) as client:
        conversation = Conversation(client, settings.model or default_model(client.models()), system, options, as_json)
        if text is not None:
            return conversation.ask(text)
        return _converse(conversation)


# The connection -------------------------------------------------------------------------------------------------------


def client_arguments(settings: ClientSettings) -> dict[str, Any]:
    """The gateway and the identity, as arguments of `AsyncClient` and `Client`.

    Raises:
        AuthError: there is no such key, or it can't be read.
        UsageError: the files are not a client's, or the URL is none.
    """
    from weftline_client.credentials import load_config

    path = settings.key_file
    with key_told(path):
        arguments = load_config(path)
        # The path in a config is absolute; keys are found beside it also after their folder was moved.
        beside = path.parent / arguments["private_key_path"].name
        if not arguments["private_key_path"].exists() and beside.exists():
            arguments["private_key_path"] = beside
    if settings.url:
        arguments["server_url"] = settings.url
    elif "server_url" in arguments:
        websocket_url(arguments["server_url"])
    return arguments


@contextlib.contextmanager
def connected(settings: ClientSettings) -> Iterator[Client]:
    """A client on an authenticated line; its errors, then and later, become those of a command.

    Raises:
        AuthError: no key, or the gateway refuses it.
        UnreachableError: no gateway.
        ProcessError: a request failed.
    """
    arguments = client_arguments(settings)
    with key_told(settings.key_file):
        client = Client(**arguments)
    try:
        with client:
            try:
                yield client
            except ConnectionLostError:
                client.connect()  # if the gateway refuses this client by now, that is what is wrong
                raise
    except WeftlineError as error:
        raise told(error) from None


@contextlib.contextmanager
def key_told(path: Path) -> Iterator[None]:
    """Reading a client's files: what fails becomes an error of the command, as `client_arguments` has it."""
    try:
        yield
    except FileNotFoundError as error:
        raise AuthError(
            f"there is no client key {error.filename}. `weftline up` makes one on its machine; elsewhere make one with "
            "`weftline keys create NAME` and pass --key NAME_config.json."
        ) from None
    except OSError as error:
        raise AuthError(f"cannot read the client key {error.filename}: {error.strerror}.") from None
    except ValueError as error:
        raise UsageError(f"{path} can't be used: {error}. Make a key with `weftline keys create NAME`.") from None


def told(error: WeftlineError) -> ProcessError:
    """A client's error as a command's: what is wrong, what to do, and the exit status."""
    match error:
        case AuthenticationError():
            return AuthError(
                f"the gateway refuses this client's key ({error.message}): it is not registered there, or was revoked. "
                "See `weftline keys list` on the gateway's machine, or make another with `weftline keys create NAME` "
                "and pass --key NAME_config.json."
            )
        case NotConnectedError():
            return UnreachableError(
                f"the gateway can't be reached: {error.message}. Start it with `weftline up` or `weftline gateway`, or "
                "name another with --url."
            )
        case NoWorkersError():
            return UnreachableError(f"{error.message} ({error.code}). See what `weftline doctor` says.")
    return ProcessError(f"{error.message} ({error.code})")


def default_model(names: Sequence[str]) -> str:
    """The first model: gateways tell those that one can talk to before those that only embed.

    Raises:
        UnreachableError: there is no model at all.
    """
    if not names:
        raise UnreachableError("no model can be served now. See `weftline hosts`, or ask `weftline doctor`.")
    return names[0]


def parse_options(entries: Sequence[str]) -> dict[str, Any]:
    """KEY=VALUE entries; a value that reads as JSON is that, any other is text.

    Raises:
        UsageError: an entry is not KEY=VALUE.
    """
    options: dict[str, Any] = {}
    for entry in entries:
        name, found, value = entry.partition("=")
        if not found or not name:
            raise UsageError(f"--option must read KEY=VALUE, like temperature=0, not {entry!r}.")
        try:
            options[name] = json.loads(value)
        except ValueError:
            options[name] = value
    return options


def _with_piped(prompt: str | None) -> str | None:
    """The prompt and what is piped in; None: there is neither. Only pipes and files are read, for they end."""
    if sys.stdin is None or sys.stdin.isatty():
        return prompt
    try:
        mode = os.fstat(sys.stdin.fileno()).st_mode
    except (OSError, ValueError):
        return prompt
    if not (stat.S_ISFIFO(mode) or stat.S_ISREG(mode)):
        return prompt
    piped = sys.stdin.read().strip()
    if not piped:
        return "" if prompt is None else prompt
    return piped if prompt is None else f"{prompt}\n\n{piped}"


# The conversation -----------------------------------------------------------------------------------------------------


class Conversation:
    """Messages so far, and where answers go."""

    def __init__(
        self, client: Client, model: str, system: str | None, options: dict[str, Any], as_json: bool = False
    ) -> None:
        self.model = model
        self.messages: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
        self.client = client
        self._options = options
        self._json = as_json
        self._status = _Status()
        client.on("queued", self._on_queued)
        client.on("pulling", self._on_pulling)

    def ask(self, text: str) -> int:
        """Print the answer as it comes and keep it as context; returns the exit status.

        Ctrl-C stops the answer; what had come of it counts as said. A question without an answer is forgotten.

        Raises:
            WeftlineError: it failed.
        """
        self.messages.append({"role": "user", "content": text})
        stream = self.client.chat(self.messages, self.model, stream=True, options=self._options or None)
        interrupted = False
        try:
            with stream:
                for token in stream:
                    if token.thinking:
                        self._status.aside(token.thinking)
                    else:
                        self._status.clear()
                    self._event("token", text=token, seq=token.seq, thinking=token.thinking)
                    self._say(token)
        except KeyboardInterrupt:
            interrupted = True
        except WeftlineError as error:
            self.messages.pop()
            self._event("error", code=error.code, error=error.message)
            raise
        finally:
            self._status.clear()
            if stream.text:
                self._say("\n")
        if interrupted and not stream.text:
            self.messages.pop()
        else:
            self.messages.append({"role": "assistant", "content": stream.text})
        if not interrupted:
            self._result(stream.result)
        return INTERRUPTED if interrupted else 0

    def _say(self, text: str) -> None:
        if not self._json:
            sys.stdout.write(text)
            sys.stdout.flush()

    def _event(self, kind: str, **facts: Any) -> None:
        if self._json:
            facts = {name: value for name, value in facts.items() if value is not None}
            print(json.dumps({"type": kind, **facts}, ensure_ascii=False), flush=True)

    def _result(self, result: Result) -> None:
        timings = result.timings
        self._event(
            "result",
            id=result.id,
            model=result.model,
            text=result.text,
            thinking=result.thinking or None,
            toolCalls=result.tool_calls or None,
            totalTokens=result.total_tokens,
            promptTokens=result.prompt_tokens,
            doneReason=result.done_reason,
            elapsedTime=result.elapsed_time_ms,
            host=result.host,
            attempts=result.attempts,
            migrated=result.migrated,
            timings={
                "queueMs": timings.queue_ms,
                "loadMs": timings.load_ms,
                "firstTokenMs": timings.first_token_ms,
            },
        )

    def _on_queued(self, message: dict[str, Any]) -> None:
        """On the client's thread, before the first token."""
        self._event("queued", position=message["position"], etaMs=message.get("etaMs"))
        eta_ms = message.get("etaMs")
        eta = "" if eta_ms is None else f", about {age(eta_ms)} more"
        self._status.show(f"waiting for a free host: number {message['position']} in the queue{eta}")

    def _on_pulling(self, message: dict[str, Any]) -> None:
        """On the client's thread, before the first token."""
        facts = {name: message.get(name) for name in ("status", "digest", "total", "completed")}
        self._event("pulling", **facts)
        self._status.show(f"no host has {message['model']} yet: {progress_words(message)}")


class _Status:
    """What the person at the terminal may like to know, dimmed; nothing if stderr is no terminal."""

    def __init__(self) -> None:
        self._on = sys.stderr.isatty()
        self._end = ""

    def show(self, text: str) -> None:
        """A line that the next one replaces."""
        self._write("\r\x1b[K", text, end="\r\x1b[K")

    def aside(self, text: str) -> None:
        """Text that stays."""
        self._write("" if self._end == "\n" else self._end, text, end="\n")

    def clear(self) -> None:
        """Make room for the answer."""
        if self._end:
            self._write(self._end, "", end="")

    def _write(self, before: str, text: str, *, end: str) -> None:
        if self._on:
            sys.stderr.write(f"{before}\x1b[2m{text}\x1b[0m")
            sys.stderr.flush()
            self._end = end


def _converse(conversation: Conversation) -> int:
    """Ask whatever is typed until Ctrl-D or /bye. A failed question is told, a lost line opened again."""
    with contextlib.suppress(ImportError):  # Windows has none
        import readline  # noqa: F401  (gives `input` its line editing and history)
    print(f"Talking to {conversation.model}. Ctrl-C stops an answer, /bye or Ctrl-D leaves.", file=sys.stderr)
    while True:
        try:
            text = _read(">>> ")
            if text.strip() == "/bye":
                return 0
            if text.strip():
                conversation.ask(text)
        except EOFError:
            print(file=sys.stderr)
            return 0
        except KeyboardInterrupt:
            print("\nCtrl-D or /bye leaves.", file=sys.stderr)
        except NotConnectedError as error:
            print(f"weftline: {error.message}; connecting again …", file=sys.stderr)
            conversation.client.connect()
        except WeftlineError as error:
            print(f"weftline: {told(error)}", file=sys.stderr)


def _read(prompt: str) -> str:
    """One question: a line, or several between triple quotes."""
    text = _line(prompt)
    if not text.startswith(_QUOTE):
        return text
    text = text.removeprefix(_QUOTE)
    while not text.rstrip().endswith(_QUOTE):
        text += f"\n{_line('... ')}"
    return text.rstrip().removesuffix(_QUOTE)


def _line(prompt: str) -> str:
    if sys.stdout.isatty():
        return input(prompt)  # not written by us: line editing must know how wide it is
    print(prompt, end="", file=sys.stderr, flush=True)
    return input()
