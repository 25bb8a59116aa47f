"""docs/api-reference.md says of every message what gateway/messages.py does, and its examples are messages."""

import base64
import re
import shutil
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from types import UnionType

import msgspec
import pytest
from msgspec import inspect

from broker.core import POSITIONS_INTERVAL_S
from broker.settings import BrokerSettings
from common import protocol
from common.errors import Code
from gateway import auth, autopull, fleet_api, messages, session
from gateway.protocols import Limits
from gateway.settings import GatewaySettings
from gateway.store import Client
from tests.unit.docs import markdown
from workers.settings import WorkerSettings

ROOT = Path(__file__).parents[3]
TEXT = (markdown.DOCS / "api-reference.md").read_text(encoding="utf-8")
CHAPTERS = markdown.sections(TEXT, 2)
FROM_CLIENT = markdown.sections(CHAPTERS["Messages from the client"], 3)
FROM_SERVER = markdown.sections(CHAPTERS["Messages from the server"], 3)


def structs(union: UnionType) -> dict[str, inspect.StructType]:
    """A union's messages by their type."""
    types = [inspect.type_info(cls) for cls in union.__args__]
    return {str(kind.tag): kind for kind in types if isinstance(kind, inspect.StructType)}


CLIENT, SERVER = structs(messages.ClientMessage), structs(messages.ServerMessage)


def wording(kind: inspect.Type) -> str:
    """A type, as the reference calls it. Whether it may be null is said apart."""
    match kind:
        case inspect.StrType():
            return "string"
        case inspect.BoolType():
            return "boolean"
        case inspect.IntType():
            return "integer"
        case inspect.FloatType():
            return "number"
        case inspect.DictType() | inspect.StructType():
            return "object"
        case inspect.RawType():
            return "array of object"  # a piece of Ollama's JSON; only lists are passed on so
        case inspect.ListType(item_type=item) | inspect.VarTupleType(item_type=item):
            return f"array of {wording(item)}"
        case inspect.UnionType(types=types):
            words = [wording(one) for one in types if not isinstance(one, inspect.NoneType)]
            return " or ".join(
                sorted(words, key=lambda word: (word == "object", word == "string" and "boolean" in words))
            )
    raise AssertionError(f"the reference has no word for {kind}")


def bounds(kind: inspect.Type) -> str:
    """What a field's value must keep to, as the reference says it."""
    match kind:
        case inspect.StrType(pattern=str(pattern)):
            *first, last = pattern.strip("^$()").split("|")
            return ", ".join(f"`{word}`" for word in first) + f" or `{last}`"
        case inspect.StrType(min_length=int(low), max_length=int(high)):
            return f"{low} to {high} characters"
        case inspect.StrType(min_length=None, max_length=int(high)):
            return f"at most {high} characters"
        case inspect.IntType(gt=int(low), le=int(high)):
            return f"{low + 1} to {high}"
        case inspect.IntType(ge=int(low), lt=int(high)):
            return f"{low} to {high - 1}"
        case inspect.UnionType(types=types):
            return next((said for one in types if (said := bounds(one)) != "-"), "-")
    return "-"


def default(field: inspect.Field) -> str:
    if field.default_factory is not msgspec.NODEFAULT:
        return f"`{msgspec.json.encode(field.default_factory()).decode()}`"
    absent = field.default is msgspec.NODEFAULT or field.default is None
    return "-" if absent else f"`{msgspec.json.encode(field.default).decode()}`"


def flattened(kind: inspect.StructType, prefix: str = "") -> dict[str, inspect.Field]:
    """The fields by name on the wire, those of a struct within as `outer.inner`."""
    fields: dict[str, inspect.Field] = {}
    for field in kind.fields:
        fields[prefix + field.encode_name] = field
        if isinstance(field.type, inspect.StructType):
            fields |= flattened(field.type, f"{prefix}{field.encode_name}.")
    return fields


def rows(section: str, *columns: str) -> dict[str, dict[str, str]]:
    listed = markdown.table(section, "Field", *columns)
    found = {markdown.code(row["Field"]): row for row in listed}
    assert len(found) == len(listed), "a field is listed twice"
    assert all(row["Meaning"] for row in listed)
    return found


def test_there_is_a_section_for_every_message_and_no_other() -> None:
    assert list(FROM_CLIENT) == list(CLIENT)
    assert list(FROM_SERVER) == list(SERVER)
    assert CLIENT.keys() == messages.TYPES


