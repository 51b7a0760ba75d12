"""Logprobs: transformers' own in float32, raw whatever the sampling, and the same on every path."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from minivllm.errors import InvalidRequest
from minivllm.llm import LLM, Completion
from minivllm.types import SamplingParams

PROMPTS = [[3, 5, 7, 11, 13], [17, 19], list(range(20, 60))]
OPTIONS: dict[str, Any] = {"dtype": "float32", "num_threads": 1, "max_num_seqs": 4, "num_gpu_blocks_override": 40}


@pytest.fixture
def make_llm(tiny_model: Callable[[str], tuple[Path, Any]], bundled_model: Path) -> Callable[..., tuple[LLM, Any]]:
    """``make_llm(case, **options)`` -> our model and transformers'."""

    def make(case: str, **options: Any) -> tuple[LLM, Any]:
        folder, model = tiny_model(case)
        return LLM(str(folder), tokenizer=str(bundled_model), **{**OPTIONS, "device": "cpu", **options}), model

    return make


def check(model: Any, done: Completion, num_top: int) -> None:
    """Every position against transformers given the same tokens."""
    ids = [*done.prompt_ids, *done.token_ids]
    with torch.inference_mode():
        exact = model(torch.tensor([ids])).logits[0, len(done.prompt_ids) - 1 : -1].double().log_softmax(-1)
    assert len(done.logprobs) == len(done.token_ids)
    for row, token, found in zip(exact, done.token_ids, done.logprobs, strict=True):
        assert found.logprob == pytest.approx(float(row[token]), abs=1e-4)
        assert found.rank == 1 + int((row > row[token] + 1e-4).sum()) or found.rank == 1 + int((row > row[token]).sum())
        assert len(found.top_ids) == len(found.top_logprobs) == num_top
        best = row.sort(descending=True).values[:num_top]
        assert torch.allclose(torch.tensor(found.top_logprobs, dtype=torch.double), best, atol=1e-4)
        assert torch.allclose(row[list(found.top_ids)], best, atol=1e-4)


WAYS: list[dict[str, Any]] = [
    {"temperature": 0.0}, {"temperature": 1.3, "top_k": 5, "seed": 2},
    {"temperature": 0.0, "frequency_penalty": 1.5, "logit_bias": ((9, 5.0),)},
]  # fmt: skip


@pytest.mark.parametrize("case", ["llama-gqa", "gpt2"])
def test_as_transformers_whatever_is_sampled(make_llm: Callable[..., tuple[LLM, Any]], case: str) -> None:
    llm, model = make_llm(case)
    for num_top in (0, 3, 20):
        sampling = [SamplingParams(max_tokens=6, ignore_eos=True, logprobs=num_top, **way) for way in WAYS]
        for done in llm.generate(PROMPTS, sampling):
            check(model, done, num_top)


def test_only_who_asks_is_told(make_llm: Callable[..., tuple[LLM, Any]]) -> None:
    llm, model = make_llm("llama-gqa")
    asked = [SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True, logprobs=n) for n in (None, 2, 5)]
    none, two, five = llm.generate(PROMPTS, asked)
    assert none.logprobs == []
    check(model, two, 2)
    check(model, five, 5)


@pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")
def test_the_runner_of_a_gpu_tells_the_same(make_llm: Callable[..., tuple[LLM, Any]], triton_device: torch.device) -> None:
    llm, model = make_llm("llama-gqa", device=triton_device.type, gpu_kernels="triton", async_scheduling=True)
    ways = zip((2, None, 4), WAYS, strict=True)
    sampling = [SamplingParams(max_tokens=3, ignore_eos=True, logprobs=n, **way) for n, way in ways]
    first, second, third = llm.generate(PROMPTS, sampling)
    check(model, first, 2)
    assert second.logprobs == []
    check(model, third, 4)


def test_more_than_there_are(make_llm: Callable[..., tuple[LLM, Any]]) -> None:
    llm, _ = make_llm("llama-gqa", max_logprobs=3)
    with pytest.raises(InvalidRequest, match="at most 3"):
        llm.generate(PROMPTS, SamplingParams(logprobs=4))
    for count in (-1, 21):
        with pytest.raises(InvalidRequest) as caught:
            SamplingParams(logprobs=count)
        assert caught.value.param == "logprobs"


