"""The CPU benchmark without its rivals: equal work for all, true medians, the model file's names, who was skipped and why."""

import dataclasses
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from minivllm.bench.workload import Item


@pytest.fixture(autouse=True)
def _importable(repo: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """``benchmarks`` is no part of the package: import it from the repository."""
    monkeypatch.syspath_prepend(str(repo))
    yield
    for name in [n for n in sys.modules if n.split(".")[0] == "benchmarks"]:
        del sys.modules[name]


def part(name: str) -> Any:
    return import_module(f"benchmarks.cpu.{name}")


@pytest.fixture
def setting(tmp_path: Path) -> Any:
    return part("rivals").Setting(
        shape=part("shapes").SHAPES["gpt2"],
        models=tmp_path,
        logs=tmp_path,
        llama_cpp=tmp_path,
        threads=2,
        max_concurrency=4,
        prompt_len=32,
        output_len=8,
    )


class Fake:
    """A contender that remembers what it was asked and takes a second per request."""

    def __init__(self, label: str, error: str = "") -> None:
        self.label = label
        self.error = error
        self.asked: list[tuple[Item, ...]] = []
        self.lives: list[str] = []

    def start(self) -> float:
        self.lives.append("start")
        return 0.5

    def warm_up(self, items: Sequence[Item]) -> None:
        self.asked.append(tuple(items))

    def run(self, items: Sequence[Item]) -> Any:
        if self.error:
            raise part("rivals").RivalFailed(self.error)
        self.asked.append(tuple(items))
        return part("rivals").Measurement(sum(i.max_tokens for i in items), float(len(items)), (0.1, 0.3), (0.02,))

    def peak_memory_bytes(self) -> int:
        return 100 * 2**20

    def versions(self) -> Mapping[str, str]:
        return {self.label: "1"}

    def stop(self) -> None:
        self.lives.append("stop")


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch) -> Callable[[Sequence[float]], None]:
    """Say which share of the machine others used in each measurement; the last answer stays."""

    def set_shares(shares: Sequence[float]) -> None:
        left = list(shares)
        monkeypatch.setattr(
            part("machine").CpuClock, "others_share", lambda self, later: left.pop(0) if len(left) > 1 else left[0]
        )

    return set_shares


def measure(rivals: Mapping[str, Fake], setting: Any, concurrency: Sequence[int], rounds: int) -> list[dict[str, Any]]:
    records: list[dict[str, Any]] = []
    part("run").measure(rivals, setting, concurrency, rounds, records.append)
    return records


# --------------------------------------------------------------------------------------------------------------- the work


def test_all_contenders_get_the_same_requests_and_none_comes_twice(setting: Any, quiet: Callable[..., None]) -> None:
    quiet([0.0])
    rivals = {"a": Fake("A"), "b": Fake("B")}
    records = measure(rivals, setting, [4, 1], rounds=2)
    assert rivals["a"].asked == rivals["b"].asked
    assert [len(items) for items in rivals["a"].asked] == [1, 1, 4, 4] * 2  # warm-up and run, smallest first
    runs = [item for items in rivals["a"].asked for item in items if item.max_tokens == setting.output_len]
    assert len({item.prompt[:16] for item in runs}) == len(runs) == 10
    digests = {(r["round"], r["num_requests"]): r["workload"] for r in records if r["contender"] == "a"}
    assert len(set(digests.values())) == 4
    assert digests == {(r["round"], r["num_requests"]): r["workload"] for r in records if r["contender"] == "b"}


def test_prompts_are_words_of_the_asked_length(setting: Any) -> None:
    items = part("run").workload(setting, 3, 1)
    assert [(len(i.prompt), i.max_tokens) for i in items] == [(32, 8)] * 3
    assert all(256 <= token < setting.shape.eos_id for item in items for token in item.prompt)


def test_contenders_take_turns_and_are_never_alive_together(setting: Any, quiet: Callable[..., None]) -> None:
    quiet([0.0])
    diary: list[str] = []
    rivals = {"a": Fake("A"), "b": Fake("B")}
    for name, fake in rivals.items():
        fake.lives = type("Diary", (list,), {"append": lambda self, what, name=name: diary.append(f"{what} {name}")})()
    measure(rivals, setting, [1], rounds=2)
    assert diary == ["start a", "stop a", "start b", "stop b"] * 2


