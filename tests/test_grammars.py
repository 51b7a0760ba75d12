"""Texts that follow grammars, with all else a request can ask for and whatever the scheduler does: always the same text."""

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from minivllm.engine.guide import Guide
from minivllm.errors import InvalidRequest
from minivllm.llm import LLM, Completion
from minivllm.text.grammar import choice_grammar, json_grammar, text_grammar
from minivllm.types import Grammar, SamplingParams

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "kind": {"enum": ["a small red fox", "a big brown bear"]},
        "legs": {"type": "integer", "minimum": 2, "maximum": 4},
    },
    "required": ["name", "kind", "legs"],
    "additionalProperties": False,
}
PROMPT = "Once upon a time there was a bear and a fox. They told everybody about themselves: "
OPTIONS: dict[str, Any] = {
    "device": "cpu", "num_threads": 1, "dtype": "float32", "batch_invariant": True, "max_num_seqs": 8,
    "max_num_batched_tokens": 64, "num_gpu_blocks_override": 200,
}  # fmt: skip


def asked(grammar: Grammar | None, **more: Any) -> SamplingParams:
    return SamplingParams(**{"max_tokens": 120, "seed": 5, "grammar": grammar, **more})


ROUND = {"type": "array", "items": {"const": "round and round it goes"}, "minItems": 3, "maxItems": 3}
REQUESTS: Sequence[tuple[str, SamplingParams]] = [
    (PROMPT, asked(json_grammar(PERSON), n=3)),
    (PROMPT, asked(json_grammar(PERSON, compact=True), temperature=0.0)),
    (PROMPT, asked(None, max_tokens=100, ignore_eos=True)),
    ("The", asked(Grammar("regex", "[A-Z][a-z]{2,9}( [a-z]{1,9}){3,6}\\."), temperature=1.5, frequency_penalty=0.5)),
    (PROMPT * 2, asked(choice_grammar(["a fox", "a bear", "a fox and a bear"]), logit_bias=((40, 3.0),))),
    (PROMPT + "x", asked(json_grammar(PERSON), logprobs=2)),
    (PROMPT, asked(text_grammar('start: pair ("; " pair)*\npair: /[a-z]{1,5}/ "=" /[0-9]{1,3}/'), max_tokens=20, top_k=30)),
    ("A", asked(json_grammar(ROUND, compact=True))),
]


@pytest.fixture(scope="module", params=[0, 3], ids=["followed here", "in workers"])
def make_llm(bundled_model: Path, request: pytest.FixtureRequest) -> Callable[..., LLM]:
    return lambda **options: LLM(str(bundled_model), **{**OPTIONS, "num_grammar_workers": request.param, **options})


def texts(llm: LLM, requests: Sequence[tuple[str, SamplingParams]] = REQUESTS) -> list[tuple[tuple[int, ...], str, Any]]:
    done = llm.generate([prompt for prompt, _ in requests], [sampling for _, sampling in requests])
    llm.engine.check()
    return [(tuple(c.token_ids), c.text, c.finish_reason) for c in done]


@pytest.fixture(scope="module")
def alone(make_llm: Callable[..., LLM]) -> list[tuple[tuple[int, ...], str, Any]]:
    """Every request by itself, one after the other."""
    llm = make_llm(max_num_seqs=1, enable_prefix_caching=False, num_grammar_workers=0)
    return [text for request in REQUESTS for text in texts(llm, [request])]


def check_person(text: str) -> None:
    person = json.loads(text)
    assert list(person) == ["name", "kind", "legs"] and len(person["name"]) <= 12
    assert person["kind"] in PERSON["properties"]["kind"]["enum"] and 2 <= person["legs"] <= 4  # type: ignore[index]


