"""Every rung says what the engine says, and one that forgets a row's own position does not."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gap_rule import float64_gaps, near_ties
from transformers import AutoModelForCausalLM

from minivllm.config import make_config
from minivllm.engine.build import build_engine
from minivllm.learn import engine_rungs, rung0, rung1, rung2, rung3
from minivllm.learn.desk import Desk, Request
from minivllm.learn.model import Model, load_model
from minivllm.learn.rectangle import greedy, places, rectangle
from minivllm.learn.workload import Workload

BATCH = 4
PLAIN = {"0": rung0.serve, "1": rung1.serve, "2": rung2.serve, "3": rung3.serve}
MOST_LINES = 120
WORKLOAD = Workload(num_requests=9, num_prefixes=2, prefix_len=33, input_len=20, output_len=14, spread=0.9)
CASES = ("bundled", "gpt2", "gpt2-untied-inner", "llama-gqa", "llama-mqa-biases", "llama3-scaling", "mistral-window", "qwen2",
         "qwen3", "qwen3-window")  # fmt: skip


@pytest.fixture(scope="module")
def folder_of(tiny_model: Callable[[str], tuple[Path, Any]], bundled_model: Path) -> Callable[[str], Path]:
    return lambda case: bundled_model if case == "bundled" else tiny_model(case)[0]


def requests(vocab_size: int) -> list[Request]:
    return WORKLOAD.requests(vocab_size, {0, 1, 2})


def plain_tokens(folder: Path, name: str) -> list[list[int]]:
    model = load_model(make_config(model=str(folder), dtype="float32", num_threads=1), WORKLOAD.longest)
    desk = Desk(requests(model.decoder.spec.vocab_size), 600.0)
    PLAIN[name](model, desk, BATCH)
    assert not desk.open
    return [request.output for request in desk.taken]


def engine_tokens(folder: Path, **options: Any) -> list[list[int]]:
    base = {"model": str(folder), "dtype": "float32", "num_threads": 1, "max_model_len": WORKLOAD.longest}
    engine = build_engine(make_config(**{**base, **options}))
    desk = Desk(requests(engine.info.vocab_size), 600.0)
    engine_rungs.serve(engine, desk, BATCH)
    engine.check()
    return [request.output for request in desk.taken]


def check_equal(folder: Path, ours: list[list[int]], engine: list[list[int]]) -> None:
    """Equal, or parted where a float64 reference has two tokens that are as good as equal."""
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).double().eval()
    asked = requests(reference.config.vocab_size)
    assert [len(tokens) for tokens in ours] == [request.num_output for request in asked]
    for request, mine, theirs in zip(asked, ours, engine, strict=True):
        ties = near_ties(request.id, mine, float64_gaps(reference, list(request.prompt), mine))
        ties += near_ties(request.id, theirs, float64_gaps(reference, list(request.prompt), theirs))
        if mine != theirs:
            parted = next(i for i, (a, b) in enumerate(zip(mine, theirs, strict=True)) if a != b)
            assert parted in [position for _, position in ties]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", PLAIN)
def test_a_program_says_what_the_engine_says(name: str, case: str, folder_of: Callable[[str], Path]) -> None:
    folder = folder_of(case)
    engine = engine_tokens(folder, batch_invariant=True)
    assert len({tuple(tokens) for tokens in engine}) > 1
    check_equal(folder, plain_tokens(folder, name), engine)


@pytest.mark.parametrize("case", ["bundled", "gpt2", "qwen3"])
@pytest.mark.parametrize("name", ["4", "4k", "5", "6", "8"])
def test_an_engine_rung_says_what_the_engine_says(name: str, case: str, folder_of: Callable[[str], Path]) -> None:
    folder = folder_of(case)
    options = {"max_num_batched_tokens": 2048, **engine_rungs.engine_options(name, BATCH, 16)}
    check_equal(folder, engine_tokens(folder, **options), engine_tokens(folder, batch_invariant=True))


# ----------------------------------------------------------------------------------------------------- the naive mistake


def naive_decode(model: Model, desk: Desk, running: list[rung3.Running]) -> None:
    """Rung 3's step with one mistake: every new token is placed behind the *longest* row."""
    lengths = [row.length for row in running]
    stacked = rung3.stack([row.cache for row in running], lengths)
    newest = rectangle([row.request.output[-1:] for row in running])
    positions = rectangle([[max(lengths)] for _ in lengths])
    mask = places([length + 1 for length in lengths], max(lengths) + 1)
    logits, grown = model(newest, positions, stacked, mask)
    for i, (row, token) in enumerate(zip(running, greedy(logits), strict=True)):
        first = max(lengths) - lengths[i]
        row.cache = [(keys[i : i + 1, :, first:], values[i : i + 1, :, first:]) for keys, values in grown]
        desk.tell(row.request, token)


