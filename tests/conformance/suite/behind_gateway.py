"""A pytest plugin that puts a fabric between ollama-python's tests and their mock server.

The suite's fixture `httpserver` is pytest-httpserver's server with two changes: the URL it tells is the gateway's, and
it also answers what a worker asks an engine about itself, so that the mock counts as a host with the suite's models. A
request then goes client → gateway → broker → worker → mock server. What came of the tests that use the server is
written as JSON to the file WEFTLINE_OUTCOMES.
"""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from pytest_httpserver import HTTPServer  # type: ignore[import-not-found]
from werkzeug import Request, Response  # type: ignore[import-not-found]

from gateway.store import Store
from tests.conformance.fleet import joined
from tests.fabric import Fabric

MODELS = ("dummy", "dummy-image", "qwen3.8:27b")
ENTRIES = [{"name": name if ":" in name else f"{name}:latest", "digest": name, "size": 1} for name in MODELS]
ABOUT = {"/api/version": {"version": "0.0.0"}, "/api/tags": {"models": ENTRIES}, "/api/ps": {"models": []}}
ABOUT["/api/show"] = {"capabilities": ["completion"]}


class Host(HTTPServer):  # type: ignore[misc]
    """The suite's server as a host of the fleet."""

    gateway = ""

    def url_for(self, suffix: str) -> str:
        return self.gateway + suffix

    def dispatch(self, request: Request) -> Response:
        if request.path in ABOUT:
            return Response(json.dumps(ABOUT[request.path]), content_type="application/json")
        assert "ollama-python" not in request.headers.get("User-Agent", ""), "this did not come through the gateway"
        return super().dispatch(request)


@pytest.fixture(scope="session")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    with (
        Host(host="127.0.0.1", port=0, threaded=True) as host,
        Fabric(tmp_path_factory.mktemp("fabric"), engines=[]) as fabric,
        joined(fabric, contextlib.nullcontext(f"http://127.0.0.1:{host.port}"), "dummy"),
    ):
        with contextlib.closing(Store.open(fabric.folder)) as store:
            _, key = store.add_token("suite", scopes=("inference", "models:read"))
        host.gateway = f"{fabric.http_url}/k/{key}"
        yield host


@pytest.fixture
def httpserver(host: Host, request: pytest.FixtureRequest) -> Iterator[Host]:
    outcomes[request.node.name] = ""
    yield host
    host.clear()


outcomes: dict[str, str] = {}
"""By test that uses the server, what went wrong, or nothing."""


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    name = report.nodeid.rpartition("::")[2]
    if name in outcomes and not report.passed:
        outcomes[name] = report.longreprtext


def pytest_sessionfinish() -> None:
    Path(os.environ["WEFTLINE_OUTCOMES"]).write_text(json.dumps(outcomes), encoding="utf-8")
