"""How engines are named."""

import pytest

from common.errors import UsageError
from workers.settings import EngineAddress, WorkerSettings, engine_addresses, ollama_url


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("", "http://127.0.0.1:11434"),
        ("gpu-1", "http://gpu-1:11434"),
        ("gpu-1:8080", "http://gpu-1:8080"),
        (":8080", "http://127.0.0.1:8080"),
        ("http://gpu-1", "http://gpu-1:80"),
        ("https://gpu-1/", "https://gpu-1:443"),
        ("https://gpu-1:8443/k/key/", "https://gpu-1:8443/k/key"),
        ("0.0.0.0", "http://127.0.0.1:11434"),
        ("0.0.0.0:1234", "http://127.0.0.1:1234"),
        ("[::]:1234", "http://[::1]:1234"),
        ("[::1]", "http://[::1]:11434"),
        (' "gpu-1" ', "http://gpu-1:11434"),
    ],
)
def test_ollama_host_in_all_its_forms(text: str, url: str) -> None:
    assert ollama_url(text) == url


@pytest.mark.parametrize("text", ["ftp://a", "http://a:b", "a:99999", "http://[::1", "http://u@h", "a?b", "a#b", "a b"])
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(UsageError):
        ollama_url(text)


def test_without_entries_the_environment_decides() -> None:
    assert engine_addresses((), {}) == (EngineAddress("http://127.0.0.1:11434", 1),)
    environment = {"OLLAMA_HOST": "0.0.0.0:9", "OLLAMA_NUM_PARALLEL": "4"}
    assert engine_addresses((), environment) == (EngineAddress("http://127.0.0.1:9", 4),)
    assert engine_addresses(("a,slots=2", "b"), environment) == (
        EngineAddress("http://a:11434", 2),
        EngineAddress("http://b:11434", 4),
    )
    assert engine_addresses(("a",), {"OLLAMA_NUM_PARALLEL": "0"}) == (EngineAddress("http://a:11434", 1),)
    assert engine_addresses(("a,models=2", "b,slots=3"), {"OLLAMA_MAX_LOADED_MODELS": "5"}) == (
        EngineAddress("http://a:11434", 1, 2),
        EngineAddress("http://b:11434", 3, 5),
    )
    assert engine_addresses(("a,memory=24GiB,slots=2", "b"), {}) == (
        EngineAddress("http://a:11434", 2, 0, 24 * 2**30),
        EngineAddress("http://b:11434"),
    )


@pytest.mark.parametrize(
    "entries",
    [
        ("a,slots=0",),
        ("a,slots=4097",),
        ("a,slots=²",),
        ("a,slots=many",),
        ("a,models=0",),
        ("a,memory=much",),
        ("memory=1GiB",),
        ("models=2",),
        ("slots=2",),
        ("a", "http://a:11434"),
        ("a,",),
    ],
)
def test_entries_that_are_wrong(entries: tuple[str, ...]) -> None:
    with pytest.raises(UsageError, match=r"slots|models|memory|address|twice"):
        engine_addresses(entries, {})


def test_a_list_in_one_variable_of_the_environment() -> None:
    settings = WorkerSettings.load(environment={"WEFTLINE_WORKER_OLLAMA": "a,slots=2, b"})
    assert [(a.url, a.slots) for a in engine_addresses(settings.ollama, {})] == [
        ("http://a:11434", 2),
        ("http://b:11434", 1),
    ]


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ({"silence_s": 0.0}, "--silence-s"),
        ({"lease_bytes_max": 5}, "--lease-bytes-max"),
        ({"log_level": "loud"}, "--log-level"),
        ({"broker": "host"}, "--broker must read HOST:PORT"),
        ({"broker": "tcp://a:1, tcp://b:99999"}, "--broker must read HOST:PORT"),
    ],
)
def test_settings_out_of_range(flags: dict[str, object], named: str) -> None:
    with pytest.raises(UsageError, match=named):
        WorkerSettings.load(flags, environment={})
