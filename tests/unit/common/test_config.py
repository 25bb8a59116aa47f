"""Settings: which source wins, and how every mistake is named."""

import re
from pathlib import Path
from typing import Any, ClassVar

import pytest

from common import config
from common.config import (
    Amount,
    PositiveSeconds,
    Seconds,
    Settings,
    byte_count,
    host_port,
    refuse_exposed,
    refuse_unbindable,
    tcp_addresses,
    writable_dir,
)
from common.errors import UsageError


class Oven(Settings, frozen=True):
    section: ClassVar[str] = "oven"

    degrees: int = 180
    ratio: float = 0.5
    fan: bool = False
    trays: tuple[str, ...] = ("middle",)
    timers_s: tuple[int, ...] | None = None
    label: str | None = None
    racks: Amount = 1
    bake_s: PositiveSeconds = 1.0
    rest_s: Seconds = 0.0


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("24GiB", 24 * 2**30),
        ("24Gi", 24 * 2**30),
        ("1.5 GB", 1_500_000_000),
        ("500M", 500_000_000),
        ("1024", 1024),
        (" 2kB ", 2000),
        ("1EiB", None),
        ("1024PiB", 2**60),
        ("1025PiB", None),
        ("0", None),
        ("1000", None),
        ("-1GB", None),
        ("1e9", None),
        ("GB", None),
        ("", None),
        ("²GB", None),
    ],
)
def test_amounts_of_memory(text: str, count: int | None) -> None:
    if count is not None:
        assert byte_count(text, "--memory") == count
        return
    with pytest.raises(UsageError, match="--memory must be an amount of memory"):
        byte_count(text, "--memory")


def load(
    tmp_path: Path, text: str = "", flags: dict[str, Any] | None = None, environment: dict[str, str] | None = None
) -> Oven:
    path = tmp_path / "weftline.toml"
    path.write_text(text, encoding="utf-8")
    return Oven.load(flags, config=path, environment=environment or {})


# Who wins -------------------------------------------------------------------------------------------------------------


def test_flag_over_environment_over_file_over_default(tmp_path: Path) -> None:
    text = "[oven]\ndegrees = 1\nratio = 0.1\nfan = true\n"
    environment = {"WEFTLINE_OVEN_DEGREES": "2", "WEFTLINE_OVEN_RATIO": "0.2"}
    oven = load(tmp_path, text, {"degrees": 3, "ratio": None, "trays": []}, environment)
    assert (oven.degrees, oven.ratio, oven.fan, oven.trays) == (3, 0.2, True, ("middle",))


def test_without_any_source_the_defaults() -> None:
    assert Oven.load(environment={}) == Oven()


def test_the_file_may_be_named_by_the_environment(tmp_path: Path) -> None:
    path = tmp_path / "weftline.toml"
    path.write_text("[oven]\ndegrees = 7\n")
    assert Oven.load(environment={"WEFTLINE_CONFIG": str(path)}).degrees == 7
    other = tmp_path / "other.toml"
    other.write_text("[oven]\ndegrees = 8\n")
    assert Oven.load(config=other, environment={"WEFTLINE_CONFIG": str(path)}).degrees == 8


def test_a_file_serves_every_process_of_a_host(tmp_path: Path) -> None:
    oven = load(tmp_path, '[broker]\nqueue_max = 1\n[worker]\nname = "x"\n[gateway]\n[oven]\ndegrees = 9\n')
    assert oven.degrees == 9


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("DEGREES", "-40", -40),
        ("FAN", "true", True),
        ("FAN", "0", False),
        ("TRAYS", "top, middle ,,bottom", ("top", "middle", "bottom")),
        ("TRAYS", "top", ("top",)),
        ("TRAYS", "", ()),
        ("TIMERS_S", "1,2", (1, 2)),
        ("LABEL", "kitchen", "kitchen"),
        ("LOG_LEVEL", "debug", "debug"),
    ],
)
def test_the_environment_is_text_and_becomes_what_the_setting_is(name: str, text: str, value: object) -> None:
    oven = Oven.load(environment={f"WEFTLINE_OVEN_{name}": text})
    assert getattr(oven, name.lower()) == value


def test_another_sections_environment_means_nothing() -> None:
    assert Oven.load(environment={"WEFTLINE_BROKER_DEGREES": "1", "WEFTLINE_DEGREES": "2"}) == Oven()


