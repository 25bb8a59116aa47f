"""`weftline models`: what can be asked, and the fleet's models pulled, removed, kept in memory, found.

The operations are HTTP requests to the gateway (docs/http-api.md). Who may read and write the registry needs no key for
them: one is made for the length of the command. Progress goes to stderr, a bar for each host on a terminal.
"""

import contextlib
import json
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Any, Final, NoReturn

import httpx
import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TransferSpeedColumn

from cli.chat import client_arguments, connected
from cli.fleet import print_json, print_table
from cli.keys import DEFAULT_URL
from cli.settings import ClientSettings, KeyOption, UrlOption
from common import logs
from common.command import ConfigOption, DataDirOption, JsonOption, exits
from common.errors import AuthError, ProcessError, UnreachableError, UsageError
from common.ollama import progress_words
from common.protocol import short_name
from gateway.store import FILE_NAME, Scope, Store

OPERATOR: Final = "operator"
"""The client in whose name a command acts that was given no key."""
KEY_LIVES: Final = timedelta(hours=12)
"""Of a key made for a command, should the command not live to revoke it."""

app = typer.Typer(name="models", add_completion=False, rich_markup_mode=None)

TokenOption = Annotated[
    str | None,
    typer.Option("--token", help="An API token. [one made for this command]", envvar="WEFTLINE_TOKEN", metavar="KEY"),
]
HostOption = Annotated[list[str] | None, typer.Option("--host", help="Only there. Repeatable. [all]", metavar="NAME")]
LabelOption = Annotated[
    list[str] | None, typer.Option("--label", help="Only where this is so. Repeatable.", metavar="KEY=VALUE")
]
ModelArgument = Annotated[str, typer.Argument(metavar="MODEL")]


@app.callback(invoke_without_command=True)
def models(
    context: typer.Context,
    url: UrlOption = None,
    key: KeyOption = None,
    data_dir: DataDirOption = None,
    as_json: JsonOption = False,
    config: ConfigOption = None,
) -> None:
    """List the models that can be asked; the commands below act on the whole fleet."""
    if context.invoked_subcommand is None:
        exits(_list)({"url": url, "key": key, "data_dir": data_dir}, config, as_json=as_json)


def _list(flags: dict[str, Any], config: Path | None, *, as_json: bool) -> int:
    settings = ClientSettings.load(flags, config=config)
    logs.setup(level=settings.log_level, fmt=settings.log_format)
    with connected(settings) as client:
        names = client.models()
    if as_json:
        print_json(names)
    elif names:
        print("\n".join(names))
    else:
        print("No model can be served: no host is connected, or none has a model (`ollama pull`).", file=sys.stderr)
    return 0


@app.command()
@exits
def pull(
    model: ModelArgument,
    host: HostOption = None,
    label: LabelOption = None,
    copies: Annotated[int | None, typer.Option(min=1, help="On so many hosts. [all]")] = None,
    url: UrlOption = None,
    token: TokenOption = None,
    data_dir: DataDirOption = None,
    config: ConfigOption = None,
) -> int:
    """Pull a model on all hosts, or on those that are named."""
    body = {"model": model, **_choice(host, label), **({"copies": copies} if copies else {})}
    with (
        _gateway(url, token, data_dir, config) as http,
        http.stream("POST", "/api/pull", params={"detail": "hosts"}, json=body) as response,
    ):
        _check(response)
        last = _show(json.loads(line) for line in response.iter_lines())
    if "error" in last:
        raise ProcessError(last["error"])
    print(f"{model} is on {', '.join(entry['host'] for entry in last['hosts'])}.")
    return 0


@app.command()
@exits
def rm(
    model: ModelArgument,
    host: HostOption = None,
    url: UrlOption = None,
    token: TokenOption = None,
    data_dir: DataDirOption = None,
    config: ConfigOption = None,
) -> int:
    """Delete a model from all hosts that have it, or from those that are named."""
    with _gateway(url, token, data_dir, config) as http:
        body = {"model": model, **_choice(host)}
        answer = _check(http.request("DELETE", "/api/delete", params={"detail": "hosts"}, json=body)).json()
    print(f"{model} was deleted on {', '.join(entry['host'] for entry in answer['hosts'])}.")
    return 0


