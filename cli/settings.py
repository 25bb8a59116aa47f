"""Settings of the commands that speak to a running fabric, and the options they share."""

import contextlib
from pathlib import Path
from typing import Annotated, ClassVar, Literal
from urllib.parse import urlsplit, urlunsplit

import typer

from common.config import Settings, default_data_dir
from common.errors import UsageError


class ClientSettings(Settings, frozen=True):
    """Which gateway, broker and engines are asked, and as whom."""

    section: ClassVar[str] = "client"

    url: str = ""
    """The gateway, ws:// or wss://. Empty: the one that the key's config names."""
    key: Path | None = None
    """A NAME_config.json. None: the key that `weftline up` made in the data dir."""
    model: str = ""
    """Empty: the first that isn't an embedding model."""
    broker: str = "tcp://127.0.0.1:5570"
    data_dir: Path | None = None
    ollama: tuple[str, ...] = ()
    """Engines that `doctor` probes. Empty: those of this machine's worker, and OLLAMA_HOST."""
    log_level: Literal["debug", "info", "warning", "error"] = "warning"

    def __post_init__(self) -> None:
        if self.url:
            websocket_url(self.url)

    @property
    def data(self) -> Path:
        """The data dir, given or not."""
        return self.data_dir or default_data_dir()

    @property
    def key_file(self) -> Path:
        """The config of the client to be; the file need not exist."""
        if self.key is not None:
            return self.key
        # `weftline up` makes local-2, local-3 … when the client before was revoked: the newest is the one in use.
        folder = self.data / "keys"
        made = [*folder.glob("local_config.json"), *folder.glob("local-*_config.json")]
        return max(made, key=lambda path: path.stat().st_mtime, default=folder / "local_config.json")


def websocket_url(url: str) -> str:
    """`url`, if it is the WebSocket URL of a gateway.

    Raises:
        UsageError: it isn't; what it should be is said, if that can be guessed.
    """
    meant = "ws://HOST:PORT"
    with contextlib.suppress(ValueError):
        parts = urlsplit(url if "://" in url else f"ws://{url}")
        scheme = {"http": "ws", "https": "wss"}.get(parts.scheme, parts.scheme)
        if scheme in ("ws", "wss") and parts.hostname and parts.port != 0:
            meant = urlunsplit(parts._replace(scheme=scheme))
    if url != meant:
        raise UsageError(f"{url!r} is not the URL of a gateway; it must read like {meant}")
    return url


UrlOption = Annotated[str | None, typer.Option(help="The gateway, ws://HOST:PORT. [what the key's config says]")]
KeyOption = Annotated[
    Path | None,
    typer.Option(
        metavar="NAME_config.json", help="Whom to be. [DATA_DIR/keys/local_config.json]", envvar="WEFTLINE_KEY"
    ),
]
ModelOption = Annotated[str | None, typer.Option(help="Which model. [the first there is]")]
BrokerOption = Annotated[str | None, typer.Option(help="The broker's port for gateways. [tcp://127.0.0.1:5570]")]
