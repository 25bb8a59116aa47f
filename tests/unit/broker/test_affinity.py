"""Which runner has read which beginnings: what is believed of their caches, and what is kept of it."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from broker import affinity
from broker.affinity import CAPACITY_BYTES, CAPACITY_BYTES_MAX, CAPACITY_BYTES_MIN, Prefixes
from common.prefix import BLOCK_BYTES, BOUNDARIES, chain


def hashes(text: str) -> tuple[bytes, ...]:
    """A prompt with a block for each letter."""
    return chain([letter.encode() * BLOCK_BYTES for letter in text])[0]


def known(prefixes: Prefixes[str], text: str) -> dict[str, int]:
    """How many blocks of it each runner has read, as both questions are answered."""
    found = {runner: size // BLOCK_BYTES for runner, size in prefixes.overlaps(hashes(text)).items()}
    assert found == {
        runner: size // BLOCK_BYTES
        for runner in ("one", "two", "three")
        if (size := prefixes.overlap(runner, hashes(text)))
    }
    return found


def test_a_runner_has_what_two_prompts_share() -> None:
    prefixes: Prefixes[str] = Prefixes()
    prefixes.remember("one", hashes("abcd"))
    prefixes.remember("two", hashes("abx"))
    assert known(prefixes, "abcdef") == {"one": 4, "two": 2}
    assert known(prefixes, "abxy") == {"one": 2, "two": 3}
    assert known(prefixes, "a") == {"one": 1, "two": 1}
    assert known(prefixes, "xab") == {}
    assert known(prefixes, "") == {}


def test_sizes_are_those_of_the_boundaries() -> None:
    prefixes: Prefixes[str] = Prefixes()
    prompt = chain([b"x" * 100_000])[0]
    prefixes.remember("one", prompt)
    assert prefixes.overlaps(prompt) == {"one": BOUNDARIES[len(prompt) - 1]}
    assert prefixes.overlap("one", prompt[:70]) == BOUNDARIES[69]


def test_nothing_is_remembered_of_a_prompt_without_beginnings() -> None:
    prefixes: Prefixes[str] = Prefixes()
    prefixes.remember("one", ())
    assert prefixes.overlap("one", ()) == 0
    assert prefixes.overlaps(()) == {}


def test_a_runner_that_is_unloaded_has_nothing() -> None:
    prefixes: Prefixes[str] = Prefixes()
    prefixes.remember("one", hashes("abc"))
    prefixes.remember("two", hashes("ab"))
    prefixes.forget("one")
    prefixes.forget("one")
    assert known(prefixes, "abc") == {"two": 2}
    prefixes.forget("two")
    assert (prefixes._holders, prefixes._held, prefixes._bytes, prefixes._capacity, prefixes._count) == ({},) * 4 + (0,)


def test_what_is_said_of_a_runner_that_was_unloaded_meanwhile_changes_nothing() -> None:
    prefixes: Prefixes[str] = Prefixes()
    prefixes.remember("one", hashes("abc"))
    prefixes.forget("one")
    prefixes.missed("one")
    prefixes.hit("one")
    assert not prefixes._capacity


def full(prefixes: Prefixes[str], runner: str, count: int) -> list[tuple[bytes, ...]]:
    """It has read so many prompts of 32 KiB each that have nothing in common."""
    prompts = [chain([bytes([65 + number % 26]) * (number + 1), b"x" * 32 * 2**10])[0] for number in range(count)]
    for prompt in prompts:
        prefixes.remember(runner, prompt)
    return prompts


def test_the_oldest_go_when_the_cache_is_full() -> None:
    prefixes: Prefixes[str] = Prefixes()
    prompts = full(prefixes, "one", 2 * CAPACITY_BYTES // (32 * 2**10))
    assert prefixes._bytes["one"] <= CAPACITY_BYTES
    assert prefixes.overlap("one", prompts[0]) == 0
    assert prefixes.overlap("one", prompts[-1]) == 32 * 2**10
    assert prefixes.overlap("one", prompts[len(prompts) // 2 + 2]) == 32 * 2**10


def test_what_is_used_again_stays_and_a_prompt_loses_its_end_first() -> None:
    prefixes: Prefixes[str] = Prefixes()
    prefixes._capacity["one"] = 8 * BLOCK_BYTES
    prefixes.remember("one", hashes("abcd"))
    prefixes.remember("one", hashes("wxyz"))
    prefixes.remember("one", hashes("ab"))
    prefixes.remember("one", hashes("123"))
    assert known(prefixes, "abcd") == {"one": 2}
    assert known(prefixes, "wxyz") == {"one": 3}
    assert known(prefixes, "123") == {"one": 3}


def test_what_should_have_been_there_and_was_not_makes_the_cache_smaller() -> None:
    prefixes: Prefixes[str] = Prefixes()
    prompts = full(prefixes, "one", 20)
    held = prefixes._bytes["one"]
    prefixes.missed("one")
    assert 0.6 * held < prefixes._bytes["one"] <= 0.7 * held
    assert prefixes.overlap("one", prompts[-1]) == 32 * 2**10
    for _ in range(50):
        prefixes.missed("one")
    prefixes.remember("one", prompts[0])
    assert CAPACITY_BYTES_MIN / 2 < prefixes._bytes["one"] <= CAPACITY_BYTES_MIN


def test_what_was_there_makes_it_larger_once_it_is_half_full() -> None:
    prefixes: Prefixes[str] = Prefixes()
    prefixes.remember("one", hashes("abc"))
    prefixes.hit("one")
    assert "one" not in prefixes._capacity
    full(prefixes, "one", CAPACITY_BYTES // (32 * 2**10))
    prefixes.hit("one")
    assert CAPACITY_BYTES < prefixes._capacity["one"] < 2 * CAPACITY_BYTES
    prefixes._capacity["one"] = CAPACITY_BYTES_MAX
    prefixes._bytes["one"] = CAPACITY_BYTES_MAX  # as if it were that full
    prefixes.hit("one")
    assert prefixes._capacity["one"] == CAPACITY_BYTES_MAX


def test_all_runners_together_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also by those that read nothing any more: what is kept of them goes when others need the room."""
    monkeypatch.setattr(affinity, "HASHES_MAX", 1000)
    prefixes: Prefixes[str] = Prefixes()
    first = full(prefixes, "0", 12)
    assert prefixes._count == 12 * 64
    for number in range(1, 20):
        full(prefixes, str(number), 12)
        assert sum(map(len, prefixes._held.values())) == prefixes._count <= 1000
        assert sum(map(len, prefixes._holders.values())) == prefixes._count
    assert len(prefixes._held) == 20
    assert 0 < prefixes.overlap("0", first[-1]) <= 50 * BLOCK_BYTES
    assert prefixes.overlap("19", first[-1]) > 0