# Mistakes -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("[oven]\ndegree = 1\n", r"\[oven\] has no setting 'degree'; did you mean 'degrees'\?"),
        ("[oven]\nxyzzy = 1\n", r"no setting 'xyzzy'; there are: bake_s, degrees, fan, label, log_format"),
        ("[ovne]\ndegrees = 1\n", r"no section \[ovne\]; did you mean 'oven'\?"),
        ("[brokers]\n", r"no section \[brokers\]; did you mean 'broker'\?"),
        ("degrees = 1\n", r"'degrees' stands outside of all sections; write it below \[oven\]"),
        ("queue_max = 1\n", r"'queue_max' stands outside of all sections; write it below its section: \[broker\]"),
        ("broker = 1\n", r"\[broker\] must be a table"),
        ("oven = 1\n", r"\[oven\] must be a table"),
        ("[oven]\ndegrees = 'hot'\n", r"'degrees' of \[oven\] is wrong: Expected `int`"),
        ("[oven]\ntrays = [1]\n", r"'trays' of \[oven\] is wrong: Expected `str`, got `int` - at `\$\[0\]`"),
        ("[oven]\nlog_level = 'loud'\n", r"'log_level' of \[oven\] is wrong: Invalid enum value 'loud'"),
        ("[oven\n", "not valid TOML"),
    ],
)
def test_a_mistake_in_the_file_is_named(tmp_path: Path, text: str, sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence) as caught:
        load(tmp_path, text)
    assert "weftline.toml" in str(caught.value)


def test_a_file_that_is_no_text_is_named(tmp_path: Path) -> None:
    path = tmp_path / "weftline.toml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match=r"weftline\.toml is not valid TOML"):
        Oven.load(config=path, environment={})


@pytest.mark.parametrize("path", ["missing.toml", "", "file/below"])
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, path: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match=f"cannot read the configuration file {tmp_path / path}: "):
        Oven.load(config=tmp_path / path, environment={})


def test_a_mistake_in_the_environment_is_named() -> None:
    with pytest.raises(UsageError, match="WEFTLINE_OVEN_DEGREES is wrong: Expected `int`"):
        Oven.load(environment={"WEFTLINE_OVEN_DEGREES": "hot"})


@pytest.mark.parametrize(
    ("name", "text", "named"),
    [
        ("DEGRES", "1", "there is no setting WEFTLINE_OVEN_DEGRES; did you mean 'WEFTLINE_OVEN_DEGREES'?"),
        ("degrees", "1", "there is no setting WEFTLINE_OVEN_degrees"),
        ("XYZZY", "1", "there is no setting WEFTLINE_OVEN_XYZZY; there are: WEFTLINE_OVEN_BAKE_S, WEFTLINE_OVEN_"),
        ("PORT", "80", "there is no setting WEFTLINE_OVEN_PORT"),
        ("RACKS", "0", "WEFTLINE_OVEN_RACKS is wrong: Expected `int` >= 1"),
        ("BAKE_S", "0", "WEFTLINE_OVEN_BAKE_S is wrong: Expected `float` > 0"),
        ("BAKE_S", "nan", "WEFTLINE_OVEN_BAKE_S is wrong"),
        ("REST_S", "-1", "WEFTLINE_OVEN_REST_S is wrong: Expected `float` >= 0"),
        ("REST_S", "nan", "WEFTLINE_OVEN_REST_S is wrong"),
        ("REST_S", "inf", "WEFTLINE_OVEN_REST_S is wrong: Expected `float` <= 31536000"),
    ],
)
def test_a_variable_that_is_none_or_out_of_bounds_is_named(name: str, text: str, named: str) -> None:
    with pytest.raises(UsageError, match=re.escape(named)):
        Oven.load(environment={f"WEFTLINE_OVEN_{name}": text})


def test_what_kubernetes_tells_of_a_service_is_no_mistake() -> None:
    injected = {
        "SERVICE_HOST": "10.0.0.1",
        "SERVICE_PORT_HTTP": "80",
        "PORT": "tcp://10.0.0.1:80",
        "PORT_80_TCP": "tcp://10.0.0.1:80",
        "PORT_80_TCP_PROTO": "tcp",
    }
    assert Oven.load(environment={f"WEFTLINE_OVEN_{name}": text for name, text in injected.items()}) == Oven()


def test_a_mistake_in_a_flag_is_named() -> None:
    with pytest.raises(UsageError, match=r"--log-level is wrong: Invalid enum value 'loud'"):
        Oven.load({"log_level": "loud"}, environment={})


# Folders and addresses ------------------------------------------------------------------------------------------------


def test_a_data_dir_is_made_private(tmp_path: Path) -> None:
    path = writable_dir(tmp_path / "deep" / "data")
    assert path.stat().st_mode & 0o777 == 0o700
    assert writable_dir(path) == path


