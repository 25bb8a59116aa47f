"""Continuing a stream: what is asked of the engine, and what the reader gets of its answer."""

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import json

from workers import continuation as module
from workers.continuation import STOP_CHARS_MAX, CannotContinue, Continuation

GENERATE, CHAT = "/api/generate", "/api/chat"
PATHS = pytest.mark.parametrize("path", [GENERATE, CHAT])
AT = "2026-01-01T00:00:00Z"
USER = {"role": "user", "content": "Why?"}


def job(path: str = GENERATE, **more: Any) -> bytes:
    return json.encode({"model": "m"} | ({"messages": [USER]} if path == CHAT else {"prompt": "Why?"}) | more)


def line(path: str, text: str, *, done: bool = False, **more: Any) -> bytes:
    said = {"message": {"role": "assistant", "content": text}} if path == CHAT else {"response": text}
    return json.encode({"model": "m", "created_at": AT, **said, "done": done, **more}) + b"\n"


def lines(path: str, texts: Iterable[str]) -> list[bytes]:
    return [line(path, text) for text in texts]


def rendering(prompt: str) -> bytes:
    return json.encode({"model": "m", "response": "", "done": False, "_debug_info": {"rendered_template": prompt}})


def begun(
    path: str, texts: Iterable[str], prompt: str = "P:", **more: Any
) -> tuple[Continuation, dict[str, Any] | None]:
    """A continuation that waits for the engine's answer, and what it asked for."""
    continuation = Continuation.plan(path, job(path, **more), lines(path, texts))
    request = continuation.request(rendering(prompt))
    return continuation, None if request is None else json.decode(request)


def raw_answer(texts: Iterable[str], **final: Any) -> bytes:
    return b"".join([*lines(GENERATE, texts), line(GENERATE, "", done=True, **({"done_reason": "stop"} | final))])


def decoded(data: bytes) -> list[dict[str, Any]]:
    return [json.decode(one) for one in data.splitlines()]


def text_of(data: bytes) -> str:
    return "".join(one["message"]["content"] if "message" in one else one["response"] for one in decoded(data))


def chopped(data: bytes, cuts: Sequence[int]) -> list[bytes]:
    edges = [0, *sorted(cut % (len(data) + 1) for cut in cuts), len(data)]
    return [data[start:end] for start, end in pairwise(edges)]


# What is asked of the engine ------------------------------------------------------------------------------------------


def test_the_prompt_is_rendered_from_the_whole_job_but_stays_loaded() -> None:
    body = job(CHAT, keep_alive=0, options={"num_ctx": 512, "num_predict": 9, "seed": 2**70}, unheard_of=[1.50])
    render = Continuation.plan(CHAT, body, []).render
    assert render is not None
    expected = json.decode(body) | {"stream": False, "_debug_render_only": True}
    del expected["keep_alive"]
    expected["options"]["num_predict"] = 1
    assert json.decode(render) == expected


@PATHS
def test_the_rest_is_generated_raw_from_prompt_and_text(path: str) -> None:
    same = {"keep_alive": "5m", "truncate": False, "shift": False, "logprobs": True, "top_logprobs": 2}
    options = {"temperature": 0.5, "seed": 7, "num_ctx": 512, "stop": ["\n"], "num_predict": -1}
    more = same | {"options": options, "system": "s", "template": "t", "think": False, "format": "", "raw": False}
    continuation, request = begun(path, ["Because", "", " \u00fc\U0001f600"], "<user>Why?<assistant>", **more)
    assert continuation.render_path == path
    assert request == same | {
        "model": "m",
        "prompt": "<user>Why?<assistant>Because \u00fc\U0001f600",
        "raw": True,
        "stream": True,
        "think": False,
        "options": options,
    }


def test_a_raw_prompt_is_rendered_already() -> None:
    continuation = Continuation.plan(GENERATE, job(raw=True), lines(GENERATE, ["Be", "cause"]))
    assert continuation.render is None
    request = continuation.request(b"")
    assert request is not None
    assert json.decode(request)["prompt"] == "Why?Because"


