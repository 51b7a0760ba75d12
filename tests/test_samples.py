"""n texts of one prompt: their own random numbers, one prompt in memory."""

from pathlib import Path
from typing import Any

import pytest

from minivllm.errors import InvalidRequest
from minivllm.llm import LLM
from minivllm.types import SamplingParams

PROMPT = "Once upon a time there was a small bear who lived in a wood. " * 4


@pytest.fixture(params=[True, False], ids=["cached", "no cache"])
def llm(bundled_model: Path, request: pytest.FixtureRequest) -> LLM:
    options = {"device": "cpu", "num_threads": 1, "max_num_seqs": 8, "num_gpu_blocks_override": 80}
    return LLM(str(bundled_model), enable_prefix_caching=request.param, **options)


def asked(**more: Any) -> SamplingParams:
    return SamplingParams(**{"temperature": 1.0, "max_tokens": 8, "ignore_eos": True, "seed": 3, **more})


def test_texts_differ_and_come_again(llm: LLM) -> None:
    first = llm.generate([PROMPT, "The"], [asked(n=4), asked(n=2)])
    assert len(first) == 6 and [c.prompt for c in first] == [PROMPT] * 4 + ["The"] * 2
    texts = [tuple(c.token_ids) for c in first]
    assert len(set(texts)) == 6
    assert [tuple(c.token_ids) for c in llm.generate([PROMPT, "The"], [asked(n=4), asked(n=2)])] == texts
    assert tuple(llm.generate([PROMPT], asked())[0].token_ids) == texts[0], "the first of n is what n = 1 gives"
    unseeded = llm.generate([PROMPT], asked(n=4, seed=None))
    assert len({tuple(c.token_ids) for c in unseeded}) == 4


def test_a_prompt_is_held_once(llm: LLM) -> None:
    if not llm.config.cache.enable_prefix_caching:
        pytest.skip("texts that start in one step share through the cache")
    first = llm._request(PROMPT, asked(n=8))
    for i in range(8):
        llm.engine.add(first if i == 0 else llm._another(first, i, 3))
    llm.engine.step()
    kv, running = llm.engine._scheduler._kv, llm.engine._scheduler._book.running
    full = (len(first.prompt_ids) - 1) // kv.block_size  # each computes its prompt's last token, whose logits it draws from
    assert full >= 3 and len(running) == 8
    assert len({kv.leading_blocks(r.uid, full) for r in running}) == 1
    assert kv.counts().referenced == full + 8  # and the begun block of each
    llm.engine.abort([first.id, *(f"local-{i}" for i in range(1, 20))])
    llm.engine.check()


def test_what_makes_no_sense_is_refused() -> None:
    for more in ({"n": 0}, {"n": 129}, {"n": -1}, {"n": 2, "temperature": 0.0}):
        with pytest.raises(InvalidRequest) as caught:
            asked(**more)
        assert caught.value.param == "n"


def test_a_flat_list_of_ids_is_explained(llm: LLM) -> None:
    ids: Any = [5, 6, 7]
    with pytest.raises(InvalidRequest, match="one more list"):
        llm.generate(ids, asked())
