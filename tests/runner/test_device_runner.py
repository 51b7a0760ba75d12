"""The runner that stays ahead of its device, over Triton's kernels: the same tokens as the host's runner."""

import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from minivllm.errors import InvalidOption
from minivllm.llm import LLM
from minivllm.runner.seating import Seater
from minivllm.scheduler.sharing import Sharing
from minivllm.types import SamplingParams

pytest.importorskip("triton")
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")  # the interpreter computes with -inf and NaN as asked

OPTIONS: dict[str, Any] = {
    "dtype": "float32", "num_threads": 1, "max_num_seqs": 5, "max_num_batched_tokens": 24, "num_gpu_blocks_override": 40,
}  # fmt: skip


@pytest.fixture
def make_llm(tiny_model: Callable[[str], tuple[Path, Any]], bundled_model: Path) -> Callable[..., LLM]:
    """``make_llm(case, **options)``; token ids in, token ids out, so that any tokenizer does."""

    def make(case: str, **options: Any) -> LLM:
        return LLM(str(tiny_model(case)[0]), tokenizer=str(bundled_model), **{**OPTIONS, **options})

    return make


@pytest.fixture
def triton_options(triton_device: Any) -> dict[str, Any]:
    return {"gpu_kernels": "triton", "device": triton_device.type}


def requests(vocab_size: int) -> tuple[list[list[int]], list[SamplingParams]]:
    """More sequences than rows, prompts longer than a step, shared beginnings, and every way to sample."""
    chance = random.Random(4)
    shared = [chance.randrange(vocab_size) for _ in range(19)]
    prompts = [shared[: chance.randrange(20)] + [chance.randrange(vocab_size) for _ in range(1 + 5 * i)] for i in range(8)]
    asked: list[dict[str, Any]] = [
        {}, {"temperature": 0.7}, {"temperature": 1.0, "top_k": 5}, {"temperature": 1.2, "top_p": 0.8, "min_p": 0.02}, {},
        {"temperature": 0.0, "frequency_penalty": 0.6, "bad_word_ids": ((7,), (3, 4))},
        {"temperature": 0.9, "repetition_penalty": 1.3, "allowed_token_ids": tuple(range(20))},
        {"min_tokens": 3, "logit_bias": ((8, 2.5), (9, -100.0))},
    ]  # fmt: skip
    return prompts, [
        SamplingParams(**{"temperature": 0.0, "max_tokens": 3 + i // 2, "seed": i, "ignore_eos": True, **more})
        for i, more in enumerate(asked)
    ]


@pytest.mark.parametrize(("case", "overlap"), [("llama-gqa", False), ("qwen3", True), ("gpt2", True)])
def test_tokens_are_those_of_the_host_runner(
    make_llm: Callable[..., LLM], triton_options: dict[str, Any], case: str, overlap: bool
) -> None:
    plain = make_llm(case, device="cpu")
    prompts, sampling = requests(plain.info.vocab_size)
    expected = [c.token_ids for c in plain.generate(prompts, sampling)]
    llm = make_llm(case, async_scheduling=overlap, **triton_options)
    assert any("triton kernels" in note and "triton backend" in note for note in llm.info.notes)
    assert [c.token_ids for c in llm.generate(prompts, sampling)] == expected
    few = slice(5, 2, -1)
    assert [c.token_ids for c in llm.generate(prompts[few], sampling[few])] == expected[few]  # from the prefix cache
    llm.engine.check()


def test_preempted_sequences_go_on(make_llm: Callable[..., LLM], triton_options: dict[str, Any]) -> None:
    plain, llm = (make_llm("llama-gqa", num_gpu_blocks_override=6, **more) for more in ({"device": "cpu"}, triton_options))
    prompts = [[7 * i + j for j in range(14)] for i in range(4)]
    sampling = SamplingParams(temperature=0.0, max_tokens=14, ignore_eos=True)
    expected, found = ([c.token_ids for c in m.generate(prompts, sampling)] for m in (plain, llm))
    assert found == expected


def test_running_out_of_memory_costs_no_token(
    make_llm: Callable[..., LLM], triton_options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps of more than 16 tokens do not fit; what is running goes on in smaller ones, with the same text."""
    from minivllm.runner.device_runner import DeviceRunner

    prompts = [[3 * i + j for j in range(20)] for i in range(3)]
    sampling = SamplingParams(temperature=0.0, max_tokens=3, ignore_eos=True)
    expected = [c.token_ids for c in make_llm("llama-gqa", device="cpu").generate(prompts, sampling)]
    llm, hidden, tried = make_llm("llama-gqa", **triton_options, enforce_eager=True), DeviceRunner.hidden, []

    def too_large(self: DeviceRunner, num_tokens: int, decode: bool, host: Any, *, shared: bool = False) -> torch.Tensor:
        tried.append(num_tokens)
        if num_tokens > 16:
            raise torch.OutOfMemoryError("more than there is")
        return hidden(self, num_tokens, decode, host, shared=shared)

    monkeypatch.setattr(DeviceRunner, "hidden", too_large)
    assert [c.token_ids for c in llm.generate(prompts, sampling)] == expected
    assert max(tried) > 16
    llm.engine.check()


def test_long_prompts_that_do_not_fit_on_a_page(
    make_llm: Callable[..., LLM], triton_options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = [[3 * i + j for j in range(20)] for i in range(4)]
    sampling = SamplingParams(temperature=0.0, max_tokens=3, ignore_eos=True)
    expected = [c.token_ids for c in make_llm("llama-gqa", device="cpu").generate(prompts, sampling)]
    monkeypatch.setattr("minivllm.runner.stage.MAX_PAGE", 30)
    assert [c.token_ids for c in make_llm("llama-gqa", **triton_options).generate(prompts, sampling)] == expected


def test_common_beginnings_are_read_once(
    make_llm: Callable[..., LLM], triton_options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of two shared beginnings and one of its own: the same tokens, in steps that do look at who begins alike."""
    shared = [[(11 * i + 5 * j) % 190 for j in range(40)] for i in range(2)]
    prompts = [*([*shared[0], 7 + i, 9] for i in range(2)), *([*shared[1], 3 * i] for i in range(2)), [5, 6, 7]]
    more = 12 if triton_options["device"] == "cuda" else 4  # steps enough to be captured, and replayed
    sampling = SamplingParams(temperature=0.0, max_tokens=more, ignore_eos=True)
    few = {"max_num_batched_tokens": 220}
    expected = [c.token_ids for c in make_llm("llama-gqa", device="cpu", **few).generate(prompts, sampling)]
    monkeypatch.setattr("minivllm.scheduler.book.Sharing", partial(Sharing, min_rows=2, min_tokens=32))
    monkeypatch.setattr("minivllm.attention.triton.LEAST_SAVED", 1)
    seat, seated = Seater.seat, []

    def noted(self: Seater, groups: Any, rows: Any) -> Any:
        found = seat(self, groups, rows)
        seated.append(0 if found is None else len(found.items))
        return found

    monkeypatch.setattr(Seater, "seat", noted)
    llm = make_llm("llama-gqa", **few, **triton_options)
    assert [c.token_ids for c in llm.generate(prompts, sampling)] == expected
    assert seated == [2] * (more - 1)


def test_the_interpreter_must_be_asked_for(
    make_llm: Callable[..., LLM], triton_device: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    if triton_device.type == "cuda":
        pytest.skip("there is a GPU")
    monkeypatch.setattr("minivllm.runner.choose._interpreting", lambda: False)
    with pytest.raises(InvalidOption, match="TRITON_INTERPRET=1"):
        make_llm("llama-gqa", device="cpu", gpu_kernels="triton")
