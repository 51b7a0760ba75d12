"""The runner's own promises: order of a plan, late reading, bad rows, foreign memory, and refusing what it cannot do."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from minivllm.attention.base import AttnNeed
from minivllm.attention.select import select_backend
from minivllm.kernels.ops import invariant_ops, reference_ops
from minivllm.layers.rope import RopeSpec
from minivllm.layers.setup import Setup
from minivllm.models.decoder import Decoder
from minivllm.models.spec import ModelSpec
from minivllm.parallel.comm import SoloComm
from minivllm.quant.base import linear_method
from minivllm.runner.kv_cache import allocate
from minivllm.runner.rows import PlanError, Rows, TokenTable
from minivllm.runner.runner import Loaded, Runner
from minivllm.types import WANT_POOL, WANT_SAMPLE, CopyBlock, NewRow, RowWork, SamplingParams, StepPlan

PROMPT = [11, 60, 3, 150, 77, 8, 9, 121, 33, 90, 4, 4, 18, 199 - 1, 54, 67, 70, 12, 31]
NUM_NEW = 10


@pytest.fixture
def folder(tiny_model: Any) -> str:
    return str(tiny_model("llama-gqa")[0])


@pytest.fixture
def expected(folder: str, make_driver: Any) -> list[int]:
    return make_driver(model=folder).generate([PROMPT], NUM_NEW)[0].tokens


def test_next_step_is_launched_before_the_tokens_are_read(folder: str, make_driver: Any, expected: list[int]) -> None:
    """Depth 1: the token is on the device already when the next step asks for it."""
    driver = make_driver(model=folder)
    seq = driver.open(PROMPT)
    pending = driver.runner.launch(driver.plan([(seq, len(PROMPT))]))
    pending.sample()
    found = []
    for _ in range(NUM_NEW - 1):
        seq.tokens.append(-1)  # known to exist, value not read yet
        later = driver.runner.launch(driver.plan([(seq, 1)]))
        later.sample()
        found += pending.result().tokens[0]
        pending = later
    found += pending.result().tokens[0]
    assert PROMPT + found == expected


def test_surplus_token_at_the_end_of_the_context(folder: str, make_driver: Any) -> None:
    """At depth 1 a sequence that has filled the context is in one more plan before anybody knows."""
    driver = make_driver(model=folder, max_model_len=32)
    seq = driver.open(PROMPT)
    driver.finish([seq], 32 - len(PROMPT))
    assert len(seq.tokens) == 32
    assert len(driver.step([(seq, 1)]).tokens[0]) == 1


def test_results_match_work_by_position(folder: str, make_driver: Any) -> None:
    driver = make_driver(model=folder)
    a, b, c = driver.open(PROMPT), driver.open(PROMPT[:5]), driver.open(PROMPT[::-1])
    result = driver.step([(a, 7), (b, 5), (c, 19)])
    assert [len(t) for t in result.tokens] == [0, 1, 1]
    assert result.step == 1 and result.bad_rows == ()
    assert result.times.finished_s >= result.times.launched_s
    assert driver.runner.sampler.positions == {b.row: 5, c.row: 19}


def test_empty_plan_only_frees(folder: str, make_driver: Any) -> None:
    driver = make_driver(model=folder)
    seq = driver.open(PROMPT)
    driver.step([(seq, 19)])
    assert driver.runner.sampler.rows == {seq.row}
    driver.close(seq)
    result = driver.step([])
    assert result.tokens == () and driver.runner.sampler.rows == set()


def test_row_freed_and_taken_in_one_plan(folder: str, make_driver: Any, expected: list[int]) -> None:
    driver = make_driver(model=folder, max_num_seqs=1)
    for _ in range(3):
        seq = driver.open(PROMPT)
        driver.finish([seq], NUM_NEW)
        assert seq.tokens == expected
        driver.close(seq)


def test_copies_come_before_work(folder: str, make_driver: Any, expected: list[int]) -> None:
    """A fork: full blocks are shared, the half-filled tail is copied, and both go on alike."""
    driver = make_driver(model=folder)
    seq = driver.open(PROMPT)
    driver.step([(seq, 19)])
    tail = driver.free.pop()
    fork = driver.open(seq.tokens, num_prompt=19, shared=[seq.blocks[0], tail], computed=19)
    driver.copies.append(CopyBlock(seq.blocks[1], tail))
    driver.finish([seq, fork], NUM_NEW - 1)
    assert fork.tokens == expected
    assert seq.tokens[: len(expected)] == expected[: len(seq.tokens)]


@pytest.mark.parametrize("invariant", [False, True])
def test_foreign_and_unused_memory_never_counts(folder: str, make_driver: Any, invariant: bool) -> None:
    """With NaN in every slot that nobody wrote, nothing changes."""
    clean = make_driver(model=folder, batch_invariant=invariant).generate([PROMPT, PROMPT[:7]], NUM_NEW, chunk=8)
    driver = make_driver(shuffle=1, model=folder, batch_invariant=invariant)
    for cache in driver.runner.caches:
        cache.k.fill_(torch.nan)
        cache.v.fill_(torch.nan)
    dirty = driver.generate([PROMPT, PROMPT[:7]], NUM_NEW, chunk=8)
    for a, b in zip(clean, dirty, strict=True):
        assert a.tokens == b.tokens
        torch.testing.assert_close(torch.stack(a.logits), torch.stack(b.logits), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_bad_rows_are_told_apart(folder: str, make_driver: Any, value: float) -> None:
    """One sequence's numbers go wrong; its neighbours do not notice."""
    driver = make_driver(model=folder)
    good, bad = driver.open(PROMPT), driver.open(PROMPT[::-1])
    driver.step([(good, 19), (bad, 19)])
    driver.runner.caches[0].v[bad.blocks[0]] = value
    result = driver.step([(bad, 1), (good, 1)])
    assert result.bad_rows == (0,)
    assert len(result.tokens[0]) == 1 and 0 <= result.tokens[0][0] < driver.info.vocab_size
    clean = make_driver(model=folder).generate([PROMPT], 2)[0]
    assert good.tokens == clean.tokens


