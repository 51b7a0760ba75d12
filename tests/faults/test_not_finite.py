"""Numbers that are not finite: whatever a request asks for, it ends with an error, and nothing of them is left."""

import math
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from faults import tiny_model

from minivllm.config import make_config
from minivllm.engine.build import build_engine
from minivllm.engine.engine import Engine
from minivllm.types import GenerateRequest, Grammar, SamplingParams, TokenEvent

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")
POISON = 77  # a token whose embedding is not finite
ASKED: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "temperature": {"temperature": 1.0},
    "filtered": {"temperature": 1.0, "top_p": 0.9, "top_k": 30},
    "penalty": {"temperature": 1.0, "repetition_penalty": 1.2},
    "logprobs": {"temperature": 0.0, "logprobs": 2},
    "of the prompt": {"temperature": 0.0, "prompt_logprobs": 1},
    "guided": {"temperature": 1.0, "grammar": Grammar("regex", "[a-f]{3,9}")},
    "guided and filtered": {"temperature": 1.0, "top_p": 0.9, "grammar": Grammar("regex", "[a-f]{3,9}")},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("tiny"))


def make_engine(model: Path, **options: Any) -> Engine:
    """An engine whose model gives NaN for every text with ``POISON`` in it."""
    small = {
        "dtype": "float32", "num_threads": 1, "max_num_seqs": 8, "max_num_batched_tokens": 24, "num_gpu_blocks_override": 40,
        "max_model_len": 96,
    }  # fmt: skip
    engine = build_engine(make_config(model=str(model), **{**small, **options}))
    embedding = runner(engine).decoder.embedding
    embed = embedding.forward
    embedding.forward = lambda ids: embed(ids).masked_fill((ids == POISON)[:, None], torch.nan)
    return engine


def runner(engine: Engine) -> Any:
    return engine._executor.runner  # type: ignore[attr-defined]


def request(name: str, prompt: tuple[int, ...], **asked: Any) -> GenerateRequest:
    no_poison = {"logit_bias": ((POISON, -100.0),)} if "grammar" not in asked else {}
    sampling = SamplingParams(max_tokens=3, seed=3, ignore_eos=True, **no_poison, **asked)
    return GenerateRequest(id=name, prompt_ids=prompt, sampling=sampling, arrival_s=time.monotonic())


def run(engine: Engine, *requests: GenerateRequest) -> dict[str, list[TokenEvent]]:
    found: dict[str, list[TokenEvent]] = {r.id: [] for r in requests}
    for r in requests:
        engine.add(r)
    while engine.has_work:
        output = engine.step()
        engine.check()
        for event in () if output is None else output.events:
            found[event.id].append(event)
    return found


def tokens(events: list[TokenEvent]) -> list[int]:
    assert not any(event.error for event in events)
    return [token for event in events for token in event.token_ids]


@pytest.mark.timeout(400)
@pytest.mark.parametrize("options", [{}, {"async_scheduling": True}, {"gpu_kernels": "triton", "async_scheduling": True}])
def test_these_requests_end_and_their_blocks_are_clean(model: Path, options: dict[str, Any]) -> None:
    asked = ASKED
    if "gpu_kernels" in options:
        pytest.importorskip("triton")
        asked = {name: ASKED[name] for name in ("greedy", "filtered", "of the prompt", "guided")}  # its ways to the tokens
    engine = make_engine(model, **options)
    head = tuple(range(10, 43))  # longer than a step, and the beginning of all prompts
    good = [request(f"good{i}", (*head[: 8 * i + 8], 5 + i), temperature=1.0) for i in range(3)]
    expected = {name: tokens(events) for name, events in run(engine, *good).items()}
    bad = [request(name, (*head[:20], POISON, *head[20 + i :]), **asked) for i, (name, asked) in enumerate(asked.items())]
    found = run(engine, *good[:2], *bad, good[2])
    for name in asked:
        assert [event.finish_reason for event in found[name]][-1] == "error", name
        assert "not finite" in (found[name][-1].error or ""), name
        assert not any(event.token_ids for event in found[name]), name
        assert all(math.isfinite(p.logprob) for event in found[name] for p in event.prompt_logprobs)
    for name, whole in expected.items():
        assert tokens(found[name]) == whole
    assert tokens(run(engine, request("later", (*head, 3), temperature=0.0))["later"])
    for cache in runner(engine).caches:
        assert cache.k[1:].isfinite().all() and cache.v[1:].isfinite().all(), "what was not finite is still there"