def test_beginnings_that_make_no_chain_do_no_harm() -> None:
    """Only a broken gateway would send them."""
    prefixes: Prefixes[str] = Prefixes()
    a, b, c, d = hashes("a")[0], hashes("b")[0], hashes("c")[0], hashes("d")[0]
    prefixes.remember("one", (a, b, a))
    prefixes.remember("two", (d, c))
    assert prefixes.overlaps((c, b, d, a))
    assert prefixes.overlap("one", (d, b, a)) in {0, BOUNDARIES[2]}
    assert prefixes.overlaps((b"none", b, b"none")) == {"one": BOUNDARIES[1]}
    prefixes.forget("one")
    prefixes.forget("two")
    assert prefixes._count == 0


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["one", "two", "three"]),
            st.text("abc", min_size=1, max_size=6),
            st.sampled_from(["remember"] * 4 + ["missed", "hit", "forget"]),
        ),
        max_size=60,
    ),
    st.integers(6, 20),
)
def test_a_runner_has_the_beginning_of_all_it_has(calls: list[tuple[str, str, str]], blocks: int) -> None:
    """So halving finds the longest, and both questions have one answer; whatever was evicted."""
    prefixes: Prefixes[str] = Prefixes()
    for runner, text, what in calls:
        if what == "remember":
            prefixes._capacity.setdefault(runner, blocks * BLOCK_BYTES)
            prefixes.remember(runner, hashes(text))
            assert known(prefixes, text)[runner] == len(text)
        else:
            getattr(prefixes, what)(runner)
        for length in range(1, len(text) + 1):
            found = known(prefixes, text[:length])
            assert all(0 < size <= length for size in found.values())
        for runner, size in prefixes._bytes.items():
            assert size == sum(prefixes._held[runner].values()) <= prefixes._capacity.get(runner, CAPACITY_BYTES)
