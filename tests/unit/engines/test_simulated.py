import math

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from workers.embedded.simulated import Cache, Fault, Faults, Pace, embedding, token, transcript

PROMPTS = st.text(max_size=60)
SEEDS = st.integers(0, 2**31)


def test_the_words_never_change() -> None:
    # Offline checkers and stored results depend on them.
    assert transcript("Why is the sky blue?", 0, 5) == " sistal sokal mosar raran pomar"
    assert token("Why is the sky blue?", 7, 0) == " razar"


@given(PROMPTS, SEEDS, st.integers(0, 40))
def test_a_transcript_is_its_tokens(prompt: str, seed: int, n: int) -> None:
    assert transcript(prompt, seed, n) == "".join(token(prompt, seed, index) for index in range(n))


@given(PROMPTS, SEEDS, st.integers(0, 40), st.integers(0, 40))
@example("", 0, 1, 1)
@example("ends in a space ", 0, 3, 3)
def test_a_prompt_with_the_start_of_its_answer_is_continued(prompt: str, seed: int, done: int, more: int) -> None:
    whole = transcript(prompt, seed, done + more)
    begun = transcript(prompt, seed, done)
    assert begun + transcript(prompt + begun, seed, more) == whole


def test_prompts_and_seeds_matter() -> None:
    texts = {transcript(prompt, seed, 8) for prompt in ("a", "b", "a b") for seed in range(3)}
    assert len(texts) == 9


def test_texts_with_common_words_are_close() -> None:
    def cosine(one: str, other: str) -> float:
        a, b = embedding(one, 32), embedding(other, 32)
        return sum(x * y for x, y in zip(a, b, strict=True)) / (math.hypot(*a) * math.hypot(*b))

    assert cosine("the red dog", "the red dog") == pytest.approx(1)
    assert cosine("the red dog", "the red cat") > cosine("the red dog", "some blue thing")


def test_faults_happen_in_order_to_the_models_they_are_for() -> None:
    first, second = Fault("hang", count=2), Fault("truncate", model="other")
    faults = Faults([first, second])
    assert faults.take("other:latest") is first
    assert faults.take("mine:latest") is first
    assert faults.take("mine:latest") is None
    assert faults.take("other:latest") is second
    assert faults.pending == []


def test_beginnings_that_were_read_are_not_read_again() -> None:
    cache = Cache(2)
    assert cache.missing([*"abc"]) == 3
    cache.keep([*"abcxy"])  # with its answer
    assert cache.missing([*"abcxyz"]) == 1
    assert cache.missing([*"abq"]) == 1
    assert cache.missing([*"qabc"]) == 4
    assert cache.missing([*"abc"]) == 1, "the last is read in any case"
    cache.keep([*"abcxyz"])  # goes on from it, and takes its place
    cache.keep([*"mno"])
    assert cache.missing([*"abcxyzw"]) == 1
    cache.keep([*"pqr"])
    assert cache.missing([*"abcxyzw"]) == 7, "that was too long ago"
    assert cache.missing([*"mnop"]) == 1


def test_without_room_nothing_is_remembered() -> None:
    cache = Cache(0)
    cache.keep([*"abc"])
    assert cache.missing([*"abc"]) == 3


def test_streams_that_write_at_once_slow_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = 100.0
    monkeypatch.setattr("time.monotonic", lambda: clock)
    pace = Pace(0.5)
    with pace.writing():
        clock += 2
        assert pace.now_s() == pytest.approx(2)
        with pace.writing():
            assert pace.slowness == pytest.approx(1.5)
            clock += 3
            assert pace.now_s() == pytest.approx(4)
        clock += 1
        assert pace.now_s() == pytest.approx(5)