@pytest.mark.parametrize("name", CLIENT)
def test_a_clients_message_is_described_as_it_is(name: str) -> None:
    fields = flattened(CLIENT[name])
    listed = rows(FROM_CLIENT[name], "Type", "Required", "Default", "Bounds")
    assert listed.keys() == fields.keys()
    for key, field in fields.items():
        said = {column: listed[key][column] for column in ("Type", "Required", "Default", "Bounds")}
        assert said == {
            "Type": wording(field.type),
            "Required": "yes" if field.required else "no",
            "Default": default(field),
            "Bounds": bounds(field.type),
        }, key


@pytest.mark.parametrize("name", SERVER)
def test_a_servers_message_is_described_as_it_is(name: str) -> None:
    fields = flattened(SERVER[name])
    listed = rows(FROM_SERVER[name], "Type", "Present")
    assert listed.keys() == fields.keys()
    for key, field in fields.items():
        nullable = isinstance(field.type, inspect.UnionType) and field.type.includes_none and field.required
        said = {column: listed[key][column] for column in ("Type", "Present")}
        assert said == {
            "Type": wording(field.type) + (" or null" if nullable else ""),
            "Present": "always" if field.required else "sometimes",
        }, key


@pytest.mark.parametrize("name", CLIENT)
def test_a_clients_examples_are_understood_in_both_encodings(name: str) -> None:
    examples = markdown.blocks(FROM_CLIENT[name], "json")
    assert examples
    for example in examples:
        message = messages.JSON.decode(example)
        assert message.__struct_config__.tag == name
        plain = msgspec.json.decode(example)
        assert messages.MSGPACK.decode(msgspec.msgpack.encode(plain)) == message
        assert plain.keys() - {"type"} <= {field.encode_name for field in CLIENT[name].fields}


@pytest.mark.parametrize("name", SERVER)
def test_a_servers_examples_are_what_it_would_send(name: str) -> None:
    examples = markdown.blocks(FROM_SERVER[name], "json")
    assert examples
    for example in examples:
        plain = msgspec.json.decode(example)
        # msgspec takes no value for `Raw | None`, which is only ever sent.
        raw = {
            field.name: msgspec.Raw(msgspec.json.encode(plain.pop(field.encode_name)))
            for field in SERVER[name].fields
            if wording(field.type) == "array of object" and field.encode_name in plain
        }
        message = msgspec.structs.replace(msgspec.convert(plain, messages.ServerMessage), **raw)
        assert message.__struct_config__.tag == name
        assert msgspec.json.decode(messages.JSON.encode(message)) == msgspec.json.decode(example)


@pytest.mark.parametrize("name", CLIENT)
def test_the_errors_of_a_message_exist(name: str) -> None:
    said = re.search(r"^\*\*Errors:\*\*(.*?)\n\n", FROM_CLIENT[name], re.MULTILINE | re.DOTALL)
    assert said, "no word of errors"
    codes = re.findall(r"`([A-Z_]+)`", said[1])
    assert codes
    assert set(codes) <= {code.value for code in Code}


def test_every_error_code_is_listed_and_reserved_ones_are_not_used() -> None:
    listed = {markdown.code(row["Code"]): row for row in markdown.table(CHAPTERS["Error codes"], "Code", "Retry")}
    assert list(listed) == [code.value for code in Code]
    assert all(row["When"] and row["What to do"] and row["Retry"] for row in listed.values())
    sources = "".join(
        path.read_text(encoding="utf-8")
        for part in ("broker", "gateway", "workers")
        for path in (ROOT / part).rglob("*.py")
    )
    unused = {code.value for code in Code if not re.search(rf"\bCode\.{code.name}\b", sources)}
    assert {code for code, row in listed.items() if row["When"].startswith("*Reserved:*")} == unused


