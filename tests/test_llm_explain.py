"""``LLM.generate(explain=True)``: each completion says where its time went."""

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest

from minivllm.llm import LLM
from minivllm.types import SamplingParams


@pytest.fixture(scope="module")
def llm(bundled_model: Path) -> Iterator[LLM]:
    made = LLM(str(bundled_model), device="cpu", num_threads=1, max_num_seqs=2, num_gpu_blocks_override=40)
    yield made
    made.close()


def greedy(max_tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)


def test_nobody_is_told_who_did_not_ask(llm: LLM) -> None:
    assert [c.explanation for c in llm.generate(["Once", "The"], greedy(2))] == [None, None]


def test_each_completion_says_what_it_waited_for(llm: LLM) -> None:
    prompts = ["Once upon a time", "The bear", "A fox"]
    done = llm.generate(prompts, greedy(12), explain=True)
    for completion in done:
        told = completion.explanation
        assert told is not None
        assert [p.name for p in told.phases] == ["tokenize", "queue", "prefill", "decode", "deliver"]
        assert (told.prompt_tokens, told.output_tokens) == (len(completion.prompt_ids), 12)
        assert told.finish_reason == completion.finish_reason == "length"
        assert told.steps == 12 and told.chunks == (len(completion.prompt_ids),)
        covered_s = sum(p.ended_s - p.began_s for p in told.phases)
        assert all(before.ended_s <= after.began_s for before, after in itertools.pairwise(told.phases))
        assert told.unexplained_s == pytest.approx(told.total_s - covered_s, abs=1e-5)
    last = done[2].explanation
    assert last is not None
    (wait,) = [w for w in last.waits if w.reason == "rows"]
    assert len(wait.behind) == 2 and wait.steps == 12
    again = llm.generate(["Once upon a time there was a bear who lived in a wood"] * 2, greedy(2), explain=True)[1].explanation
    assert again is not None and again.preemptions == ()


def test_of_several_texts_each_is_told(llm: LLM) -> None:
    several = SamplingParams(temperature=1, seed=3, n=3, max_tokens=5, ignore_eos=True)
    done = llm.generate(["Once upon a time"], several, explain=True)
    told = [completion.explanation for completion in done]
    assert len({one.id for one in told if one is not None}) == 3
    assert [one.output_tokens for one in told if one is not None] == [5, 5, 5]
    assert done[2].explanation is not None and done[2].explanation.waits[0].reason in ("rows", "engine")


def test_a_stop_string_counts_what_the_text_has(llm: LLM) -> None:
    text = llm.generate(["Once upon a time"], greedy(20))[0].text
    stop = SamplingParams(temperature=0, max_tokens=100, ignore_eos=True, stop=(text[15:20],))
    (done,) = llm.generate(["Once upon a time"], stop, explain=True)
    assert done.explanation is not None
    assert (done.explanation.finish_reason, done.explanation.output_tokens) == ("stop", len(done.token_ids))