def test_a_disturbed_measurement_is_taken_again_and_the_quietest_counts(setting: Any, quiet: Callable[..., None]) -> None:
    quiet([0.5, 0.0])
    (record,) = measure({"a": Fake("A")}, setting, [1], rounds=1)
    assert (record["attempts"], record["others_share"]) == (2, 0.0)
    quiet([0.4, 0.2, 0.3])
    rival = Fake("A")
    (record,) = measure({"a": rival}, setting, [1], rounds=1)
    assert (record["attempts"], record["others_share"]) == (part("run").MAX_ATTEMPTS, 0.2)
    assert len(set(rival.asked)) == len(rival.asked)  # the attempts too get prompts that nobody has cached


def test_a_contender_that_fails_is_stopped_recorded_and_does_not_stop_the_others(
    setting: Any, quiet: Callable[..., None]
) -> None:
    quiet([0.0])
    rivals = {"bad": Fake("Bad", error="it ended"), "good": Fake("Good")}
    records = measure(rivals, setting, [1], rounds=1)
    assert rivals["bad"].lives == ["start", "stop"]
    assert [r.get("error") for r in records] == ["it ended", None]
    report = part("table").page(records)
    assert "- Bad, round 1: it ended" in report
    assert "| Good | 8 |" in report


def test_work_that_was_not_done_is_no_measurement() -> None:
    items = [Item((1, 2), 8), Item((3, 4), 8)]
    part("rivals").check_complete(items, 16)
    with pytest.raises(part("rivals").RivalFailed, match="15 of 16"):
        part("rivals").check_complete(items, 15)


def test_percentiles_are_left_out_where_a_contender_cannot_say_them() -> None:
    measurement = part("rivals").Measurement
    said = part("run").figures(measurement(10, 2.0, (0.1, 0.3), ()))
    assert said["tokens_per_s"] == 5.0
    assert said["ttft_p50_ms"] == pytest.approx(200.0)
    assert said["itl_p50_ms"] is None


# -------------------------------------------------------------------------------------------------------------- the table


def record(label: str, num_requests: int, rate: float, **more: Any) -> dict[str, Any]:
    base = {
        "contender": label,
        "label": label,
        "round": 1,
        "shape": "gpt2",
        "prompt_len": 128,
        "output_len": 128,
        "threads": 2,
        "machine": {"cpu": "Fast", "cores": 2, "memory_gib": 8.0},
        "versions": {"x": "1"},
        "num_requests": num_requests,
        "tokens_per_s": rate,
        "others_share": 0.0,
        "peak_memory_bytes": 300 * 2**20,
        "start_s": 1.5,
    }
    return {**base, **more}


def test_the_table_shows_medians_with_their_span_and_ratios_of_medians() -> None:
    table = part("table")
    rates = {1: (10.0, 30.0, 20.0), 8: (90.0, 100.0, 80.0), 32: (200.0, 100.0, 300.0)}
    records = [
        record("A", n, rate, round=i, start_s=i + 0.5, ttft_p50_ms=rate, ttft_p99_ms=2 * rate)
        for n, found in rates.items()
        for i, rate in enumerate(found, 1)
    ]
    assert "| A | 20 (10-30) | 90 (80-100) | 200 (100-300) | 300 (300-300) | 2.5 (1.5-3.5) |" in table.throughput_table(records)
    assert "| A | 4.5 | 10.0 |" in table.speedup_table(records)
    assert "| A, TTFT | 20 / 40 | 90 / 180 | 200 / 400 |" in table.latency_table(records)
    assert "ITL" not in table.latency_table(records)


def test_the_median_is_the_statistics_module_s() -> None:
    found = [3.0, 1.0, 2.0, 10.0]
    assert part("table").spread(found, 1) == f"{statistics.median(found):.1f} (1.0-10.0)"
    assert part("table").spread([7.0]) == "7"
    assert part("table").spread([]) == ""


def test_quoted_figures_appear_only_beside_their_own_workload() -> None:
    table = part("table")
    ours = [record("A", 1, 10.0), record("A", 32, 100.0)]
    assert "| vLLM CPU build 0.28, bfloat16 (quoted) | 40 | 207 | 6700 | 66-104 |" in table.page(ours)
    assert "quoted" not in table.page([{**r, "output_len": 64} for r in ours])
    assert "quoted" not in table.page([{**r, "shape": "qwen3-0.6b"} for r in ours])


