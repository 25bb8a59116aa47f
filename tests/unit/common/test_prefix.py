"""A chain of hashes of a prompt's beginnings."""

from hashlib import blake2b
from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from common.prefix import BLOCK_BYTES, BOUNDARIES, HASH_BYTES, HASHES_MAX, chain


def test_boundaries_lie_512_bytes_apart_and_from_32_kib_on_ten_percent() -> None:
    assert len(BOUNDARIES) == HASHES_MAX
    assert BOUNDARIES[:64] == tuple(range(BLOCK_BYTES, 32 * 2**10 + 1, BLOCK_BYTES))
    steps = [(after - before) / before for before, after in pairwise(BOUNDARIES[63:])]
    assert all(0.0999 < step <= 0.1 for step in steps)
    assert 13.9 < BOUNDARIES[-1] / 2**20 < 14


def test_less_than_a_block_has_no_beginnings() -> None:
    assert chain([]) == ((), 0)
    assert chain([b"x" * (BLOCK_BYTES - 1)]) == ((), BLOCK_BYTES - 1)
    assert chain([b"x" * (BLOCK_BYTES - 1), b"", b"x"])[0] == chain([b"x" * BLOCK_BYTES])[0]


def test_what_is_longer_than_all_boundaries_has_a_size_still() -> None:
    size = BOUNDARIES[-1] + 1000
    hashes, told = chain([b"x" * 1000, bytes(1) * BOUNDARIES[-1]])
    assert (len(hashes), told) == (HASHES_MAX, size)


@settings(deadline=None)
@given(st.binary(max_size=64), st.integers(0, 3000), st.lists(st.integers(0, 60_000), max_size=6))
def test_each_hash_is_of_all_before_its_boundary_however_it_is_cut(seed: bytes, repeats: int, cuts: list[int]) -> None:
    whole = seed * repeats
    at = sorted({0, len(whole), *(cut for cut in cuts if cut < len(whole))})
    hashes, size = chain(whole[start:end] for start, end in pairwise(at))
    assert size == len(whole)
    assert hashes == tuple(
        blake2b(whole[:boundary], digest_size=HASH_BYTES).digest() for boundary in BOUNDARIES if boundary <= len(whole)
    )


@given(st.integers(0, 20_000), st.integers(0, 20_000), st.integers(0, 20_000))
def test_two_chains_agree_up_to_the_first_difference(shared: int, one: int, other: int) -> None:
    chains = [chain([b"s" * shared, ending])[0] for ending in (b"1" * one, b"2" * other)]
    agree = sum(a == b for a, b in zip(*chains, strict=False))
    assert agree == sum(boundary <= shared for boundary in BOUNDARIES)
