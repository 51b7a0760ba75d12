"""Parity on a GPU: what the CPU's parity tests show, with Triton's kernels, captured graphs and steps planned ahead.

Requests are computed alone, in one batch, in chunks, with preemptions and from the prefix cache (``parity_lab.five_ways``), in
every manner of launching: kernel by kernel or by graphs, each step after the last one's tokens (depth 0) or before (depth 1).

* float32 (IEEE): tokens equal transformers' in float64, but for near-ties; see ``test_transformers.py``.
* bfloat16: the same rule with the bound that 16-bit rounding asks for. A mistake made on purpose shows that it still notices.
* Batch-invariant: logits are bitwise equal however and in whatever manner they were computed.
* The tests' sampler is told every row of logits, so the head of the model runs without a graph there. Tests with the engine's
  own sampler cover captured heads.
"""

import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from parity_lab import Lab, Run, five_ways, make_prompts
from tiny_models import SMALL
from transformers import AutoModelForCausalLM

from minivllm.engine.engine import Engine
from minivllm.llm import LLM
from minivllm.types import SamplingParams

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.environ.get("MINIVLLM_TEST_GPU") != "1" or not torch.cuda.is_available(), reason="there is no GPU"),
]

DEVICE = "cuda"
ON_DEVICE: Mapping[str, Any] = {"device": DEVICE, "gpu_kernels": "triton", "max_num_seqs": 16, "max_num_batched_tokens": 128}
CASES = ("gpt2", "llama-gqa", "llama-yarn", "mistral-window", "qwen2", "qwen3")
NUM_PROMPTS, NUM_NEW = 10, 24

EAGER, EAGER_AHEAD, GRAPHS, GRAPHS_AHEAD = (
    {"enforce_eager": eager, "async_scheduling": ahead} for eager in (True, False) for ahead in (False, True)
)
MANNERS = {"eager": EAGER, "eager, ahead": EAGER_AHEAD, "graphs": GRAPHS, "graphs, ahead": GRAPHS_AHEAD}
IN_FULL = ("eager", "graphs, ahead")  # all five ways; the other two manners: in one batch, and from the cache


# --------------------------------------------------------------------------------------------- engines, and their graphs


class Watched:
    """The graphs of a new engine. All of them are captured at once, and what runs is counted by part."""

    def __init__(self, engine: Engine) -> None:
        while engine.prepare_more():
            pass
        self.runner: Any = engine._executor.runner  # type: ignore[attr-defined]
        self.replayed: Counter[str] = Counter()
        self.missed: Counter[str] = Counter()
        self._run = self.runner.graphs.run
        self.runner.graphs.run = self._counted

    def _counted(self, part: str, size: int) -> bool:
        found: bool = self._run(part, size)
        (self.replayed if found else self.missed)[part] += 1
        return found

    def check(self, manner: Mapping[str, bool], *parts: str) -> None:
        """Every step was replayed, and these parts were among them; or nothing was, where graphs are off."""
        graphs = self.runner.graphs
        if manner["enforce_eager"]:
            assert graphs.num_captured == graphs.num_pieces == 0 and not self.replayed
            return
        due = sum(len(sizes) for sizes in graphs._when_idle.values())
        assert graphs.num_captured == due > 0, "some pieces could not be captured"
        assert set(self.replayed) == set(parts) and not self.missed


class DeviceLab(Lab):
    """A lab on the device whose graphs are ready."""

    def __init__(self, folder: Path, **options: Any) -> None:
        super().__init__(folder, **{**ON_DEVICE, **options})
        self.watched = Watched(self.engine)


def ways_on_device(folder: Path, prompts: list[list[int]], manners: Sequence[str] = IN_FULL, **options: Any) -> dict[str, Run]:
    """The same requests in every manner; in those of ``manners`` in all five ways."""
    runs: dict[str, Run] = {}
    for name, manner in MANNERS.items():
        labs: list[DeviceLab] = []

        def make(folder: Path, labs: list[DeviceLab] = labs, **more: Any) -> Lab:
            labs.append(DeviceLab(folder, **more))
            return labs[-1]

        asked = {"num_new": NUM_NEW, **manner, **options}
        if name in manners:
            found = five_ways(folder, prompts, make=make, **asked)
        else:
            lab = make(folder, **asked)
            found = {"batch": lab.run(prompts), "cached": lab.run(prompts)}
            assert found["cached"].total("prefix_hits") > 0
        for lab in labs:
            lab.watched.check(manner, "decode", "mixed")
        runs |= {f"{name}, {way}": run for way, run in found.items()}
    return runs


# ----------------------------------------------------------------------------------------------------------- the gap rule


GAP = 5e-4  # float32; as in ``test_transformers.py``

