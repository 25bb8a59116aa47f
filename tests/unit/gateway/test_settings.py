"""The gateway's settings: rules for num_ctx."""

import pytest

from common.errors import UsageError
from gateway.settings import GatewaySettings


def test_the_first_rule_that_matches_counts() -> None:
    rules = "llama3.2:*=8192,hf.co/*=2048,*:1b=1024"
    settings = GatewaySettings.load(environment={"WEFTLINE_GATEWAY_NUM_CTX": rules})
    assert settings.num_ctx_of("llama3.2:1b") == 8192
    assert settings.num_ctx_of("hf.co/a/b:latest") == 2048
    assert settings.num_ctx_of("gemma3:1b") == 1024
    assert settings.num_ctx_of("gemma3:latest") is None
    assert GatewaySettings().num_ctx_of("llama3.2:1b") is None


@pytest.mark.parametrize(
    "rule", ["llama3.2", "llama3.2=", "=4096", "a=0", "a=-1", "a=1.5", "a=x", "a=²", "a=9999999999"]
)
def test_a_rule_that_is_none_is_named(rule: str) -> None:
    with pytest.raises(UsageError, match="num_ctx of"):
        GatewaySettings.load(environment={"WEFTLINE_GATEWAY_NUM_CTX": rule})