def test_texts_are_what_was_asked_for(alone: list[tuple[tuple[int, ...], str, Any]]) -> None:
    found = [text for _, text, _ in alone]
    assert len({*found[:3]}) == 3, "each of n has random numbers of its own"
    for text in (*found[:4], found[7]):
        check_person(text)
    assert found[3] == json.dumps(json.loads(found[3]), separators=(",", ":"), ensure_ascii=False)
    assert re.fullmatch("[A-Z][a-z]{2,9}( [a-z]{1,9}){3,6}\\.", found[5])
    assert found[6] in ("a fox", "a bear", "a fox and a bear")
    assert re.match("[a-z]{1,5}=[0-9]", found[8])
    assert json.loads(found[9]) == ["round and round it goes"] * 3
    assert [reason for *_, reason in alone[:4]] == ["stop"] * 4


WAYS: list[dict[str, Any]] = [
    {}, {"async_scheduling": True}, {"enable_prefix_caching": False}, {"max_num_batched_tokens": 16, "max_num_seqs": 4},
    {"num_gpu_blocks_override": 12, "async_scheduling": True}, {"batching_policy": "separate"},
]  # fmt: skip


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_the_same_text_whatever_the_scheduler_does(
    make_llm: Callable[..., LLM], alone: list[tuple[tuple[int, ...], str, Any]], way: dict[str, Any]
) -> None:
    llm = make_llm(**way)
    preempted = 0
    step = llm.engine.step

    def counting() -> Any:
        nonlocal preempted
        output = step()
        preempted += 0 if output is None or output.record is None else len(output.record.preempted)
        return output

    llm.engine.step = counting  # type: ignore[method-assign]
    assert texts(llm) == alone
    assert texts(llm) == alone, "again, with what the caches kept"
    assert (preempted > 0) == ("num_gpu_blocks_override" in way)


def test_certain_tokens_take_no_steps_of_their_own(make_llm: Callable[..., LLM]) -> None:
    llm = make_llm()
    llm.generate(["A"], asked(choice_grammar(["yes"])))  # who follows has begun
    request = REQUESTS[-1]
    steps = {}
    for logprobs in (None, 0):
        count, step = 0, type(llm.engine).step

        def counting() -> Any:
            nonlocal count
            count += 1
            return step(llm.engine)  # noqa: B023 - called in this turn of the loop only

        llm.engine.step = counting  # type: ignore[method-assign]
        ((ids, text, _),) = texts(llm, [(request[0], asked(request[1].grammar, logprobs=logprobs))])
        steps[logprobs] = (count, ids, text)
    assert steps[None][1:] == steps[0][1:], "sampled or not, they are the same"
    assert steps[0][0] > len(steps[0][1]) - 1 and steps[None][0] < len(steps[0][1]) / 2


def test_logprobs_of_held_tokens_are_raw(make_llm: Callable[..., LLM]) -> None:
    (done,) = make_llm().generate([PROMPT], asked(json_grammar(PERSON), logprobs=3))
    assert len(done.logprobs) == len(done.token_ids)
    assert any(token.rank > 3 for token in done.logprobs), "what the model would have said stands first"


def test_prior_output_is_followed(make_llm: Callable[..., LLM], alone: list[tuple[tuple[int, ...], str, Any]]) -> None:
    """A request that begins with some of its output gives the rest, and one whose output does not fit is refused."""
    import msgspec

    llm = make_llm()
    whole = alone[4 - 1][0]  # greedy JSON
    request = msgspec.structs.replace(llm._request(*REQUESTS[1]), prior_output_ids=whole[:9])
    llm.engine.add(request)
    rest: list[int] = []
    while llm.engine.has_work:
        if (output := llm.engine.step()) is not None:
            rest += [token for event in output.events for token in event.token_ids]
    assert tuple(rest) == whole[9:]
    llm.engine.add(msgspec.structs.replace(request, id="other", prior_output_ids=whole[3:9]))
    events = []
    while llm.engine.has_work:
        if (output := llm.engine.step()) is not None:
            events += output.events
    assert [event.finish_reason for event in events] == ["error"] and "does not fit" in str(events[0].error)