def test_text_is_taken_as_json_means_it() -> None:
    events = [rb'{"response":"\u003cb\u003e \ud83d\ude00\n","done":false}', rb'{"response":"\"\\"}']
    request = Continuation.plan(GENERATE, job(), events).request(rendering(""))
    assert request is not None
    assert json.decode(request)["prompt"] == '<b> \U0001f600\n"\\'


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"num_predict": 10}, {"num_predict": 8}),
        ({"num_predict": 3.0}, {"num_predict": 1}),
        ({"num_predict": 0}, {"num_predict": 0}),
        ({"num_predict": -1}, {"num_predict": -1}),
        ({"num_predict": -2}, {"num_predict": -2}),
        ({"num_predict": None}, {"num_predict": None}),
        ({"num_predict": "9"}, {"num_predict": "9"}),
        ({}, {}),
        (None, {}),
    ],
)
def test_num_predict_counts_for_the_whole(options: Any, expected: dict[str, Any]) -> None:
    _, request = begun(GENERATE, ["a", "", "b"], options=options)
    assert request is not None
    assert request["options"] == expected


@PATHS
@pytest.mark.parametrize("limit", [2, 1])
def test_nothing_is_left_when_num_predict_is_used_up(path: str, limit: int) -> None:
    continuation, request = begun(path, ["a", "b"], options={"num_predict": limit})
    assert request is None
    ending = line(path, "", done=True, done_reason="length", eval_count=2)
    assert json.decode(continuation.ending()) == json.decode(ending)
    assert continuation.ending().endswith(b"}\n")


@pytest.mark.parametrize(
    ("turn", "prompt", "texts", "appended", "tokens"),
    [
        # The engine repeated the prefill, alone or with a token: it is in the prompt already.
        ({"role": "assistant", "content": "One two"}, "P:One two", ["One two", " three"], " three", 1),
        ({"role": "Assistant", "content": "One two"}, "P:One two", ["One two three", " four"], " three four", 2),
        # It did not repeat it.
        ({"role": "assistant", "content": "One two"}, "P:One two", [" three"], " three", 1),
        ({"role": "assistant", "content": "One two"}, "P:One two", ["One", " two"], "One two", 2),
        ({"role": "assistant", "content": "One two"}, "P:One two", [], "", 0),
        # The template closes the turn: what was said is an answer of its own.
        ({"role": "assistant", "content": "One two"}, "P:One two<end>", ["One two", " three"], "One two three", 2),
        # There is no prefill.
        ({"role": "user", "content": "One two"}, "P:One two", ["One two", " three"], "One two three", 2),
        ({"role": "assistant", "content": ""}, "P:", ["One"], "One", 1),
        ({"role": "assistant", "content": None}, "P:None", ["None"], "None", 1),
        ({"role": "assistant"}, "P:", ["One"], "One", 1),
    ],
)
def test_a_prefill_is_appended_once(turn: Any, prompt: str, texts: list[str], appended: str, tokens: int) -> None:
    continuation, request = begun(CHAT, texts, prompt, messages=[USER, turn])
    assert request is not None
    assert request["prompt"] == prompt + appended
    assert decoded(continuation.dress(raw_answer([], eval_count=5)))[-1]["eval_count"] == 5 + tokens


def test_no_messages_are_no_prefill() -> None:
    _, request = begun(CHAT, ["One"], "P:", messages=[])
    assert request is not None
    assert request["prompt"] == "P:One"


def test_a_prefill_has_no_part_in_a_stop_string_or_a_generate() -> None:
    prefill = {"role": "assistant", "content": "One"}
    continuation, _ = begun(CHAT, ["One"], "P:One", messages=[USER, prefill], options={"stop": ["e!"]})
    assert text_of(continuation.dress(raw_answer(["!", "?"]))) == "!?"
    _, request = begun(GENERATE, ["One"], "P:One", messages=[USER, prefill])
    assert request is not None
    assert request["prompt"] == "P:OneOne"


