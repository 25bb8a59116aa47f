"""A host does what can be worked out by hand."""

from pathlib import Path

import pytest
from msgspec.structs import replace

from bench.sim.formats import BLOCK_TOKENS
from bench.sim.hosts import Host, HostSpec, Job, read_hosts
from bench.sim.workload import Ask, ModelSpec
from common.errors import UsageError

SPEC = HostSpec(name="h", vram_gb=24, prefill_tps=1000, decode_tps=100, load_gbps=1, load_base_s=3)
M5, M10, OTHER10, THIRD10 = (
    ModelSpec("m5", 5),
    ModelSpec("m10", 10),
    ModelSpec("other10", 10),
    ModelSpec("third10", 10),
)


def job(model: ModelSpec, prompt: int, output: int, number: int = 0, blocks: tuple[int, ...] = ()) -> Job:
    return Job(number, Ask(0.0, "c", model, prompt, output, blocks))


def play(host: Host, *arrivals: tuple[float, Job]) -> list[tuple[float, int, bool]]:
    """Everything that happens: when, which job, and whether it ended."""
    happened: list[tuple[float, int, bool]] = []
    waiting = sorted(arrivals, key=lambda arrival: arrival[0])
    while True:
        due = host.due()
        if waiting and waiting[0][0] < due:
            at, arriving = waiting.pop(0)
            host.take(arriving, at)
        elif due < float("inf"):
            happened += [(due, each.number, ended) for each, ended in host.step(due)]
        else:
            return happened


def same(happened: list[tuple[float, int, bool]], *expected: tuple[float, int, bool]) -> bool:
    """Whether that happened, in this order and about then."""
    times = pytest.approx([at for at, _, _ in expected])
    return [each[1:] for each in happened] == [each[1:] for each in expected] and [at for at, _, _ in happened] == times


def test_load_read_write() -> None:
    host = Host(SPEC)
    one = job(M5, 500, 11)
    # 3 s + 5 GB at 1 GB/s; 500 tokens at 1000 a second; 10 tokens of 10 ms after the first.
    assert same(play(host, (0.0, one)), (8.5, 0, False), (8.6, 0, True))
    assert (one.arrived_at, one.loaded_at, one.begun_at) == (0.0, 8.0, 8.0)
    assert [one.first_at, one.end_at] == pytest.approx([8.5, 8.6])
    assert host.loads == 1
    assert host.computing_s == pytest.approx(0.6)


def test_a_model_twice_as_large_is_half_as_fast() -> None:
    assert same(play(Host(SPEC), (0.0, job(M10, 500, 11))), (14.0, 0, False), (14.2, 0, True))


@pytest.mark.parametrize("output", [0, 1])
def test_who_writes_nothing_more_ends_with_its_first_token(output: int) -> None:
    assert [(at, ended) for at, _, ended in play(Host(SPEC), (0.0, job(M5, 0, output)))] == [(8.0, False), (8.0, True)]


def test_streams_share_speed_and_reading_halves_it() -> None:
    host = Host(SPEC)
    # Each has 1 s of writing. The first is alone but slowed while the second reads from 8.5 to 9: 0.25 s are done.
    # Then both take 1.15 times as long: 0.75 s last until 9.8625. The second has 0.25 s left, alone.
    happened = play(host, (0.0, job(M5, 500, 101, 1)), (0.0, job(M5, 500, 101, 2)))
    assert same(happened, (8.5, 1, False), (9.0, 2, False), (9.8625, 1, True), (10.1125, 2, True))


def test_how_much_is_written() -> None:
    host = Host(SPEC)
    host.take(job(M5, 500, 101), 0.0)
    assert host.step(8.5)
    assert [written for _, written in host.written(8.75)] == [26]


def test_beyond_the_slots_they_wait_in_the_host() -> None:
    happened = play(Host(replace(SPEC, slots=1)), *((0.0, job(M5, 500, 101, number)) for number in (1, 2)))
    assert [at for at, _, _ in happened] == pytest.approx([8.5, 9.5, 10.0, 11.0])


def test_the_least_recently_used_is_evicted() -> None:
    host = Host(SPEC)
    play(host, (0.0, job(M10, 1, 1)), (50.0, job(OTHER10, 1, 1)), (100.0, job(M10, 1, 1)))
    assert list(host.loaded) == ["m10", "other10"]  # 11 GB each
    play(host, (200.0, job(THIRD10, 1, 1)))
    assert list(host.loaded) == ["m10", "third10"]
    assert host.loads == 3