def new_row(**changes: Any) -> NewRow:
    values: dict[str, Any] = {
        "uid": 1, "row": 0, "token_ids": (5, 6, 7), "num_prompt": 3, "sampling": SamplingParams(), "seed": 0,
        "sample_index": 0, "lora_slot": 0, "block_ids": ((1,),), "computed": 0,
    }  # fmt: skip
    return NewRow(**{**values, **changes})


class ArgMax:
    """The most likely token, wherever the logits are."""

    def set_row(self, new: NewRow) -> None:
        pass

    def free_row(self, row: int) -> None:
        pass

    def sample(self, logits: torch.Tensor, rows: Any, positions: Any, tokens: torch.Tensor) -> torch.Tensor:
        return logits.argmax(-1)


SPEC = ModelSpec(
    architecture="any", vocab_size=99, hidden_size=64, intermediate_size=96, num_layers=2, num_heads=4, num_kv_heads=2,
    head_dim=16, max_positions=256, norm="rms", norm_eps=1e-5, rope=RopeSpec(16, 1e4), activation="silu", gated_mlp=True,
    qkv_bias=True, out_bias=False, mlp_bias=False, qk_norm=True, tied_embeddings=True, windows=(None, None), bos_id=None,
    eos_ids=(), dtype=None,
)  # fmt: skip
COPIES = (CopyBlock(3, 7),)
WORK = RowWork(1, 0, 3, (), (), WANT_SAMPLE)