@app.command()
@exits
def where(
    model: Annotated[str | None, typer.Argument(metavar="MODEL")] = None,
    url: UrlOption = None,
    token: TokenOption = None,
    data_dir: DataDirOption = None,
    as_json: JsonOption = False,
    config: ConfigOption = None,
) -> int:
    """Say which hosts have a model, or each of all models, and which hold it in memory."""
    with _gateway(url, token, data_dir, config) as http:
        found = _check(http.get("/fabric/models")).json()["models"]
        pulls = _check(http.get("/fabric/pulls")).json()["pulls"]
    wanted = None if model is None else model.removesuffix(":latest")
    found = [entry for entry in found if wanted in (None, entry["name"])]
    if as_json:
        print_json(found)
        return 0
    for one in pulls:
        if wanted in (None, one["model"]):
            hosts = ", ".join(one["hosts"])
            print(f"{one['model']} is being pulled on {hosts}: {progress_words(one)}", file=sys.stderr)
    if not found:
        raise ProcessError(f"no host has {model}." if model else "no host has a model.")
    rows = [
        [
            entry["name"],
            host["host"],
            host["digest"].removeprefix("sha256:")[:12],
            f"{host['sizeBytes'] / 2**30:.1f} GiB",
            "yes" if host["resident"] else "no",
            f"{host['busy']}/{host['slots']}",
        ]
        for entry in found
        for host in entry["hosts"]
    ]
    print_table(["MODEL", "HOST", "DIGEST", "SIZE", "IN MEMORY", "BUSY/SLOTS"], rows)
    return 0


@app.command()
@exits
def pin(
    model: ModelArgument,
    host: HostOption = None,
    label: LabelOption = None,
    url: UrlOption = None,
    token: TokenOption = None,
    data_dir: DataDirOption = None,
    config: ConfigOption = None,
) -> int:
    """Load a model and keep it in memory, on all hosts that have it or on those that are named."""
    return _load(model, -1, "is kept in memory", host, label, url, token, data_dir, config)


@app.command()
@exits
def unload(
    model: ModelArgument,
    host: HostOption = None,
    label: LabelOption = None,
    url: UrlOption = None,
    token: TokenOption = None,
    data_dir: DataDirOption = None,
    config: ConfigOption = None,
) -> int:
    """Let a model go from memory, when nothing runs on it any more."""
    return _load(model, 0, "is let go", host, label, url, token, data_dir, config)


@app.command()
@exits
def alias(
    name: Annotated[str | None, typer.Argument(metavar="NAME")] = None,
    model: Annotated[str | None, typer.Argument(metavar="MODEL")] = None,
    back: Annotated[bool, typer.Option("--back", help="Let NAME stand for what it stood for before.")] = False,
    delete: Annotated[bool, typer.Option("--delete", help="Let NAME stand for nothing.")] = False,
    data_dir: DataDirOption = None,
    as_json: JsonOption = False,
    config: ConfigOption = None,
) -> int:
    """Let NAME stand for MODEL, for all clients at once; without names, list what stands for what."""
    if (back or delete) and (name is None or model is not None or (back and delete)):
        raise UsageError("--back and --delete take one NAME, and not each other.")
    settings = ClientSettings.load({"data_dir": data_dir}, config=config)
    with _registry(settings.data) as store:
        if name is None:
            found = store.aliases()
        elif delete:
            store.delete_alias(name)
            print(f"{name} stands for nothing any more.")
            return 0
        elif model is None and not back:
            raise UsageError("say which MODEL it is to stand for, or --back, or --delete.")
        else:
            found = [store.roll_back_alias(name) if back else store.set_alias(name, model or "")]
    if as_json:
        print_json([{"name": a.name, "model": a.target, "previous": a.previous} for a in found])
    elif name is not None:
        print(f"{name} stands for {short_name(found[0].target)} now; gateways follow within 2 s.")
    else:
        rows = [[short_name(a.name), short_name(a.target), short_name(a.previous or "-")] for a in found]
        print_table(["NAME", "MODEL", "BEFORE"], rows)
    return 0


@app.command("log")
@exits
def log_(
    count: Annotated[int, typer.Option("--count", "-n", min=1, max=10_000, help="So many, newest first.")] = 20,
    data_dir: DataDirOption = None,
    as_json: JsonOption = False,
    config: ConfigOption = None,
) -> int:
    """Show what was done to models, and by whom: the registry's audit table."""
    settings = ClientSettings.load({"data_dir": data_dir}, config=config)
    with _registry(settings.data) as store:
        entries = store.audit(count)
    if as_json:
        print_json(
            [
                {
                    "at": entry.at.isoformat(),
                    "client": entry.client,
                    "token": entry.token,
                    "action": entry.action,
                    "model": entry.model,
                    "hosts": list(entry.hosts),
                    "outcome": entry.outcome,
                }
                for entry in entries
            ]
        )
        return 0
    if not entries:
        print("Nothing was done to models yet.", file=sys.stderr)
        return 0
    rows = [[f"{e.at:%Y-%m-%d %H:%M:%S}Z", e.client, e.action, e.model, ", ".join(e.hosts), e.outcome] for e in entries]
    print_table(["AT", "CLIENT", "ACTION", "MODEL", "HOSTS", "OUTCOME"], rows)
    return 0


