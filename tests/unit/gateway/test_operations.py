"""Operations on models: which engines are meant, and what many streams of progress say as one."""

import pytest

from common.errors import Code, FabricError
from common.protocol import Engine, Host, Model
from gateway.operations import (
    DISK_RESERVE_BYTES,
    LAYERS_MAX,
    STATUSES_MAX,
    Choice,
    Line,
    Progress,
    Target,
    choose,
    refuse_eviction,
)

GIB = 2**30
A, B = Target("a", "http://e"), Target("b", "http://e")


def host(name: str, *models: str, free_gib: int | None = None, draining: bool = False, up: bool = True) -> Host:
    having = tuple(Model(name=f"{model}:latest", digest=model) for model in models)
    free = None if free_gib is None else free_gib * GIB
    engine = Engine(url="http://e", models=having, disk_free_bytes=free, up=up)
    return Host(name=name, engines=(engine,), draining=draining, labels=(f"zone={name}", "gpu=a100"))


def names(targets: list[Target]) -> list[str]:
    return [target.host for target in targets]


# Which engines --------------------------------------------------------------------------------------------------------

FLEET = [
    host("c"),
    host("a", "m", free_gib=5),
    host("b", "m", "n", free_gib=9),
    host("d", draining=True),
    host("e", up=False),
]


@pytest.mark.parametrize(
    ("choice", "having", "expected"),
    [
        (Choice(), None, ["b", "a", "c"]),
        (Choice(copies=1), None, ["b"]),
        (Choice(copies=9), None, ["b", "a", "c"]),
        (Choice(hosts=["a", "c"]), None, ["a", "c"]),
        (Choice(labels=["zone=c"]), None, ["c"]),
        (Choice(labels=["zone=c", "gpu=a100"]), None, ["c"]),
        (Choice(), "m:latest", ["b", "a"]),
        (Choice(labels=["zone=a"]), "n:latest", []),
    ],
)
def test_who_is_meant(choice: Choice, having: str | None, expected: list[str]) -> None:
    assert names(choose(FLEET, choice, having)) == expected


@pytest.mark.parametrize(
    ("choice", "words"),
    [
        (Choice(hosts=["a", "d"]), "d drains"),
        (Choice(hosts=["a", "x"]), "no host x; there are: a, b, c, d, e"),
        (Choice(labels=["zone=z"]), "no host that was"),
    ],
)
def test_nobody_is_meant(choice: Choice, words: str) -> None:
    with pytest.raises(FabricError, match=words) as error:
        choose(FLEET, choice)
    assert error.value.code is Code.NOT_FOUND


def test_all_engines_of_a_host_are_meant() -> None:
    engines = (Engine(url="http://1"), Engine(url="http://2"), Engine(url="http://3", up=False))
    assert [target.engine for target in choose([Host(name="a", engines=engines)], Choice(copies=1))] == [
        "http://1",
        "http://2",
    ]


# Progress -------------------------------------------------------------------------------------------------------------


def layer(completed: int, total: int = 100, digest: str = "sha256:d") -> Line:
    return Line(status=f"pulling {digest[-1]}", digest=digest, total=total, completed=completed)


def test_a_layer_is_summed_over_the_engines_and_told_once_for_all_that_changed() -> None:
    progress = Progress([A, B])
    progress.take(A, Line(status="pulling manifest"))
    progress.take(B, Line(status="pulling manifest"))
    assert progress.lines(detail=False) == [{"status": "pulling manifest"}]
    for line in (layer(10), layer(20)):
        progress.take(A, line)
    progress.take(B, layer(5))
    assert progress.lines(detail=False) == [
        {"status": "pulling d", "digest": "sha256:d", "total": 200, "completed": 25}
    ]
    assert progress.lines(detail=False) == []
    progress.take(A, layer(0))  # another try looks at what is there
    progress.take(A, layer(100))
    progress.take(B, Line(status="verifying sha256 digest"))
    assert progress.lines(detail=False) == [
        {"status": "verifying sha256 digest"},
        {"status": "pulling d", "digest": "sha256:d", "total": 200, "completed": 105},
    ]