# bfloat16. Weights are the reference's to the bit, so what differs is the rounding of activations: about ten roundings a layer,
# each of 2**-9 at most, of numbers that then go through three layers with weights twice as large as usual. In float32 these
# models make errors of 2**-24 into errors of 15 to 130 times that, in units of the logits' standard deviation; in bfloat16 the
# same factors give an error of 4 to 10 times 2**-8 at most positions, and 60 at the worst. Two logits are compared, each with
# its error: 128 times 2**-8, which is half a standard deviation. Mistakes cost several whole ones.
ROUNDING = 2**-8
FAR = 128 * ROUNDING
# Nearly all tokens are much closer, so their mean is held too: 0.1 to 1 times 2**-8 by rounding, 20 and more by a mistake.
MEAN = 2 * ROUNDING


@dataclass
class Verdict:
    """Tokens that are not the reference's best. A text's name, a position, and how far behind the best it is."""

    num_tokens: int = 0
    near: list[tuple[str, int, float]] = field(default_factory=list)
    wrong: list[tuple[str, int, float]] = field(default_factory=list)  # more than is allowed

    @property
    def mean(self) -> float:
        """How far behind the best a token is on average."""
        return sum(gap for _, _, gap in self.near + self.wrong) / self.num_tokens


class Reference:
    """A transformers model that computes in float64, with weights rounded as the engine's are."""

    def __init__(self, folder: Path, dtype: str) -> None:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        for p in model.parameters():
            p.data = p.data.to(getattr(torch, dtype))
        self.model, self.rounds = model.double().eval().to(DEVICE), dtype != "float32"
        self.known: dict[tuple[int, ...], list[float]] = {}

    def behind(self, prompt: list[int], tokens: list[int]) -> list[float]:
        """How far each token is behind the best one after the same text: in logits, or for 16-bit models in their standard
        deviations."""
        key = (*prompt, *tokens)
        if key not in self.known:
            ids = torch.tensor([key], device=DEVICE)
            with torch.inference_mode():
                logits = self.model(ids).logits[0, len(prompt) - 1 : -1].double()  # [new tokens, vocab]
            gaps = logits.amax(-1) - logits.gather(1, ids[0, len(prompt) :, None])[:, 0]
            self.known[key] = (gaps / logits.std(-1) if self.rounds else gaps).tolist()
        return self.known[key]

    def judge(self, texts: Mapping[str, Sequence[list[int]]], prompts: Sequence[list[int]]) -> Verdict:
        """Look at every token of every way."""
        verdict, allowed = Verdict(), FAR if self.rounds else GAP
        for way, tokens in texts.items():
            for i, (prompt, ours) in enumerate(zip(prompts, tokens, strict=True)):
                verdict.num_tokens += len(ours)
                for position, gap in enumerate(self.behind(prompt, ours)):
                    if gap > 0:
                        (verdict.near if gap < allowed else verdict.wrong).append((f"{way} {i}", position, gap))
        return verdict

    def check(self, texts: Mapping[str, Sequence[list[int]]], prompts: Sequence[list[int]]) -> None:
        """The gap rule, and that it was needed for few tokens."""
        verdict = self.judge(texts, prompts)
        print(f"near-ties: {verdict.near}")
        assert not verdict.wrong
        if self.rounds:
            assert len(verdict.near) <= verdict.num_tokens // 8 and verdict.mean < MEAN
        else:
            assert len(verdict.near) <= len(texts) * len(prompts) // 8


def prompts_of(vocab_size: int = SMALL["vocab_size"]) -> list[list[int]]:
    return make_prompts(vocab_size)[:NUM_PROMPTS]


def check_every_way(folder: Path, prompts: list[list[int]], dtype: str) -> None:
    """Compare every token of every way in every manner with the reference."""
    runs = ways_on_device(folder, prompts, dtype=dtype, batch_invariant=False)
    Reference(folder, dtype).check({way: run.tokens for way, run in runs.items()}, prompts)


@pytest.mark.parametrize("case_folder", CASES, indirect=True)
def test_random_models_equal_transformers_in_float32(case_folder: Path) -> None:
    check_every_way(case_folder, prompts_of(), "float32")


@pytest.mark.parametrize("case_folder", ["gpt2", "llama-yarn", "mistral-window", "qwen3"], indirect=True)
def test_random_models_are_near_transformers_in_bfloat16(case_folder: Path) -> None:
    check_every_way(case_folder, prompts_of(), "bfloat16")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_bundled_model_equals_transformers(bundled_model: Path, dtype: str) -> None:
    check_every_way(bundled_model, prompts_of(4000), dtype)


@pytest.mark.parametrize("case_folder", ["gpt2", "llama-gqa", "qwen3"], indirect=True)
def test_the_rule_for_bfloat16_notices_a_mistake(case_folder: Path) -> None:
    """From the second run on every position is one too high, but not in the blocks that the first run left in the cache."""
    prompts, reference = prompts_of(), Reference(case_folder, "bfloat16")
    lab = DeviceLab(case_folder, num_new=NUM_NEW, dtype="bfloat16", **GRAPHS_AHEAD)
    reference.check({"right": lab.run(prompts).tokens}, prompts)
    decoder = lab.watched.runner.decoder
    with torch.inference_mode():
        for table in [decoder.rope.cos, decoder.rope.sin] if decoder.rope is not None else [decoder.positions.weight]:
            table.copy_(table.roll(-1, 0))  # in place: graphs read it where it stands
    verdict = reference.judge({"wrong": lab.run(prompts).tokens}, prompts)
    assert len(verdict.wrong) > verdict.num_tokens // 20 and verdict.mean > 5 * MEAN