def test_grammars_that_cannot_be_followed(make_llm: Callable[..., LLM]) -> None:
    llm = make_llm()
    for bad in (Grammar("regex", "(a"), Grammar("lark", "start: nothing"), Grammar("json", '{"not": {}}')):
        with pytest.raises(InvalidRequest):
            llm.generate([PROMPT], asked(bad))
    with pytest.raises(InvalidRequest, match="No token is left"):
        llm.generate([PROMPT], asked(choice_grammar(["yes"]), allowed_token_ids=(5,)))
    assert llm.generate([PROMPT], asked(choice_grammar(["yes"])))[0].text == "yes"


def test_a_fault_in_following_ends_that_request(make_llm: Callable[..., LLM], monkeypatch: pytest.MonkeyPatch) -> None:
    llm = make_llm(num_grammar_workers=0)
    wanted = llm.generate(["The"], asked(None, max_tokens=6, ignore_eos=True))[0].token_ids

    def broken(self: Guide, taken: bool) -> Any:
        raise RuntimeError("a fault of ours")

    monkeypatch.setattr(Guide, "_went_on", broken)
    faulty = llm._request(PROMPT, asked(json_grammar(PERSON)))
    other = llm._request("The", asked(None, max_tokens=6, ignore_eos=True))
    for request in (faulty, other):
        llm.engine.add(request)
    events: dict[str, list[Any]] = {faulty.id: [], other.id: []}
    while llm.engine.has_work:
        if (output := llm.engine.step()) is not None:
            for event in output.events:
                events[event.id].append(event)
    assert [(event.finish_reason, event.token_ids) for event in events[faulty.id]] == [("error", ())]
    assert "its log says why" in events[faulty.id][0].error
    assert [token for event in events[other.id] for token in event.token_ids] == wanted
    llm.engine.check()


def test_an_abort_while_the_grammar_is_made(make_llm: Callable[..., LLM]) -> None:
    llm = make_llm()
    request = llm._request(PROMPT, asked(json_grammar(PERSON)))
    llm.engine.add(request)
    llm.engine.abort([request.id])
    while llm.engine.has_work:
        output = llm.engine.step()
        assert output is None or not output.events
    llm.engine.check()


@pytest.mark.parametrize("overlap", [False, True])
def test_the_gpus_runner_gives_the_same_tokens(
    tiny_model: Callable[[str], tuple[Path, Any]], bundled_model: Path, triton_device: Any, overlap: bool
) -> None:
    """Over Triton's kernels, in the interpreter where there is no GPU. The model knows the first 199 tokens only."""
    options = {**OPTIONS, "max_num_seqs": 4, "max_num_batched_tokens": 32, "num_gpu_blocks_override": 40}
    requests = [
        ([5, 9, 30], asked(Grammar("regex", "[a-z]{3,5}#QXQZQJ"), max_tokens=30, temperature=0.0)),
        ([5, 9, 30, 31], asked(Grammar("regex", "[a-c]{2,4}x"), max_tokens=9, temperature=0.7)),
        ([7, 8], asked(None, max_tokens=7, temperature=0.0, ignore_eos=True)),
        ([7, 8, 9], asked(Grammar("regex", "[a-z]{2,9}"), max_tokens=6, temperature=1.0, top_k=7, logprobs=1)),
    ]
    found: list[list[Completion]] = []
    for runner in ({}, {"gpu_kernels": "triton", "device": triton_device.type, "async_scheduling": overlap}):
        llm = LLM(str(tiny_model("llama-gqa")[0]), tokenizer=str(bundled_model), **{**options, **runner})
        found.append(llm.generate([prompt for prompt, _ in requests], [sampling for _, sampling in requests]))
    assert [c.token_ids for c in found[0]] == [c.token_ids for c in found[1]]
    assert re.fullmatch("[a-z]{3,5}#QXQZQJ", found[0][0].text)