def _load(
    model: str,
    keep_alive: int,
    done: str,
    host: list[str] | None,
    label: list[str] | None,
    url: str | None,
    token: str | None,
    data_dir: Path | None,
    config: Path | None,
) -> int:
    with _gateway(url, token, data_dir, config) as http:
        body = {"model": model, "keepAlive": keep_alive, **_choice(host, label)}
        answer = _check(http.post("/fabric/load", params={"detail": "hosts"}, json=body)).json()
    print(f"{model} {done} on {', '.join(entry['host'] for entry in answer['hosts'])}.")
    return 0


def _choice(host: list[str] | None, label: list[str] | None = None) -> dict[str, Any]:
    return {**({"hosts": host} if host else {}), **({"labels": label} if label else {})}


# The gateway ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _gateway(url: str | None, token: str | None, data_dir: Path | None, config: Path | None) -> Iterator[httpx.Client]:
    """A client of the gateway's HTTP API with a key for operations.

    Raises:
        UnreachableError: nothing answers there, or what answers breaks off.
    """
    settings = ClientSettings.load({"url": url, "data_dir": data_dir}, config=config)
    address = settings.url
    if not address:
        with contextlib.suppress(ProcessError):
            address = client_arguments(settings).get("server_url", "")
    address = (address or DEFAULT_URL).replace("ws", "http", 1)
    with contextlib.nullcontext(token) if token else _own_token(settings.data) as key:
        timeout = httpx.Timeout(10.0, read=None)  # an engine may be silent for minutes over what it pulled
        headers = {"authorization": f"Bearer {key}"}
        try:
            with httpx.Client(base_url=address, headers=headers, timeout=timeout, trust_env=False) as http:
                yield http
        except httpx.HTTPError as error:
            raise UnreachableError(
                f"no gateway answers at {address}: {error}. Is it running? --url names another."
            ) from None


@contextlib.contextmanager
def _own_token(folder: Path) -> Iterator[str]:
    with _registry(folder) as store:
        expires_at = datetime.now(UTC) + KEY_LIVES
        made, text = store.add_token(OPERATOR, scopes=(Scope.MODELS_READ, Scope.MODELS_WRITE), expires_at=expires_at)
        try:
            yield text
        finally:
            store.revoke_token(made.id)


@contextlib.contextmanager
def _registry(folder: Path) -> Iterator[Store]:
    if not (folder / FILE_NAME).exists():
        raise UsageError(
            f"there is no client registry in {folder}. Give a key with --token, or the gateway's --data-dir."
        )
    with contextlib.closing(Store.open(folder)) as store:
        yield store


def _check(response: httpx.Response) -> httpx.Response:
    """The response, if it is not an error."""
    if not response.is_success:
        response.read()
        _refused(response)
    return response


def _refused(response: httpx.Response) -> NoReturn:
    try:
        text = str(response.json()["error"])
    except (ValueError, KeyError, TypeError):
        text = f"{response.status_code} {response.text[:200]}"
    raise AuthError(text) if response.status_code in (401, 403) else ProcessError(text)


# Progress -------------------------------------------------------------------------------------------------------------


def _show(lines: Iterator[dict[str, Any]]) -> dict[str, Any]:
    """Show what the lines say, and return the last."""
    last: dict[str, Any] = {"error": "the gateway's answer broke off"}
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    tasks: dict[tuple[str, str], TaskID] = {}
    statuses: dict[str, str] = {}
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        for last in lines:
            for entry in last.get("hosts", ()):
                host, status = entry["host"], entry.get("status") or entry.get("error", "")
                if "digest" in entry:
                    where = host, entry["digest"]
                    if where not in tasks:
                        tasks[where] = progress.add_task(f"{host}  {status}", total=None)
                    progress.update(tasks[where], total=entry["total"] or None, completed=entry["completed"])
                if statuses.get(host) != status:
                    statuses[host] = status
                    if not console.is_terminal or "digest" not in entry:
                        progress.console.print(f"{host}: {status}", markup=False, highlight=False)
    return last