# What stands in no setting, by the words the reference has for it.
FIXED: dict[str, float] = {
    "Message before authentication": Limits().stranger_bytes_max,
    "Values (strings, numbers, lists, maps) in a message over 256 KiB": messages.VALUES_MAX,
    "Request body to the engine": protocol.BODY_BYTES_MAX,
    "Request for an operation on models, over HTTP": fleet_api.REQUEST_BYTES_MAX,
    "Time a body may stop coming for, if it came fast before": Limits().body_credit_s,
    "Age of a challenge": auth.CHALLENGE_S,
    "Time between the server's pings, and for the pong": Limits().ping_interval_s,
    "Ping, pong and tiny fragment frames in a burst": Limits().control_burst,
    "Models being pulled at first use": autopull.PULLS_MAX,
    "Requests waiting for such pulls": autopull.WAITING_MAX,
    "Bodies of these requests": autopull.WAITING_BYTES_MAX,
    "Time such a pull goes on when nobody waits for it": autopull.GRACE_S,
    "Attempts of a request": protocol.ATTEMPTS_MAX,
    "Text of a stream that can be continued, as the engine's lines": session.HISTORY_BYTES_MAX,
    "The same of all streams of a gateway": session.HISTORIES_BYTES_MAX,
}
UNITS = {"": 1, "s": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


def test_the_limits_are_those_of_the_settings() -> None:
    sections: dict[str, type[BrokerSettings | GatewaySettings | WorkerSettings]] = {
        cls.section: cls for cls in (BrokerSettings, GatewaySettings, WorkerSettings)
    }
    named: set[tuple[str, str]] = set()
    fixed: set[str] = set()
    for row in markdown.table(CHAPTERS["Limits"], "Limit", "Default", "Setting"):
        number, _, unit = row["Default"].partition(" ")
        value = float(number) * UNITS[unit]
        if row["Setting"] == "*fixed*":
            assert value == FIXED[row["Limit"]], row
            fixed.add(row["Limit"])
            continue
        section, name = re.fullmatch(r"`\[(\w+)\] (\w+)`", row["Setting"]).groups()  # type: ignore[union-attr]
        assert value == getattr(sections[section](), name), row
        named.add((section, name))
    assert fixed == FIXED.keys()
    numbers = {
        ("gateway", field.name)
        for field in inspect.type_info(GatewaySettings).fields  # type: ignore[attr-defined]
        if isinstance(field.type, inspect.IntType | inspect.FloatType)
    }
    assert numbers - {("gateway", "pull_copies")} <= named
    assert Limits().ping_interval_s == Limits().ping_timeout_s


def test_the_times_in_the_text_are_those_of_the_code() -> None:
    assert f"expires after {auth.CHALLENGE_S:g} s" in TEXT
    assert f"{auth.ANSWER_S * 1000:g} ms\nafter receipt" in TEXT
    assert f"at most every {POSITIONS_INTERVAL_S:g} s" in TEXT
    assert f"RSA, {auth.RSA_BITS_MIN} to {auth.RSA_BITS_MAX} bits" in TEXT
    assert f"a request waits: {GatewaySettings().resume_s:g} s from the break" in TEXT
    messages_per_s, burst = GatewaySettings().messages_per_s, GatewaySettings().messages_burst
    assert f"bound\n   of {burst} messages in a burst and {messages_per_s:g} a second" in TEXT


def test_the_algorithms_are_those_that_are_checked() -> None:
    listed = markdown.table(CHAPTERS["Authentication"], "Algorithm", "Key")
    assert [row["Algorithm"].split("`")[1] for row in listed] == list(auth.ALGORITHMS)


def test_the_python_example_verifies_and_notices_a_wrong_signature() -> None:
    (example,) = markdown.blocks(CHAPTERS["Authentication"], "python")
    exec(compile(example, "api-reference.md", "exec"), {})
    with pytest.raises(Exception, match=r"^$") as caught:
        exec(compile(example.replace("wl1:", "wl2:"), "api-reference.md", "exec"), {})
    assert type(caught.value).__name__ == "InvalidSignature"


@pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl on this machine")
def test_what_the_openssl_example_signs_is_accepted_by_the_gateway(tmp_path: Path) -> None:
    (example,) = markdown.blocks(CHAPTERS["Authentication"], "sh")
    done = subprocess.run(["sh", "-ec", example], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=True)
    verdict, signature = done.stdout.splitlines()
    assert verdict == "Verified OK"
    assert base64.b64decode(signature) == (tmp_path / "signature.bin").read_bytes()
    key = auth.load_public_key((tmp_path / "alice_public.pem").read_bytes())
    client = Client("alice", key, datetime.now(UTC), None, 1)
    challenge = re.search(r"challenge='(.*)'", example)
    assert challenge
    assert auth.verify(client, "SHA256", signature, challenge[1])
    assert not auth.verify(client, "SHA256", signature, challenge[1] + "\n")
