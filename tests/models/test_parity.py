"""Every served architecture against transformers on small random models, however the work is cut into steps.

The second half breaks the runner on purpose: a comparison that does not notice swapped blocks, missing rotation or a position
that is off by one would prove nothing.
"""

import random
from typing import Any

import pytest
import torch

CASES = (
    "gpt2", "gpt2-untied-inner", "llama-gqa", "llama-mha-tied", "llama-mqa-biases", "llama-head-dim-theta", "llama3-scaling",
    "llama-linear", "llama-yarn", "llama-gelu", "mistral-window", "mistral-full", "qwen2", "qwen2-window", "qwen3",
    "qwen3-mha-tied-bias", "qwen3-window",
)  # fmt: skip
RELATIVE = 1e-4
NUM_NEW = 12


def prompts(count: int = 6, longest: int = 90) -> list[list[int]]:
    """Random prompts of mixed lengths, one token and block boundaries among them."""
    draw = random.Random(5)
    lengths = [1, 16, 17, longest, *(draw.randint(2, longest) for _ in range(count - 4))]
    return [[draw.randrange(3, 199) for _ in range(n)] for n in lengths]


def reference_logits(model: Any, tokens: list[int], num_new: int) -> torch.Tensor:
    """Transformers' logits for each of the last ``num_new`` tokens of a text: [num_new, vocab]."""
    with torch.inference_mode():
        return model(torch.tensor([tokens[:-1]])).logits[0, -num_new:]


def worst(model: Any, seqs: list[Any]) -> float:
    """The largest difference of any logit to transformers', relative to the row's largest logit."""
    found = 0.0
    for seq in seqs:
        expected = reference_logits(model, seq.tokens, len(seq.logits))
        ours = torch.stack(seq.logits)
        found = max(found, float(((ours - expected).abs().amax(-1) / expected.abs().amax(-1)).max()))
    return found


def test_the_list_of_cases_is_whole(tiny_models: Any) -> None:
    assert set(CASES) == set(tiny_models.CASES)


@pytest.mark.parametrize(
    ("kernels", "invariant"), [("native", False), ("torch", False), ("torch", True)], ids=["native", "torch", "torch-invariant"]
)
@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers(case: str, kernels: str, invariant: bool, tiny_model: Any, make_driver: Any) -> None:
    folder, model = tiny_model(case)
    driver = make_driver(shuffle=3, model=str(folder), batch_invariant=invariant, cpu_kernels=kernels)
    whole = driver.generate(prompts(), NUM_NEW)
    chunked = driver.generate(prompts(), NUM_NEW, chunk=16)
    alone = driver.generate(prompts()[:3], NUM_NEW, together=False)
    assert worst(model, whole + chunked + alone) < RELATIVE


@pytest.mark.parametrize("case", CASES)
def test_text_varies(case: str, tiny_model: Any, make_driver: Any) -> None:
    """A model that says one token for ever would hide most mistakes."""
    folder, _ = tiny_model(case)
    seq = make_driver(model=str(folder)).generate([prompts()[3]], 64)[0]
    assert len(set(seq.tokens[-64:])) >= 16


@pytest.mark.parametrize("kernels", ["native", "torch"])
@pytest.mark.parametrize(
    ("case", "dtype"),
    [*((case, "float32") for case in ("gpt2", "llama-gqa", "mistral-window", "qwen3")), ("llama-gqa", "bfloat16"),
     ("gpt2", "float16"), ("qwen3", "bfloat16")],
)  # fmt: skip
def test_invariant_logits_are_bitwise_equal(
    case: str, dtype: str, kernels: str, tiny_model: Any, make_driver: Any
) -> None:
    folder, _ = tiny_model(case)
    options = {"model": str(folder), "dtype": dtype, "batch_invariant": True, "cpu_kernels": kernels}
    block_size = 32 if kernels == "native" else 5  # native attention takes multiples of a vector
    texts = prompts(7)
    base = make_driver(**options).generate(texts, NUM_NEW, together=False)
    driver = make_driver(shuffle=9, **options)
    ways = {
        "batched": driver.generate(texts, NUM_NEW),
        "chunks of 16": driver.generate(texts, NUM_NEW, chunk=16),
        "chunks of 7": driver.generate(texts[::-1], NUM_NEW, chunk=7)[::-1],
        "another block size": make_driver(
            shuffle=1, block_size=block_size, num_gpu_blocks_override=600, **options
        ).generate(texts, NUM_NEW),
    }
    for name, seqs in ways.items():
        for a, b in zip(base, seqs, strict=True):
            assert a.tokens == b.tokens, name
            assert torch.equal(torch.stack(a.logits), torch.stack(b.logits)), name


@pytest.mark.parametrize("kernels", ["native", "torch"])
@pytest.mark.parametrize("num_threads", [2, 3])
def test_threads_do_not_break_invariance(num_threads: int, kernels: str, tiny_model: Any, make_driver: Any) -> None:
    folder, _ = tiny_model("llama-gqa")
    driver = make_driver(model=str(folder), batch_invariant=True, num_threads=num_threads, cpu_kernels=kernels)
    alone = driver.generate(prompts(), 3, together=False)
    batched = driver.generate(prompts(), 3, chunk=16)
    torch.set_num_threads(1)
    for a, b in zip(alone, batched, strict=True):
        assert torch.equal(torch.stack(a.logits), torch.stack(b.logits))