# What cannot be continued ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "event", "why"),
    [
        (GENERATE, line(GENERATE, "", done=True, done_reason="stop"), "complete"),
        (CHAT, line(CHAT, "", done=True), "complete"),
        (GENERATE, line(GENERATE, "", thinking="Hm"), "plain text"),
        (GENERATE, line(GENERATE, "", tool_calls=[{"function": {}}]), "plain text"),
        (CHAT, json.encode({"message": {"role": "assistant", "content": "", "thinking": "Hm"}}), "plain text"),
        (CHAT, json.encode({"message": {"role": "assistant", "tool_calls": [{"function": {}}]}}), "plain text"),
        (GENERATE, line(CHAT, "a"), "cannot be read"),
        (CHAT, line(GENERATE, "a"), "cannot be read"),
        (GENERATE, b'{"error":"no"}\n', "cannot be read"),
        (GENERATE, b'{"response":"cut', "cannot be read"),
        (GENERATE, b'{"response":"\\ud800"}\n', "cannot be read"),
        (GENERATE, b"\n", "cannot be read"),
    ],
)
def test_only_plain_text_goes_on(path: str, event: bytes, why: str) -> None:
    with pytest.raises(CannotContinue, match=why):
        Continuation.plan(path, job(path), [line(path, "a"), event])


def test_what_is_objected_to_is_not_planned() -> None:
    with pytest.raises(CannotContinue, match="not streamed"):
        Continuation.plan(GENERATE, job(stream=False), [])


def test_stop_strings_are_bounded() -> None:
    Continuation.plan(GENERATE, job(options={"stop": ["a" * (STOP_CHARS_MAX - 1), "b"]}), [])
    with pytest.raises(CannotContinue, match="stop strings"):
        Continuation.plan(GENERATE, job(options={"stop": "a" * (STOP_CHARS_MAX + 1)}), [])


@pytest.mark.parametrize("answer", [b"", b"[]", b'{"done":true,"done_reason":"load"}', b'{"_debug_info":{}}'])
def test_an_engine_that_does_not_render_is_no_help(answer: bytes) -> None:
    with pytest.raises(CannotContinue, match="renders"):
        Continuation.plan(CHAT, job(CHAT), []).request(answer)


# What the reader gets -------------------------------------------------------------------------------------------------


def test_a_generates_lines_go_through_as_they_are() -> None:
    continuation, _ = begun(GENERATE, ["a"])
    data = b'{"model":"m","created_at":"t","response":"\\u003cb","x":1,"done":false}\n'
    assert continuation.dress(data) == data


def test_a_chats_lines_are_dressed() -> None:
    continuation, _ = begun(CHAT, ["a"])
    data = line(GENERATE, "<\u00fc", logprobs=[{"token": "b", "logprob": -0.50}])
    head = f'{{"model":"m","created_at":"{AT}","message":{{"role":"assistant","content":"<\u00fc"}},"done":false,'
    assert continuation.dress(data).decode() == head + '"logprobs":[{"token":"b","logprob":-0.5}]}\n'
    assert decoded(continuation.dress(b'{"response":"c"}\n')) == [
        {"message": {"role": "assistant", "content": "c"}, "done": False}
    ]


@PATHS
def test_the_last_line_counts_for_the_whole(path: str) -> None:
    continuation, _ = begun(path, ["a", "", "b"])
    timing = {"total_duration": 9, "load_duration": 1, "prompt_eval_duration": 2, "eval_duration": 3}
    final = {"done_reason": "length", "context": [1, 2], "prompt_eval_count": 12, "eval_count": 5, **timing}
    (last,) = decoded(continuation.dress(line(GENERATE, "", done=True, **final)))
    counted = {"done_reason": "length", "prompt_eval_count": 10, "eval_count": 7, **timing}
    assert last == json.decode(line(path, "", done=True, **counted))
    assert not continuation.done


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ({}, {"eval_count": 2}),
        ({"prompt_eval_count": 1, "eval_count": 0}, {"prompt_eval_count": 0, "eval_count": 2}),
        ({"prompt_eval_count": "many", "eval_count": None}, {"prompt_eval_count": 0, "eval_count": 2}),
    ],
)
def test_counts_an_engine_does_not_give_are_not_made_up(counts: dict[str, Any], expected: dict[str, Any]) -> None:
    continuation, _ = begun(GENERATE, ["a", "b"])
    (last,) = decoded(continuation.dress(line(GENERATE, "", done=True, **counts)))
    assert {name: last[name] for name in last if name.endswith("_count")} == expected