# ------------------------------------------------------------------------------------------------------------------ bitwise


def check_bitwise(runs: Mapping[str, Run], num_new: int = NUM_NEW) -> None:
    """Every way and manner gave the bits of the first: kernel by kernel, alone."""
    first = runs["eager, alone"]
    assert sorted(len(set(t)) for t in first.tokens)[len(first.tokens) // 2] >= num_new // 3, "the text hardly varies"
    assert len(first.logits) == len(first.tokens) * num_new
    expected = torch.stack(list(first.logits.values()))
    for way, run in runs.items():
        assert run.tokens == first.tokens, way
        found = torch.stack([run.logits[key] for key in first.logits])
        different = (found != expected).any(-1).tolist()
        assert not any(different), f"{way}: {[key for key, is_so in zip(first.logits, different, strict=True) if is_so]}"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case_folder", ["gpt2", "mistral-window", "qwen3"], indirect=True)
def test_logits_are_bitwise_equal_in_batch_invariant_mode(case_folder: Path, dtype: str) -> None:
    check_bitwise(ways_on_device(case_folder, prompts_of(), dtype=dtype, batch_invariant=True))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_bundled_model_is_bitwise_equal_in_every_way_and_manner(bundled_model: Path, dtype: str) -> None:
    check_bitwise(ways_on_device(bundled_model, prompts_of(4000), tuple(MANNERS), dtype=dtype, batch_invariant=True))


# ------------------------------------------------------------------------------------------------- the engine's own sampler


MakeTokens = Callable[[Mapping[str, bool], bool, str], list[list[int]]]


@pytest.fixture
def make_tokens(tiny_model: Callable[[str], tuple[Path, Any]], bundled_model: Path) -> MakeTokens:
    """``make_tokens(manner, batch_invariant, dtype)``: even prompts greedy, odd ones drawn, by ``LLM``."""

    def make(manner: Mapping[str, bool], batch_invariant: bool, dtype: str) -> list[list[int]]:
        options = {"dtype": dtype, "max_model_len": 192, "batch_invariant": batch_invariant, **ON_DEVICE, **manner}
        llm = LLM(str(tiny_model("llama-gqa")[0]), tokenizer=str(bundled_model), **options)
        watched = Watched(llm.engine)
        asked = [
            SamplingParams(temperature=0.8 * (i % 2), max_tokens=NUM_NEW, seed=i, ignore_eos=True) for i in range(NUM_PROMPTS)
        ]
        tokens = [c.token_ids for c in llm.generate(prompts_of(), asked)]
        watched.check(manner, "decode", "mixed", "head")
        return tokens

    return make


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_captured_heads_choose_transformers_tokens(
    tiny_model: Callable[[str], tuple[Path, Any]], make_tokens: MakeTokens, dtype: str
) -> None:
    greedy = {name: make_tokens(manner, False, dtype)[::2] for name, manner in MANNERS.items()}
    Reference(tiny_model("llama-gqa")[0], dtype).check(greedy, prompts_of()[::2])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_captured_heads_draw_the_tokens_of_uncaptured_ones(make_tokens: MakeTokens, dtype: str) -> None:
    drawn = {name: make_tokens(manner, True, dtype) for name, manner in MANNERS.items()}
    assert all(tokens == drawn["eager"] for tokens in drawn.values())


# --------------------------------------------------------------------------------------------------------------------- int8


def distances(seqs: Sequence[Any], cpu: Any) -> torch.Tensor:
    """For each sampled token the largest difference of a logit to ``cpu``'s after the same text, relative to its largest."""
    found = []
    for seq in seqs:
        texts = [seq.tokens[: len(seq.tokens) - n] for n in range(len(seq.logits), 0, -1)]
        expected = torch.stack([s.logits[0] for s in cpu.generate(texts, 1, together=False)])
        ours = torch.stack(seq.logits).cpu()
        found.append((ours - expected).abs().amax(-1) / expected.abs().amax(-1))
    return torch.cat(found)


@pytest.mark.parametrize("case", ["gpt2", "qwen3"])
def test_int8_is_near_its_result_on_a_cpu(case: str, tiny_model: Callable[[str], tuple[Path, Any]], make_driver: Any) -> None:
    """Sums of integers are exact. What differs is float32 in between, which now and then rounds an activation to its neighbour;
    so nearly all logits are much closer to the CPU's in int8 than these are to those of unrounded weights."""
    folder = str(tiny_model(case)[0])
    device = make_driver(model=folder, quantization="int8", device=DEVICE, gpu_kernels="triton")
    seqs = device.generate(prompts_of()[:4], 6)
    on_cpu = {"model": folder, "device": "cpu", "cpu_kernels": "torch"}
    same = distances(seqs, make_driver(quantization="int8", **on_cpu))
    other = distances(seqs, make_driver(**on_cpu))
    assert same.median() < 0.1 * other.median() and same.max() < other.max()
