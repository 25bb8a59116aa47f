"""The commands, from their arguments to what they print."""

import json
from pathlib import Path
from typing import Any

import pytest

from bench.sim import compare, cost
from bench.sim.__main__ import main
from bench.sim.formats import Format
from bench.sim.policies import POLICIES

KEYS = {
    "completed",
    "shed",
    "goodput",
    "ttft_p50_s",
    "ttft_p95_s",
    "ttft_p99_s",
    "tpot_p50_s",
    "tpot_p99_s",
    "cold_loads",
    "prefix_hit_ratio",
    "jain",
    "max_service_gap_tokens",
    "utilisation",
    "eta_error_p50",
    "eta_error_p90",
    "decision_us_p99",
}
MOONCAKE = ["--trace", str(compare.SAMPLES / "mooncake-conversation.jsonl"), "--format", "mooncake"]


def printed(capsys: pytest.CaptureFixture[str], *argv: str) -> Any:
    assert main([*MOONCAKE, "--minutes", "3", "--json", *argv]) == 0
    return json.loads(capsys.readouterr().out)


def test_json_of_one_policy_and_of_several(capsys: pytest.CaptureFixture[str]) -> None:
    one = printed(capsys, "--policy", "weftline", "--rate-scale", "0.3")
    assert one.keys() >= KEYS
    assert one["offered"] == one["completed"] + one["shed"]
    several = printed(capsys, "--policy", "weftline,random", "--rate-scale", "0.3")
    assert [each["policy"] for each in several] == ["weftline", "random"]
    assert _timeless(several[0]) == _timeless(one)


def test_hosts_models_and_a_flood(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "hosts.toml"
    file.write_text('[[hosts]]\nname = "only"\nvram_gb = 12\nprefill_tps = 9000\ndecode_tps = 100\n')
    options = ["--hosts", str(file), "--models", "2", "--clients", "3", "--seed", "5", "--flood", "2"]
    found = printed(capsys, "--policy", "fifo-late", "--rate-scale", "0.1", *options)
    assert found["cold_loads_bound"] <= 2
    assert found["flood_ratio"] == pytest.approx(found["flood_others_ttft_p99_s"] / found["calm_others_ttft_p99_s"])


def test_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*MOONCAKE, "--minutes", "1", "--policy", "random", "--rate-scale", "0.3"]) == 0
    head, line = capsys.readouterr().out.splitlines()
    assert head.split()[:2] == ["policy", "goodput"]
    assert line.startswith("random ")


@pytest.mark.parametrize(
    ("argv", "story"),
    [
        (["--policy", "best"], "no policy 'best'; there are: weftline,"),
        (["--policy", "random", "--hosts", "none.toml"], "cannot read the hosts"),
        (["--policy", "random", "--format", "azure"], "line 1: no column timestamp"),
    ],
)
def test_what_cannot_be_simulated(argv: list[str], story: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*MOONCAKE, *argv]) == 2
    assert story in capsys.readouterr().err


def test_the_cost_of_a_decision() -> None:
    found = cost.measure("fifo-late", 2, 30, decisions=10)
    assert found["queued"] == 30
    assert found["bytes_per_queued"] > 500
    assert min(found["submit_us_p50"], found["end_us_p50"], found["tick_us_p50"]) > 0
    pushed = cost.measure("random", 2, 30, decisions=10)
    assert (pushed["queued"], pushed["bytes_per_queued"]) == (0, None)


def test_a_comparison(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    few = {name: POLICIES[name] for name in ("weftline", "warm-first", "fifo-late", "cache-aware", "oracle")}
    monkeypatch.setattr(compare, "POLICIES", few)
    monkeypatch.setattr(compare, "BASELINES", ("warm-first", "cache-aware"))
    file = tmp_path / "all.json"
    argv = ["--requests", "20", "--seeds", "2", "--quick", "--pictures", str(tmp_path), "--json", str(file)]
    assert compare.main(argv) == 0
    out = capsys.readouterr().out
    assert "azure, 1.5 of the knee: goodput" in out
    assert "mooncake, at 0.5 of the knee, one client floods" in out
    assert json.loads(file.read_text()).keys() == {"azure", "mooncake"}
    pictures = {f"sim-{what}-{form}.svg" for what in ("goodput", "ttft") for form in Format}
    assert {each.name for each in tmp_path.iterdir()} == {"all.json", *pictures}


def _timeless(found: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in found.items() if not key.startswith("decision_us")}