def test_success_is_told_when_all_have_it() -> None:
    progress = Progress([A, B])
    progress.take(A, Line(status="success"))
    progress.ended[A] = ""
    assert progress.lines(detail=False) == []
    progress.ended[B] = ""
    assert progress.last(detail=False) == {"status": "success"}


def test_a_failure_names_where() -> None:
    progress = Progress([A, B])
    progress.ended = {A: "", B: "no such model"}
    assert progress.last(detail=False) == {"error": "failed on 1 of 2 engines: b: no such model"}
    alone = Progress([A])
    alone.ended = {A: "no such model"}
    assert alone.last(detail=False) == {"error": "a: no such model"}


def test_detail_says_what_each_engine_does() -> None:
    progress = Progress([A, B])
    progress.take(A, layer(10))
    progress.ended[B] = "broken"
    (line,) = progress.lines(detail=True)
    where = {
        "host": "a",
        "engine": "http://e",
        "status": "pulling d",
        "digest": "sha256:d",
        "total": 100,
        "completed": 10,
    }
    assert line["hosts"] == [where, {"host": "b", "engine": "http://e", "status": "", "error": "broken"}]
    progress.ended[A] = ""
    assert progress.last(detail=True)["hosts"][0]["status"] == "success"


def test_an_engine_that_talks_too_much_is_not_told_on() -> None:
    progress = Progress([A])
    for number in range(2 * STATUSES_MAX):
        progress.take(A, Line(status=f"status {number}"))
        progress.take(A, layer(1, digest=f"sha256:{number}"))
    assert len(progress.lines(detail=False)) == STATUSES_MAX + LAYERS_MAX


@pytest.mark.parametrize(("free", "lacks"), [(None, False), (10 * GIB, False), (9 * GIB, True)])
def test_a_disk_without_room(free: int | None, lacks: bool) -> None:
    target = Target("a", "http://e", free)
    progress = Progress([target])
    progress.take(target, layer(GIB, total=10 * GIB))
    assert DISK_RESERVE_BYTES == GIB
    assert bool(progress.lacks_room(target)) == lacks
    progress.take(target, layer(10 * GIB, total=10 * GIB))
    assert bool(progress.lacks_room(target)) == lacks, "what has come meanwhile takes room too"


def test_layers_that_follow_one_another_take_room_together() -> None:
    target = Target("a", "http://e", 10 * GIB)
    progress = Progress([target])
    for name in "ab":
        assert not progress.lacks_room(target)
        progress.take(target, layer(0, total=6 * GIB, digest=f"sha256:{name}"))
        progress.take(target, layer(6 * GIB, total=6 * GIB, digest=f"sha256:{name}"))
    assert progress.lacks_room(target)


def test_hosts_that_have_the_model_come_first() -> None:
    assert names(choose(FLEET, Choice(copies=1), first="m:latest")) == ["b"]
    assert names(choose([host("x", free_gib=99), *FLEET], Choice(copies=2), first="m:latest")) == ["b", "a"]


def test_a_load_that_would_evict_a_busy_model_is_refused() -> None:
    models = (Model(name="m:latest", digest="m", resident=True), Model(name="n:latest", digest="n"))
    engine = Engine(url="http://e", models=models, models_max=1)
    idle, busy = Host(name="a", engines=(engine,)), Host(name="a", engines=(engine,), busy={"http://e": {"m": 1}})
    refuse_eviction([idle], [A], "n:latest")
    refuse_eviction([busy], [A], "m:latest")
    refuse_eviction([busy], [B], "n:latest")
    with pytest.raises(FabricError, match="busy") as error:
        refuse_eviction([busy], [A], "n:latest")
    assert error.value.code is Code.QUEUE_FULL
