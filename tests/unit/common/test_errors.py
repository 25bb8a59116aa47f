"""Errors carry what those who see them need: a code, or an exit status."""

import pytest

from common.errors import AuthError, Code, FabricError, ProcessError, UnreachableError, UsageError


def test_a_request_fails_with_a_code_and_a_sentence() -> None:
    error = FabricError(Code.QUEUE_FULL, "come back later")
    assert (error.code, error.message, str(error)) == ("QUEUE_FULL", "come back later", "come back later")


@pytest.mark.parametrize(
    ("kind", "status"), [(ProcessError, 1), (UsageError, 2), (UnreachableError, 69), (AuthError, 77)]
)
def test_exit_statuses_are_those_of_the_commands(kind: type[ProcessError], status: int) -> None:
    assert kind("because").exit_status == status


def test_a_code_is_its_own_name_on_every_wire() -> None:
    assert all(code.value == code.name for code in Code)
