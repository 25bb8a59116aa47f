"""Which hosts may serve which models and clients."""

import pytest

from broker import rules
from broker.rules import Rule, Rules
from broker.settings import BrokerSettings
from broker.state import Worker
from common.errors import UsageError


def host(name: str, *labels: str) -> Worker:
    return Worker(name=name, epoch="e", peer=b"", seen=0.0, registration=1, engines={}, labels=labels)


HOSTS = (host("gpu1", "gpu=h100", "site=berlin"), host("gpu2", "gpu=a10", "site=berlin"), host("cpu", "site=rome"))


def allowed(*texts: str, model: str = "llama2:7b", client: str = "alice") -> list[str]:
    checked = Rules(texts)
    names = [worker.name for worker in HOSTS if checked.allow(model, client, worker)]
    assert names == [worker.name for worker in HOSTS if checked.allow(model, client, worker)]
    return names


def test_without_rules_everything_is_allowed() -> None:
    assert Rules(()).matching("m:latest", "alice") == ()
    assert allowed() == ["gpu1", "gpu2", "cpu"]


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("model=llama2:7b on gpu=h100", ["gpu1"]),
        ("model=llama* on site=berlin", ["gpu1", "gpu2"]),
        ("model=* not gpu=h100", ["gpu2", "cpu"]),
        ("model=llama2:* on host=cpu", ["cpu"]),
        ("  model=llama? not host=gpu2 ", ["gpu1", "gpu2", "cpu"]),
        ("model=llama?:7b not host=gpu2", ["gpu1", "cpu"]),
        ("model=mistral on gpu=h100", ["gpu1", "gpu2", "cpu"]),
        ("client=alice on site=rome", ["cpu"]),
        ("client=a* not site=rome", ["gpu1", "gpu2"]),
        ("client=bob on site=rome", ["gpu1", "gpu2", "cpu"]),
        ("client=alice on gpu=tpu", []),
    ],
)
def test_a_rule(rule: str, expected: list[str]) -> None:
    assert allowed(rule) == expected


def test_rules_are_for_those_that_match() -> None:
    checked = Rules(("model=llama* on site=berlin", "client=alice not gpu=h100", "client=bob on gpu=a10"))
    assert [rule.label for rule in checked.matching("llama2:7b", "alice")] == ["site=berlin", "gpu=h100"]
    assert [rule.label for rule in checked.matching("m:latest", "bob")] == ["gpu=a10"]
    assert checked.matching("m:latest", "carol") == ()


def test_all_rules_that_match_must_agree() -> None:
    assert allowed("model=llama* on site=berlin", "client=alice not gpu=h100") == ["gpu2"]
    assert allowed("model=llama* on site=berlin", "client=bob not gpu=h100") == ["gpu1", "gpu2"]
    assert allowed("model=llama* on gpu=h100", "client=alice on site=rome") == []


def test_a_models_name_without_a_tag_is_its_latest() -> None:
    assert allowed("model=llama2 on host=cpu", model="llama2:latest") == ["cpu"]
    assert allowed("model=llama2 on host=cpu", model="llama2:7b") == ["gpu1", "gpu2", "cpu"]
    assert allowed("model=hub/team/m on host=cpu", model="hub/team/m:latest") == ["cpu"]


def test_a_pattern_tells_capitals_apart() -> None:
    assert allowed("client=Alice on host=cpu") == ["gpu1", "gpu2", "cpu"]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "model=m",
        "model=m on gpu",
        "model=m at gpu=x",
        "models=m on gpu=x",
        "model= on gpu=x",
        "model=a b on gpu=x",
        "model=m on gpu=",
        "model=m on =x",
        "model=m on gpu=x y",
    ],
)
def test_what_is_no_rule_is_said_so(text: str) -> None:
    with pytest.raises(UsageError, match="a rule reads `model=PATTERN on KEY=VALUE`") as caught:
        Rule.read(text)
    assert repr(text) in str(caught.value)
    with pytest.raises(UsageError):
        BrokerSettings(rules=("model=m on gpu=x", text))


def test_what_matches_is_looked_up_once_and_for_so_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rules, "CACHE_MAX", 10)
    checked = Rules(("client=c1* on host=cpu",))
    for _ in range(2):
        for number in range(25):
            named = f"c{number}"
            expected = ["cpu"] if named.startswith("c1") else ["gpu1", "gpu2", "cpu"]
            assert [worker.name for worker in HOSTS if checked.allow("m:latest", named, worker)] == expected
            assert len(checked._matching) <= 10