@pytest.mark.parametrize("kernels", ["native", "torch"])
def test_invariant_logits_do_not_depend_on_the_past(kernels: str, tiny_model: Any, make_driver: Any) -> None:
    """Cached prefixes, preemption with recomputation, and steps that mix everything give the same bits."""
    folder, _ = tiny_model("llama-gqa")
    text = prompts()[3]
    driver = make_driver(shuffle=2, model=str(folder), batch_invariant=True, cpu_kernels=kernels)
    base = driver.open(text)
    driver.finish([base], NUM_NEW)
    expected = torch.stack(base.logits)
    for shared in (1, 3, 5):  # the blocks of the first sequence serve as a cached prefix of the next
        cached = driver.open(text, shared=base.blocks[:shared], computed=shared * 16)
        driver.finish([cached], NUM_NEW)
        assert cached.tokens == base.tokens and torch.equal(torch.stack(cached.logits), expected)
        driver.close(cached, keep_blocks=True)
    for generated in (1, 5, 11):  # put out after some tokens and computed again
        again = driver.open(base.tokens[: len(text) + generated], num_prompt=len(text))
        other = driver.open(prompts()[4])
        driver.step([(other, 20), (again, 33)])
        driver.step([(again, len(again.tokens) - 33), (other, 1)])
        driver.finish([again], NUM_NEW - generated)
        assert again.tokens == base.tokens and torch.equal(torch.stack(again.logits), expected[generated:])
        driver.close(again)
        driver.close(other)


def test_plain_results_hardly_depend_on_the_batch(tiny_model: Any, make_driver: Any) -> None:
    folder, _ = tiny_model("qwen2")
    alone = make_driver(model=str(folder)).generate(prompts(), NUM_NEW, together=False)
    batched = make_driver(shuffle=4, model=str(folder)).generate(prompts(), NUM_NEW, chunk=16)
    for a, b in zip(alone, batched, strict=True):
        assert a.tokens == b.tokens
        assert torch.allclose(torch.stack(a.logits), torch.stack(b.logits), rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------------------------------------- broken on purpose


BROKEN = 1e-2  # a mistake moves logits by far more than rounding


def swap_with_last_block(driver: Any, seq: Any, other: Any) -> None:
    """The block being filled against a full one. (Two full blocks may be swapped unnoticed: K carries its own position.)"""
    table = driver.runner.rows.block_tables[0][seq.row]
    table[[1, 5]] = table[[5, 1]]


def swap_with_another_sequence(driver: Any, seq: Any, other: Any) -> None:
    tables = driver.runner.rows.block_tables[0]
    tables[seq.row, 2], tables[other.row, 2] = tables[other.row, 2], tables[seq.row, 2]


def no_rotation(driver: Any, seq: Any, other: Any) -> None:
    driver.runner.decoder.rope.cos.fill_(1.0)
    driver.runner.decoder.rope.sin.fill_(0.0)


def next_position(driver: Any, seq: Any, other: Any) -> None:
    """Every token from now on believes that it stands one place further on than it does."""
    decoder = driver.runner.decoder
    tables = [decoder.rope.cos, decoder.rope.sin] if decoder.rope is not None else [decoder.positions.weight]
    for table in tables:
        table.copy_(table.roll(-1, 0))


def one_token_fewer(driver: Any, seq: Any, other: Any) -> None:
    """The runner's count is one too low: the last prompt token is computed again instead of the new one."""
    driver.runner.rows.computed[seq.row] -= 1
    driver.runner.rows.known[seq.row] -= 1


def nothing(driver: Any, seq: Any, other: Any) -> None:
    """The control: without a mistake the comparison holds."""


MISTAKES = (nothing, swap_with_last_block, swap_with_another_sequence, no_rotation, next_position, one_token_fewer)


@pytest.mark.parametrize("case", ["gpt2", "llama-gqa", "llama3-scaling", "qwen3"])
@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_noticed(case: str, mistake: Any, tiny_model: Any, make_driver: Any) -> None:
    if mistake is no_rotation and case == "gpt2":
        pytest.skip("GPT-2 does not rotate")
    folder, model = tiny_model(case)
    driver = make_driver(model=str(folder))
    seq, other = driver.open(prompts()[3]), driver.open(prompts()[3][::-1])
    driver.step([(seq, 90), (other, 90)])
    assert worst(model, [seq, other]) < RELATIVE
    with torch.inference_mode():
        mistake(driver, seq, other)
    driver.step([(seq, 1)])
    assert (worst(model, [seq]) < RELATIVE) == (mistake is nothing)
    assert mistake is nothing or worst(model, [seq]) > BROKEN


def test_swapped_blocks_of_a_prompt_are_noticed(tiny_model: Any, make_driver: Any) -> None:
    """Blocks swapped between two chunks: the second chunk is written elsewhere than the first believed."""
    folder, model = tiny_model("llama-gqa")
    driver = make_driver(model=str(folder))
    seq = driver.open(prompts()[3])
    driver.step([(seq, 24)])
    table = driver.runner.rows.block_tables[0][seq.row]
    table[[0, 1]] = table[[1, 0]]
    driver.step([(seq, 66)])
    assert worst(model, [seq]) > BROKEN