@PATHS
@pytest.mark.parametrize(
    "data",
    [
        b'{"error":"the model \\"m\\" broke"}\n',
        b'{"x":"response"}\n',
        b"<html>\n",
        b"\n",
        b'{"response":7}\n',
        b'{"response":"","done":true,"\xff":1}\n',
    ],
)
def test_what_is_no_answer_goes_through_as_it_is(path: str, data: bytes) -> None:
    continuation, _ = begun(path, ["a"])
    assert continuation.dress(data) == data


@PATHS
def test_the_rest_of_a_body_is_not_lost(path: str) -> None:
    continuation, _ = begun(path, ["a"])
    unended = raw_answer(["b"]).rstrip()
    assert text_of(continuation.dress(unended)) == "b"
    assert json.decode(continuation.eof())["done"] is True
    assert continuation.eof() == b""
    assert continuation.dress(b'{"response":"cu') == b""
    assert continuation.eof() == b'{"response":"cu'


def test_an_endless_line_is_handed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LINE_BYTES_MAX", 150)
    continuation, _ = begun(CHAT, ["a"], options={"stop": "ab"})
    held = line(GENERATE, "")
    assert continuation.dress(held + b"x" * 90) == b""
    handed_on = continuation.dress(b"y" * 90)
    assert decoded(handed_on.splitlines()[0]) == decoded(line(CHAT, ""))
    assert handed_on.endswith(b"\n" + b"x" * 90 + b"y" * 90)
    assert continuation.eof() == b""


TEXTS = st.lists(st.text(max_size=4), max_size=12)


@given(path=st.sampled_from([GENERATE, CHAT]), texts=TEXTS, cut=st.integers(0, 12), cuts=st.lists(st.integers(0)))
def test_however_it_is_cut_the_reader_gets_the_whole_text_once(
    path: str, texts: list[str], cut: int, cuts: list[int]
) -> None:
    continuation, request = begun(path, texts[:cut])
    assert request is not None
    assert request["prompt"] == "P:" + "".join(texts[:cut])
    answer = raw_answer(texts[cut:], eval_count=len(texts[cut:]), prompt_eval_count=100)
    *pieces, last = [continuation.dress(piece) for piece in chopped(answer, cuts)]
    assert all(piece == b"" or piece.endswith(b"\n") for piece in pieces)
    dressed = b"".join([*pieces, last, continuation.eof()])
    assert text_of(dressed) == "".join(texts[cut:])
    assert len(decoded(dressed)) == len(texts[cut:]) + 1
    # The dressed lines are the job's own: a second host that dies is no other case.
    again, _ = begun(path, [])
    events = [*lines(path, texts[:cut]), *dressed.splitlines()[:-1]]
    request_again = Continuation.plan(path, job(path), events).request(rendering("P:"))
    assert request_again is not None
    assert json.decode(request_again)["prompt"] == "P:" + "".join(texts)
    assert again.done is False


# Stop strings across the seam -----------------------------------------------------------------------------------------


@PATHS
@pytest.mark.parametrize("cut", range(1, 6))
@pytest.mark.parametrize("as_list", [False, True])
def test_a_stop_string_across_the_seam_ends_the_stream(path: str, cut: int, as_list: bool) -> None:
    stop = "<stop>"
    continuation, _ = begun(path, ["text", stop[:cut]], options={"stop": ["", stop] if as_list else stop})
    answer = raw_answer([*stop[cut:], "never"], prompt_eval_count=9)
    dressed = b"".join(continuation.dress(bytes([byte])) for byte in answer)
    assert continuation.done
    expected = line(path, "", done=True, done_reason="stop", eval_count=2 + len(stop[cut:]))
    assert decoded(dressed) == decoded(expected)
    assert continuation.eof() == b""