def check_prompt(model: Any, done: Completion, num_top: int) -> None:
    """Every position of the prompt but the first, against transformers."""
    assert done.prompt_logprobs is not None and len(done.prompt_logprobs) == len(done.prompt_ids)
    assert done.prompt_logprobs[0] is None
    with torch.inference_mode():
        exact = model(torch.tensor([done.prompt_ids])).logits[0, :-1].double().log_softmax(-1)
    for row, token, found in zip(exact, done.prompt_ids[1:], done.prompt_logprobs[1:], strict=True):
        assert found is not None
        assert found.logprob == pytest.approx(float(row[token]), abs=1e-4)
        assert 1 + int((row > row[token] + 1e-4).sum()) <= found.rank <= 1 + int((row > row[token] - 1e-4).sum())
        assert len(found.top_ids) == len(found.top_logprobs) == num_top
        best = row.sort(descending=True).values[:num_top]
        assert torch.allclose(torch.tensor(found.top_logprobs, dtype=torch.double), best, atol=1e-4)
        assert torch.allclose(row[list(found.top_ids)], best, atol=1e-4)


@pytest.mark.parametrize("case", ["llama-gqa", "gpt2", "mistral-window"])
@pytest.mark.parametrize("step_tokens", [2048, 7])
def test_prompts_as_transformers(make_llm: Callable[..., tuple[LLM, Any]], case: str, step_tokens: int) -> None:
    """Whole and in chunks, over one slice of positions, beside rows that ask for nothing, and again when they are cached."""
    llm, model = make_llm(case, max_num_batched_tokens=step_tokens)
    prompts = [*PROMPTS, list(range(100, 180)), [9]]
    asked = [SamplingParams(temperature=0.0, max_tokens=3, ignore_eos=True, prompt_logprobs=n) for n in (2, None, 5, 0, 1)]
    for _ in range(2):
        done = llm.generate(prompts, asked)
        assert done[1].prompt_logprobs is None
        for completion, num_top in zip(done, (2, None, 5, 0, 1), strict=True):
            if num_top is not None:
                check_prompt(model, completion, num_top)
    assert llm.generate(prompts, [SamplingParams(temperature=0.0, max_tokens=1)] * 5)[3].num_cached > 0, "others read the cache"


def test_a_prompt_is_told_once_when_its_row_is_taken_away(make_llm: Callable[..., tuple[LLM, Any]]) -> None:
    """Twelve blocks for four sequences of four each: rows are taken away while prompts in chunks are on their way."""
    llm, model = make_llm("llama-gqa", max_num_batched_tokens=16, num_gpu_blocks_override=12, async_scheduling=True)
    prompts = [list(range(i, i + 34)) for i in (3, 50, 90, 120)]
    asked = SamplingParams(temperature=0.0, max_tokens=25, ignore_eos=True, prompt_logprobs=1, logprobs=1)
    for request in (llm._request(prompt, asked) for prompt in prompts):
        llm.engine.add(request)
    told: dict[str, list[Any]] = {}
    taken = 0
    while llm.engine.has_work:
        message = llm.engine.step()
        for event in message.events if message else ():
            told.setdefault(event.id, []).extend(event.prompt_logprobs)
        taken += len(message.record.preempted) if message and message.record else 0
    assert taken > 0
    for prompt, found in zip(prompts, told.values(), strict=True):
        completion = Completion(None, tuple(prompt))
        completion.prompt_logprobs = [None, *found]
        check_prompt(model, completion, 1)


def test_each_of_n_texts_knows_its_prompt(make_llm: Callable[..., tuple[LLM, Any]]) -> None:
    llm, model = make_llm("llama-gqa")
    done = llm.generate([PROMPTS[2]], SamplingParams(n=3, seed=1, max_tokens=4, ignore_eos=True, prompt_logprobs=2))
    for completion in done:
        check_prompt(model, completion, 2)


@pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")
def test_the_runner_of_a_gpu_tells_prompts_too(make_llm: Callable[..., tuple[LLM, Any]], triton_device: torch.device) -> None:
    llm, model = make_llm(
        "llama-gqa", device=triton_device.type, gpu_kernels="triton", async_scheduling=True, max_num_batched_tokens=24
    )
    graphs: Any = llm.engine._executor.runner.graphs  # type: ignore[attr-defined]
    parts: list[str] = []
    plain = graphs.run
    graphs.run = lambda part, size: parts.append(part) or plain(part, size)
    asked = [SamplingParams(temperature=0.0, max_tokens=2, ignore_eos=True, prompt_logprobs=n) for n in (1, None, 4)]
    first, second, third = llm.generate(PROMPTS, asked)
    assert "decode" in parts and "mixed" not in parts, "a captured piece would keep its hidden states to itself"
    check_prompt(model, first, 1)
    assert second.prompt_logprobs is None
    check_prompt(model, third, 4)
