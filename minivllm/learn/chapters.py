"""Every picture of the chapters, drawn anew from runs of the engine.

    python -m minivllm.learn.chapters FOLDER        # docs/learn/pictures is where the chapters look for them

Scenes run on the bundled model, on the CPU (``scenes.py``); two pictures of a GPU's clock are drawn from records that are kept
in docs/learn/recordings, written by ``python -m benchmarks.observe.device_steps``. All but the draws of tokens come out the
same to the byte on every machine. Run it in the repository.
"""

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import msgspec

from minivllm.learn import scenes
from minivllm.learn.draw_blocks import story, tables
from minivllm.learn.draw_charts import Draws, clock, draws, held_cached_free
from minivllm.learn.draw_steps import Panel, lanes, padding, positions
from minivllm.learn.scenes import BLOCK
from minivllm.records import StepRecord

RECORDINGS: Final = Path("docs/learn/recordings")
NUM_DRAWS: Final = 500
SETTINGS: Final[Sequence[tuple[str, dict[str, float]]]] = (
    ("as the model says", {}),
    ("temperature 0.5", {"temperature": 0.5}),
    ("temperature 1.5", {"temperature": 1.5}),
    ("top_p 0.7", {"top_p": 0.7}),
)


def no_cache() -> str:
    """Chapters 0 and 1."""
    without, cached = scenes.without_cache(6, 10), scenes.with_cache(6, 10)
    told = [sum(row.num_tokens for record in records for row in record.rows) for records in (without, cached)]
    beside = ([f"{told[0]} tokens computed", "for 10 tokens of text"], [f"{told[1]} tokens computed", "for the same text"])
    panels = [(Panel(without, "no cache"), beside[0]), (Panel(cached, "KV cache"), beside[1])]
    return positions(panels, "A prompt of 6 tokens and 10 tokens of text: which position is computed in which step")


def static_batch() -> str:
    """Chapter 2."""
    title = "A static batch: rows that are done wait for the longest, and so do the requests outside"
    return lanes([Panel(scenes.static_batch(), "")], title, by_seat=True)


def continuous_batch() -> str:
    """Chapter 3."""
    panel = Panel(scenes.continuous_batch(), "")
    return lanes([panel], "Continuous batching: the same eight requests; a place is taken again in the next step", by_seat=True)


def padded() -> str:
    """Chapter 3."""
    return padding(scenes.paged(), 12, "Step 12 of four requests, as the rectangle that a padded cache needs")


def block_tables() -> str:
    """Chapter 4."""
    return tables(scenes.paged(), 12, BLOCK, "The same step, paged: each request has a table of blocks of 16 slots")


def blocks() -> str:
    """Chapter 4."""
    return story(scenes.paged(), BLOCK, "Blocks of the pool, step by step: nobody needs neighbours")


def shared_prefix() -> str:
    """Chapter 5."""
    note = "A, B and D begin with the same 64 tokens, which are four full blocks"
    return story(scenes.common_prefix(), BLOCK, "Blocks that several requests hold, and that outlive them", note)


def prefix_steps() -> str:
    """Chapter 5."""
    panel = Panel(scenes.common_prefix(), "")
    return lanes([panel], "The same run: B and D compute only what is their own")


def chunked_prefill() -> str:
    """Chapter 6."""
    sizes = {256: "the prompt in one step", 32: "the prompt in chunks"}
    panels = [Panel(scenes.long_prompt(n), f"steps of at most {n} tokens: {words}") for n, words in sizes.items()]
    return lanes(panels, "A prompt of 180 tokens (D) arrives while three texts are being generated")


def graphs() -> str:
    """Chapter 7."""
    eager = Panel(_of_device(rows=1, graphs=False, overlap=False), "235 kernels launched one by one")
    graph = Panel(_of_device(rows=1, graphs=True, overlap=False), "the same kernels in two graphs")
    return clock([eager, graph], "Decode steps of one request, Qwen3-0.6B shape, one H100", 19.0)