@pytest.mark.parametrize("name", ["file", "file/below"])
def test_a_data_dir_that_cannot_be_is_a_sentence(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match=f"cannot write to the data dir {tmp_path / name}: .*--data-dir"):
        writable_dir(tmp_path / name)


def test_a_data_dir_without_permission_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.access", lambda *_: False)  # root may write everywhere, and tests may run as root
    with pytest.raises(UsageError, match="Permission denied"):
        writable_dir(tmp_path)


def test_the_data_dir_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEFTLINE_DATA_DIR", str(tmp_path))
    assert config.default_data_dir() == tmp_path
    monkeypatch.delenv("WEFTLINE_DATA_DIR")
    assert config.default_data_dir().name == "weftline"


@pytest.mark.parametrize(
    ("text", "pair"),
    [
        ("127.0.0.1:5570", ("127.0.0.1", 5570)),
        ("tcp://host.example:1", ("host.example", 1)),
        ("http://127.0.0.1:0", ("127.0.0.1", 0)),
        ("[::1]:65535", ("::1", 65535)),
    ],
)
def test_host_and_port(text: str, pair: tuple[str, int]) -> None:
    assert host_port(text, "--listen") == pair


@pytest.mark.parametrize(
    "text",
    [
        "",
        "host",
        "host:",
        ":80",
        "host:x",
        "host:65536",
        "host:-1",
        "host:²",
        "host:80/x",
        ":" * 9,
        "h:" + "1" * 5000,
        "a b:80",
    ],
)
def test_what_is_no_host_and_port_names_the_setting(text: str) -> None:
    with pytest.raises(UsageError, match="--listen must read HOST:PORT"):
        host_port(text, "--listen")


def test_addresses_to_dial_are_completed() -> None:
    assert tcp_addresses("h:1, tcp://[::1]:2,tcp://g:65535", "--broker") == [
        "tcp://h:1",
        "tcp://[::1]:2",
        "tcp://g:65535",
    ]
    for text in ("", "h:1,", "h", "h:65536", "ipc://x:1"):
        with pytest.raises(UsageError, match="--broker must read HOST:PORT"):
            tcp_addresses(text, "--broker")


@pytest.mark.parametrize("address", ["tcp://127.0.0.1:5571", "tcp://*:*", "tcp://[::1]:0", "tcp://eth0:1"])
def test_addresses_to_bind(address: str) -> None:
    refuse_unbindable(address, "--workers")


@pytest.mark.parametrize(
    "address",
    [
        "5571",
        "127.0.0.1:5571",
        "tcp://127.0.0.1",
        "tcp://127.0.0.1:99999",
        "tcp://127.0.0.1:-1",
        "tcp://:1",
        "ipc://x:1",
    ],
)
def test_what_libzmq_would_take_for_something_else_is_refused(address: str) -> None:
    with pytest.raises(UsageError, match=f"--workers must read tcp://HOST:PORT, not '{re.escape(address)}'"):
        refuse_unbindable(address, "--workers")


@pytest.mark.parametrize(
    "address", ["tcp://127.0.0.1:5570", "127.8.9.10:80", "localhost:3000", "tcp://[::1]:5570", "tcp://127.0.0.1:*"]
)
def test_loopback_needs_no_permission(address: str) -> None:
    refuse_exposed([address], insecure=False)


@pytest.mark.parametrize(
    "address",
    [
        "tcp://0.0.0.0:5570",
        "tcp://*:5570",
        "10.0.0.1:80",
        "tcp://[::]:5570",
        "127.example.com:80",
        "localhost.example:80",
    ],
)
def test_an_exposed_address_needs_an_explicit_yes(address: str) -> None:
    with pytest.raises(UsageError, match="--insecure"):
        refuse_exposed(["127.0.0.1:1", address], insecure=False)
    refuse_exposed([address], insecure=True)


class Pantry(Settings, frozen=True):
    section: ClassVar[str] = "pantry"

    shelf: Path | None = None


def test_a_folder_can_be_named_by_every_source(tmp_path: Path) -> None:
    path = tmp_path / "weftline.toml"
    path.write_text('[pantry]\nshelf = "/a"\n')
    assert Pantry.load(config=path, environment={}).shelf == Path("/a")
    assert Pantry.load(environment={"WEFTLINE_PANTRY_SHELF": "/b"}).shelf == Path("/b")
    assert Pantry.load({"shelf": Path("/c")}, environment={}).shelf == Path("/c")
    path.write_text("[pantry]\nshelf = 5\n")
    with pytest.raises(UsageError, match=r"'shelf' of \[pantry\] is wrong: Expected `Path`, got `int`"):
        Pantry.load(config=path, environment={})
