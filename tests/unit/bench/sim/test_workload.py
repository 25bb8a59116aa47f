"""Who asks what is drawn from a seed, and conversations stay together."""

from collections import Counter
from dataclasses import replace

import pytest

from bench.sim.formats import Row
from bench.sim.workload import Ask, ModelSpec, flooded, one_cache, scaled, synthesise
from common.prefix import BOUNDARIES, HASHES_MAX

MODEL = ModelSpec("m:latest", 5.0)


def ask(at_s: float, prompt_tokens: int, *blocks: int, client: str = "c", output_tokens: int = 1) -> Ask:
    return Ask(at_s, client, MODEL, prompt_tokens, output_tokens, blocks)


def test_the_same_seed_asks_the_same() -> None:
    rows = [Row(index, 100, 10) for index in range(200)]
    once = synthesise(rows, models=5, clients=7, seed=1)
    assert once == synthesise(rows, models=5, clients=7, seed=1)
    assert once != synthesise(rows, models=5, clients=7, seed=2)
    assert {each.client for each in once} <= {f"client{number:03}" for number in range(7)}


def test_sizes_end_where_hosts_do() -> None:
    asks = synthesise([Row(index, 1, 1) for index in range(500)], models=4, clients=50, seed=0, size_gb_max=16.0)
    assert sorted({each.model.size_gb for each in asks}) == pytest.approx([2, 4, 8, 16])


def test_a_conversation_has_one_client_and_one_model() -> None:
    # All begin with block 0, as with a common system prompt; then come 20 conversations of 10 turns.
    rows = [Row(turn, 2000, 10, (0, 1 + turn % 20, 100 + turn % 20, 1000 + turn)) for turn in range(200)]
    asks = synthesise(rows, models=5, clients=7, seed=3)
    owners = {(each.blocks[1], each.client, each.model.name) for each in asks}
    assert len(owners) == 20
    assert len({each.client for each in asks}) > 1


def test_what_a_trace_does_not_tell_is_nobody_elses() -> None:
    rows = [Row(0, 1500, 1), Row(1, 1500, 1), Row(2, 1500, 1, (7,)), Row(3, 1500, 1, (7, -3, -4, -5))]
    blocks = [each.blocks for each in synthesise(rows, models=1, clients=1, seed=0)]
    assert [len(each) for each in blocks] == [3, 3, 3, 3]
    assert len({block for each in blocks for block in each}) == 11  # only the 7 is in two of them


def test_chains_agree_as_far_as_blocks_do() -> None:
    one, other = ask(0, 3 * 512, 1, 2, 3).prefix(), ask(0, 3 * 512, 1, 2, 4).prefix()
    assert len(one) == 12  # 6 KiB in boundaries 512 bytes apart
    assert one[:8] == other[:8]
    assert not set(one[8:]) & set(other[8:])
    assert len(ask(0, 10_000_000, *range(20_000)).prefix()) <= HASHES_MAX
    assert ask(0, BOUNDARIES[0] // 4 - 1, 1).prefix() == ()


def test_scaling_stretches_time() -> None:
    asks = [ask(at_s, 1) for at_s in (0.0, 60.0, 120.0)]
    assert [each.at_s for each in scaled(asks, 0.5, None)] == [0.0, 120.0, 240.0]
    assert [each.at_s for each in scaled(asks, 2.0, 0.5)] == [0.0, 30.0]


def test_a_flood_is_one_clients_and_like_the_others() -> None:
    asks = [ask(float(index), 100 + index, index, client=f"c{index % 5}") for index in range(100)]
    more, client = flooded(asks, 1.0, seed=1)
    extra = [each for each in more if each.flood]
    others = [each for each in asks if 33 <= each.at_s < 66 and each.client != client]
    assert len(extra) == len(others)
    assert {each.client for each in extra} == {client}
    assert all(33 <= each.at_s <= 66 for each in extra)
    assert [each.at_s for each in more] == sorted(each.at_s for each in more)
    assert Counter(block for each in more for block in each.blocks).most_common(1)[0][1] == 1


def test_the_hits_of_one_cache() -> None:
    asks = [ask(0, 1024, 1, 2), ask(1, 1536, 1, 2, 3), ask(2, 512, 1)]
    assert one_cache(asks) == (1024 + 511) / 3072  # the last token is always computed
    assert one_cache(asks, 1) == (512 + 511) / 3072  # only the beginning is still there
    assert one_cache([replace(asks[0], prompt_tokens=0, blocks=())]) == 0.0