def test_a_stop_string_ends_the_stream_within_a_batch() -> None:
    continuation, _ = begun(GENERATE, ["text<"], options={"stop": "<s>"})
    dressed = continuation.dress(raw_answer(["s", "", ">more", "never"]) + b'{"resp')
    assert [(one["done_reason"], one["eval_count"]) for one in decoded(dressed)] == [("stop", 1 + 2)]
    assert continuation.eof() == b""


@PATHS
def test_text_that_goes_on_otherwise_is_released_line_by_line(path: str) -> None:
    continuation, _ = begun(path, ["text<st"], options={"stop": "<stop>"})
    assert continuation.dress(line(GENERATE, "o") + line(GENERATE, "")) == b""
    released = continuation.dress(line(GENERATE, "ne") + line(GENERATE, "p>"))
    assert decoded(released) == [json.decode(one) for one in lines(path, ["o", "", "ne", "p>"])]


@PATHS
@pytest.mark.parametrize("end", [line(GENERATE, "", done=True, eval_count=1), b'{"error":"broke"}\n', b"", b"{"])
def test_an_answer_that_ends_first_releases_what_was_held(path: str, end: bytes) -> None:
    continuation, _ = begun(path, ["text<st"], options={"stop": "<stop>"})
    dressed = continuation.dress(line(GENERATE, "o") + end) + continuation.eof()
    first, *rest = dressed.splitlines()
    assert decoded(first) == decoded(line(path, "o"))
    assert len(rest) == bool(end)
    assert not continuation.done


def test_what_was_released_cannot_be_part_of_a_stop_string_any_more() -> None:
    continuation, _ = begun(GENERATE, ["text<st"], options={"stop": "<stop>"})
    data = line(GENERATE, "o") + b"<html>\n" + line(GENERATE, "p>")
    assert continuation.dress(data) == data


def test_a_last_line_with_text_may_complete_a_stop_string() -> None:
    continuation, _ = begun(CHAT, ["text<"], options={"stop": "<>"})
    (last,) = decoded(continuation.dress(line(GENERATE, ">", done=True, done_reason="length")))
    assert (last["message"]["content"], last["done_reason"], last["eval_count"]) == ("", "stop", 2)


def test_lines_without_text_are_not_held_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LINE_BYTES_MAX", 1000)
    continuation, _ = begun(GENERATE, ["a"], options={"stop": "ab"})
    empty = line(GENERATE, "")
    held = 0
    while not (released := continuation.dress(empty)):
        held += 1
        assert held < 100
    assert released == empty * (held + 1)


AB = st.text("ab", max_size=4)


@given(
    texts=st.lists(AB, max_size=4),
    new=st.lists(AB, max_size=6),
    stops=st.lists(st.text("ab", max_size=5), max_size=3),
    cuts=st.lists(st.integers(0), max_size=8),
)
def test_exactly_the_stop_strings_across_the_seam_end_a_stream(
    texts: list[str], new: list[str], stops: list[str], cuts: list[int]
) -> None:
    delivered, rest = "".join(texts), "".join(new)
    straddles = any(
        delivered.endswith(stop[:count]) and rest.startswith(stop[count:])
        for stop in stops
        for count in range(1, len(stop))
    )
    continuation, _ = begun(GENERATE, texts, options={"stop": stops})
    dressed = b"".join(continuation.dress(piece) for piece in chopped(raw_answer(new), cuts)) + continuation.eof()
    assert continuation.done == straddles
    assert text_of(dressed) == ("" if straddles else rest)
    assert [one["done"] for one in decoded(dressed)].count(True) == 1
    assert decoded(dressed)[-1]["done_reason"] == "stop"