def overlap() -> str:
    """Chapter 8."""
    alone = Panel(_of_device(rows=1, graphs=True, overlap=False), "one step at a time: the device waits while the host plans")
    ahead = Panel(_of_device(rows=1, graphs=True, overlap=True), "one step ahead: the host plans while the device computes")
    return clock([alone, ahead], "Decode steps of one request with graphs, Qwen3-0.6B shape, one H100", 9.0)


def batching_policies() -> str:
    """Chapter 9."""
    words = {
        "mixed": "mixed: decodes first, the prompt takes what is left of the step",
        "prefill-first": "prefill-first: the prompt takes the step, decodes what is left of it",
        "separate": "separate: never both in a step",
    }
    panels = [Panel(scenes.long_prompt(64, policy), title) for policy, title in words.items()]
    return lanes(panels, "Three batching policies, steps of at most 64 tokens")


def queue_order() -> str:
    """Chapter 9."""
    words = {"fcfs": "first come, first served", "priority": "by priority: the lowest number first"}
    return lanes([Panel(scenes.queue_order(p), title) for p, title in words.items()], "Two places, six requests")


def sampling() -> str:
    """Chapter 10. The only picture whose counts may differ by a few on another machine."""
    runs = [(title, scenes.next_token(scenes.STORY, NUM_DRAWS, **options)) for title, options in SETTINGS]
    chances = runs[0][1][1]
    tokens = sorted(chances, key=lambda token: -chances[token])[:10]
    panels = [Draws(title, counts, {token: chances[token] for token in tokens}) for title, (counts, _) in runs]
    return draws(panels, f"“{scenes.STORY} …”: {NUM_DRAWS} draws of the next token", tokens, "all others")


def memory() -> str:
    """Chapter 11."""
    return story(scenes.memory_use(), BLOCK, "What requests leave stays until its room is needed")


def memory_chart() -> str:
    """Chapter 11."""
    return held_cached_free(scenes.memory_use(), "The same run, counted")


def preemption() -> str:
    """Chapter 12."""
    return lanes([Panel(scenes.too_little_memory(), "")], "Three texts that outgrow a cache of nine blocks")


def preemption_blocks() -> str:
    """Chapter 12."""
    return story(scenes.too_little_memory(), BLOCK, "The same run: C gives its blocks to A and B, and computes anew later")


def trace() -> str:
    """Chapter 13."""
    return lanes([Panel(scenes.busy(), "")], "A run with a little of everything")


PICTURES: Final[Mapping[str, Callable[[], str]]] = MappingProxyType({
    draw.__name__: draw
    for draw in (
        no_cache, static_batch, continuous_batch, padded, block_tables, blocks, shared_prefix, prefix_steps, chunked_prefill,
        graphs, overlap, batching_policies, queue_order, sampling, memory, memory_chart, preemption, preemption_blocks, trace,
    )
})  # fmt: skip
NOT_EXACT: Final = frozenset({"sampling"})


def _of_device(**wanted: Any) -> Sequence[StepRecord]:
    """The kept records of one case of a GPU's steps."""
    told = json.loads((RECORDINGS / "h100_steps.json").read_text(encoding="utf-8"))
    case = next(case for case in told["cases"] if all(case[name] == value for name, value in wanted.items()))
    return msgspec.convert(case["records"], tuple[StepRecord, ...])


def main(argv: Sequence[str]) -> int:
    """Draw all pictures into a folder."""
    if len(argv) != 1:
        sys.stderr.write("usage: python -m minivllm.learn.chapters FOLDER\n")
        return 2
    folder = Path(argv[0])
    folder.mkdir(parents=True, exist_ok=True)
    for name, draw in PICTURES.items():
        (folder / f"{name}.svg").write_text(draw(), encoding="utf-8")
        sys.stdout.write(f"{folder / name}.svg\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