@pytest.mark.parametrize(
    ("plan", "match"),
    [
        (StepPlan(1, (RowWork(1, 0, 3, (), (4,), WANT_SAMPLE),), (new_row(),)), "draft"),
        (StepPlan(1, (RowWork(1, 0, 3, (), (), WANT_POOL),), (new_row(),)), "pooling"),
        (StepPlan(1, (WORK,), (new_row(lora_slot=1),)), "LoRA"),
        (StepPlan(1, (WORK,), (new_row(),), copies=(CopyBlock(1, 2, 1),)), "one KV group"),
        (StepPlan(1, (WORK,)), "belongs to -1, not to 1"),
        (StepPlan(1, (RowWork(2, 0, 3),), (new_row(),)), "belongs to 1, not to 2"),
        (StepPlan(1, (RowWork(1, 0, 4),), (new_row(),)), "asked for tokens up to 4, of which 3"),
        (StepPlan(1, (RowWork(1, 0, 0),), (new_row(),)), "asked for tokens"),
        (StepPlan(1, (RowWork(1, 0, 2, (), (), WANT_SAMPLE),), (new_row(),)), "sample after token 2"),
        (StepPlan(1, (WORK,), (new_row(block_ids=((),)),)), "too few"),
        (StepPlan(1, (WORK,), (new_row(block_ids=((1,), (1,))),)), "KV groups"),
        (StepPlan(1, (WORK,), (new_row(block_ids=(tuple(range(1, 60)),)),)), "more than the context"),
        (StepPlan(1, (WORK,), (new_row(token_ids=(5,) * 300),)), "context ends"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_refused(plan: StepPlan, match: str, folder: str, make_driver: Any) -> None:
    with pytest.raises(PlanError, match=match):
        make_driver(model=folder).runner.launch(plan)


def test_moments_out_of_order(folder: str, make_driver: Any) -> None:
    pending = make_driver(model=folder).runner.launch(StepPlan(1, (WORK,), (new_row(),)))
    with pytest.raises(PlanError, match="before result"):
        pending.result()
    with pytest.raises(PlanError, match="masks"):
        pending.sample(masks=np.zeros((1, 7), dtype=np.int32))


@pytest.mark.parametrize("invariant", [False, True])
def test_nothing_assumes_the_cpu(invariant: bool) -> None:
    """A step on torch's "meta" device, without storage: reading a value, or arithmetic with a CPU tensor, fails there."""
    device = torch.device("meta")
    for case in (SPEC, replace(SPEC, rope=None, norm="layer", gated_mlp=False, activation="gelu", windows=(None, 20))):
        need = AttnNeed(4, 2, 16, case.windows, 16, torch.float16, torch.float16, device, invariant)
        ops = invariant_ops() if invariant else reference_ops()
        backend, _ = select_backend(need, ops)
        decoder = Decoder(case, Setup(ops, SoloComm(), linear_method("none"), backend, torch.float16, device), 256)
        for layer in (m for m in decoder.modules() if hasattr(m, "finish")):
            layer.finish()
        caches = allocate(backend, torch.float16, 2, 40, device)
        table = TokenTable(4, 256, device)
        runner = Runner(Loaded(decoder, caches, backend, ops), Rows(4, 256, 16, 1, table), table, ArgMax())
        news = (new_row(token_ids=(5,) * 40, block_ids=((3, 4, 9),)), new_row(uid=2, row=1, block_ids=((5,),)))
        work = (RowWork(1, 0, 40, (), (), WANT_SAMPLE), RowWork(2, 1, 3, (), (), WANT_SAMPLE))
        for plan in (
            StepPlan(1, work, news),
            StepPlan(2, tuple(RowWork(w.uid, w.row, 1, (), (), 1) for w in work), (), (), COPIES),
        ):
            pending = runner.launch(plan)
            pending.sample()
            assert pending.token_ids is not None and pending.token_ids.device == device and len(pending.token_ids) == 2


def test_memory_is_touched_at_start(folder: str, make_driver: Any) -> None:
    driver = make_driver(model=folder)
    assert len(driver.runner.caches) == 3
    for cache in driver.runner.caches:
        assert len(cache.k) == len(cache.v) == 200 and cache.k.numel() == cache.v.numel() == 200 * 16 * 2 * 16
        assert not cache.k.any() and not cache.v.any()
    assert driver.info.kv_bytes == sum(c.k.nbytes + c.v.nbytes for c in driver.runner.caches)
