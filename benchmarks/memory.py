"""Whether the engine's memory grows after start.

    python benchmarks/memory.py [--dtype bfloat16] [--rounds 8] [--model FOLDER]

Batches of random prompts of mixed lengths and settings run one after the other in one process; after each, the process's own
memory (RssAnon, from /proc) is printed beside what was said at start. A table, then one line of JSON.
"""

import argparse
import json
import random
import re
from pathlib import Path

from minivllm.llm import LLM
from minivllm.types import SamplingParams

MIB = 2**20


def own_memory_bytes() -> int:
    """Memory of this process that no file backs."""
    found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    if found is None:
        raise RuntimeError("this kernel does not report RssAnon")
    return int(found.group(1)) * 1024


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--model")
    args = parser.parse_args()
    llm = LLM(args.model, dtype=args.dtype)
    info, draw = llm.info, random.Random(0)
    longest = min(700, info.max_model_len - 40)
    figures = [own_memory_bytes()]
    for _ in range(args.rounds):
        prompts = [[draw.randrange(3, info.vocab_size) for _ in range(draw.randrange(5, longest))] for _ in range(48)]
        sampling = [
            SamplingParams(
                max_tokens=draw.randrange(4, 40), temperature=draw.choice([0.0, 1.0]), top_p=0.9, seed=1, ignore_eos=True
            )
            for _ in prompts
        ]
        llm.generate(prompts, sampling)
        figures.append(own_memory_bytes())
    print(f"{'round':<8}{'MiB':>8}")
    for number, figure in enumerate(figures):
        print(f"{number or 'start':<8}{figure / MIB:8.0f}")
    print(f"said at start: workspace {info.workspace_bytes / MIB:.0f} MiB; grown by {(figures[-1] - figures[0]) / MIB:.0f} MiB")
    print(json.dumps({"own_memory_bytes": figures, "workspace_bytes": info.workspace_bytes, "dtype": args.dtype}))


if __name__ == "__main__":
    main()