@pytest.mark.parametrize("case", ["bundled", "gpt2", "llama-gqa"])
def test_positions_of_the_longest_row_give_shorter_rows_another_text(case: str, folder_of: Callable[[str], Path]) -> None:
    model = load_model(make_config(model=str(folder_of(case)), dtype="float32", num_threads=1), 128)
    vocab_size = model.decoder.spec.vocab_size

    def texts(decode: Callable[[Model, Desk, list[rung3.Running]], None]) -> list[list[int]]:
        asked = Workload(num_requests=3, prefix_len=0, input_len=40, output_len=24, spread=0.0).requests(vocab_size, {0, 1, 2})
        for request, length in zip(asked, (40, 9, 3), strict=True):
            request.prompt = request.prompt[:length]
        desk = Desk(asked, 600.0)
        running = [rung3.prefill(model, desk, request) for request in desk.take(3)]
        while not asked[0].done:
            decode(model, desk, running)
        return [request.output for request in asked]

    right, wrong = texts(rung3.decode), texts(naive_decode)
    assert wrong[0] == right[0]  # the longest row's positions are right by chance
    assert [tokens[0] for tokens in wrong] == [tokens[0] for tokens in right]  # prompts are computed alone
    assert wrong[1] != right[1]
    assert wrong[2] != right[2]


# ------------------------------------------------------------------------------------------------------------- the files


@pytest.mark.parametrize("name", ["model", "rung0", "rung1", "rung2", "rung3", "desk"])
def test_the_programs_stay_small(name: str, repo: Path) -> None:
    lines = (repo / "minivllm" / "learn" / f"{name}.py").read_text(encoding="utf-8").splitlines()
    assert len(lines) < MOST_LINES


def modules_after(code: str, repo: Path) -> set[str]:
    code += "; import sys; print('\\n'.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=repo, capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_the_ladder_runs_without_transformers(repo: Path) -> None:
    found = modules_after("import minivllm.learn.ladder, minivllm.learn.rung2, minivllm.learn.rung3", repo)
    assert {"torch", "minivllm.learn.rung3"} <= found
    assert "transformers" not in found


def test_a_server_does_not_load_the_ladder(repo: Path) -> None:
    found = modules_after("import minivllm.cli.serve, minivllm.server.application, minivllm.engine.process", repo)
    assert [name for name in found if name.startswith("minivllm.learn")] == []


# --------------------------------------------------------------------------------------------------- what the model counts


def test_the_model_counts_what_its_mask_hides(folder_of: Callable[[str], Path]) -> None:
    model = load_model(make_config(model=str(folder_of("gpt2")), dtype="float32", num_threads=1), 32)
    _, cache = model(rectangle([[5, 6, 7], [8]]), rectangle([[0, 1, 2], [0]]), mask=places([3, 1], 3))
    model(rectangle([[9], [9]]), rectangle([[3], [1]]), cache, torch.tensor([[True] * 4, [False, False, True, False]]))
    prompt, step = model.meter.costs
    assert (prompt.tokens, prompt.padding) == (6, 2)
    assert (step.tokens, step.padding) == (2, 1)  # the second row has ended
    per_token = 3 * 2 * 64 * 4
    assert step.kv_bytes == (2 * 6 + 2 + 8) * per_token
    assert step.kv_padding_bytes == (2 * 3 + 1 + 3 + 1) * per_token


def test_an_empty_column_changes_nothing(folder_of: Callable[[str], Path]) -> None:
    model = load_model(make_config(model=str(folder_of("llama-gqa")), dtype="float32", num_threads=1), 32)
    alone, _ = model(rectangle([[8, 9]]), rectangle([[0, 1]]))
    logits = [
        model(rectangle([[5, 6, 7, 4], [filler, filler, 8, 9]]), rectangle([[0, 1, 2, 3], [filler, 0, 0, 1]]), mask=mask)[0][1]
        for filler, mask in ((0, places([4, 2], 4)), (30, places([4, 2], 4)), (0, None))
    ]
    torch.testing.assert_close(logits[0], alone[0])
    assert torch.equal(logits[0], logits[1])  # whatever stands there
    assert not torch.allclose(logits[2], alone[0])  # without a mask it is seen
