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