def test_disturbed_measurements_count_only_where_there_is_no_other() -> None:
    table = part("table")
    records = [
        record("A", 1, 10.0),
        record("A", 1, 2.0, round=2, others_share=0.5),
        record("A", 1, 12.0, round=3),
        record("A", 8, 20.0, others_share=0.3),
    ]
    said = table.page(records)
    assert "| A | 11 (10-12) | 20* |" in said
    assert "| A | 1.8* |" in said
    assert "2 of 4 measurements were disturbed" in said
    assert "Time to first token" not in said  # nobody could say it
    quiet = table.page([r for r in records if r["others_share"] == 0.0])
    assert "disturbed" not in quiet
    assert "*" not in quiet


def test_a_page_without_measurements_says_so() -> None:
    assert part("table").page([]) == "Nothing was measured.\n"


# -------------------------------------------------------------------------------------------------------- model and rivals


def test_every_tensor_of_the_checkpoint_has_its_name_in_the_gguf_file() -> None:
    shapes, gguf_model = part("shapes"), part("gguf_model")
    config = {**shapes.GPT2.config, "n_layer": 2}
    tensors = dict(shapes.gpt2_tensors(config))
    named = {name: gguf_model.gguf_name(name) for name in tensors}
    per_layer = [f"{m}.{p}" for m in gguf_model.MODULES.values() for p in ("weight", "bias")]
    wanted = {"token_embd.weight", "position_embd.weight", "output_norm.weight", "output_norm.bias"}
    wanted |= {f"blk.{i}.{name}" for i in range(2) for name in per_layer}
    assert {name for name, _ in named.values()} == wanted
    assert len(named) == len(wanted) == 28
    transposed = {name for name, turned in named.values() if turned}
    assert transposed == {f"blk.{i}.{m}.weight" for i in range(2) for m in ("attn_qkv", "attn_output", "ffn_up", "ffn_down")}


def test_the_model_folder_is_one_that_the_engine_loads(tmp_path: Path) -> None:
    from minivllm.llm import LLM
    from minivllm.types import SamplingParams

    shapes = part("shapes")
    small = {**shapes.GPT2.config, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64, "vocab_size": 600}
    config = {**small, "bos_token_id": 599, "eos_token_id": 599}
    shape = dataclasses.replace(shapes.GPT2, config=config)
    folder = shapes.make_model_folder(shape, tmp_path)
    llm = LLM(str(folder), dtype="float32", kv_cache_memory_bytes=2**22, num_threads=1)
    (done,) = llm.generate([[300, 301, 302]], SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True))
    assert len(done.token_ids) == 4
    assert llm.tokenizer.decode([256, 257, 598, 599]) == "aaaaaaabaane"
    assert llm.tokenizer.eos_id == shape.eos_id


def test_the_vocabulary_has_one_text_for_every_id() -> None:
    texts = part("shapes").token_texts(151936, [chr(300 + i) for i in range(256)])
    assert len(set(texts)) == len(texts) == 151936


def test_what_is_not_there_is_skipped_with_the_reason(setting: Any, capsys: pytest.CaptureFixture[str]) -> None:
    rivals = part("run").present_rivals(["ours-float32", "llama-q8"], setting)
    assert list(rivals) == ["ours-float32"]
    said = capsys.readouterr().err
    assert "skipped llama-q8: llama-server and llama-quantize not found" in said
    assert "--llama-cpp" in said


def test_every_contender_can_be_named_and_has_its_own_label(setting: Any) -> None:
    contenders = part("contenders").CONTENDERS
    rivals = [make(setting) for make in contenders.values()]
    assert len({rival.label for rival in rivals}) == len(contenders)
    chosen = part("run").parse(["--contenders", "ours-float32", "--concurrency", "1,8"])
    assert (chosen.contenders, chosen.concurrency) == ("ours-float32", [1, 8])
    with pytest.raises(SystemExit):
        part("run").parse(["--contenders", "nobody"])


def test_all_engines_of_ours_get_room_for_the_largest_size_and_no_more(setting: Any) -> None:
    options = part("rivals").ours_options(setting, {"dtype": "bfloat16"})
    assert options["max_model_len"] == 40
    assert options["num_gpu_blocks_override"] == 4 * 4 + 1  # 40 tokens are 3 blocks of 16, and one spare for each
    assert options["dtype"] == "bfloat16"