def test_as_many_models_as_it_is_told() -> None:
    host = Host(replace(SPEC, models_max=1))
    play(host, (0.0, job(M5, 1, 1)), (50.0, job(M10, 1, 1)))
    assert list(host.loaded) == ["m10"]


def test_a_busy_model_blocks_the_line_but_not_those_who_need_no_load() -> None:
    host = Host(SPEC)
    play(host, (0.0, job(M10, 1, 1)), (0.0, job(OTHER10, 1, 1)))
    # Both write for 20 s alone. Then a third model is wanted: it waits for one of them to be idle, and behind it waits
    # a small model that needs a load too. A request for a model that is there goes past both.
    long = [job(model, 0, 1001, number) for number, model in enumerate((M10, OTHER10), 1)]
    blocked, behind, past = job(THIRD10, 0, 1, 3), job(M5, 0, 1, 4), job(M10, 0, 1, 5)
    happened = play(host, (50.0, long[0]), (50.0, long[1]), (51.0, blocked), (52.0, behind), (53.0, past))
    assert same(happened[2:4], (53.0, 5, False), (53.0, 5, True))
    assert long[0].end_at == long[1].end_at == pytest.approx(73.0)  # 20 s, 1.15 times as long
    assert blocked.loaded_at == pytest.approx(73.0 + 13.0)  # one load at a time …
    assert behind.loaded_at == pytest.approx(86.0 + 8.0)  # … in the order of the line
    assert "m10" not in host.loaded


def test_a_prompt_that_was_read_before() -> None:
    host = Host(SPEC)
    play(host, (0.0, job(M5, 1024, 1, 0, (1, 2))))
    again = job(M5, 1536, 1, 1, (1, 2, 3))
    play(host, (20.0, again))
    assert [again.hit, again.first_at] == pytest.approx([1024, 20.512])
    once_more = job(M5, 1536, 1, 2, (1, 2, 3))
    play(host, (30.0, once_more))
    assert [once_more.hit, once_more.first_at] == pytest.approx([1535, 30.001])  # its last token is computed


def test_an_unloaded_model_forgets() -> None:
    host = Host(replace(SPEC, models_max=1))
    play(host, (0.0, job(M5, 512, 1, 0, (1,))), (20.0, job(M10, 1, 1)))
    again = job(M5, 512, 1, 1, (1,))
    play(host, (50.0, again))
    assert again.hit == 0


def test_a_cache_forgets_the_ends_of_the_oldest_first() -> None:
    # Without RAM the cache is what the GPU has to spare: 0.1 GB.
    host = Host(replace(SPEC, vram_gb=5.6, cache_ram_gib=0))
    play(host, (0.0, job(M5, 1, 1)))
    room = host.cache_blocks(M5)
    assert room == int(0.1e9 / (64 * 1024 * 5**0.5 * 512)) == 1
    play(host, (20.0, job(M5, 3 * BLOCK_TOKENS, 1, 0, (1, 2, 3))))
    again = job(M5, 3 * BLOCK_TOKENS, 1, 1, (1, 2, 3))
    play(host, (40.0, again))
    assert again.hit == BLOCK_TOKENS


def test_hosts_of_a_file(tmp_path: Path) -> None:
    toml, json = tmp_path / "hosts.toml", tmp_path / "hosts.json"
    toml.write_text('[[hosts]]\nname = "a"\nvram_gb = 24\nprefill_tps = 1000\ndecode_tps = 50\n')
    json.write_text('{"hosts": [{"name": "a", "vram_gb": 24, "prefill_tps": 1000, "decode_tps": 50}]}')
    assert read_hosts(toml) == read_hosts(json) == (HostSpec(name="a", vram_gb=24, prefill_tps=1000, decode_tps=50),)


@pytest.mark.parametrize(
    ("text", "story"),
    [
        ("hosts = []", "length >= 1"),
        ("hosts = 3", "does not describe hosts"),
        ("[[hosts]]\nname='a'\nvram_gb=0\nprefill_tps=1\ndecode_tps=1", "vram_gb"),
        ("[[hosts]]\nname='a'\nvram=1", "vram"),
        ("{", "does not describe hosts"),
        ("[[hosts]]\nname='a'\nvram_gb=1\nprefill_tps=1\ndecode_tps=1\n" * 2, "same name"),
    ],
)
def test_a_file_that_describes_no_hosts(tmp_path: Path, text: str, story: str) -> None:
    file = tmp_path / "hosts.toml"
    file.write_text(text)
    with pytest.raises(UsageError, match=story):
        read_hosts(file)


def test_no_file_of_hosts(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="No such file"):
        read_hosts(tmp_path / "none.toml")
