"""Who is measured: one line each. And what is quoted instead, because it cannot be run everywhere.

The order is the order of a round and of the table's rows.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from benchmarks.cpu.batched_bench import BatchedBench
from benchmarks.cpu.offline import Ours, Transformers
from benchmarks.cpu.rivals import Rival, Setting
from benchmarks.cpu.servers import LlamaServer, OursOverHttp

F32, BF16, INT8 = {"dtype": "float32"}, {"dtype": "bfloat16"}, {"dtype": "bfloat16", "quantization": "int8"}

CONTENDERS: Final[Mapping[str, Callable[[Setting], Rival]]] = {
    "ours-float32": lambda s: Ours(s, "mini-vLLM, float32", F32),
    "ours-bfloat16": lambda s: Ours(s, "mini-vLLM, bfloat16", BF16),
    "ours-int8": lambda s: Ours(s, "mini-vLLM, int8", INT8),
    "ours-float32-http": lambda s: OursOverHttp(s, "mini-vLLM server, float32", F32),
    "ours-bfloat16-http": lambda s: OursOverHttp(s, "mini-vLLM server, bfloat16", BF16),
    "ours-int8-http": lambda s: OursOverHttp(s, "mini-vLLM server, int8", INT8),
    "transformers-float32": lambda s: Transformers(s, "transformers generate, float32", "generate", "float32"),
    "transformers-bfloat16": lambda s: Transformers(s, "transformers generate, bfloat16", "generate", "bfloat16"),
    "transformers-continuous": lambda s: Transformers(s, "transformers continuous, bfloat16", "continuous", "bfloat16"),
    "llama-f32": lambda s: LlamaServer(s, "llama.cpp server, f32", "F32"),
    "llama-q8": lambda s: LlamaServer(s, "llama.cpp server, Q8_0", "Q8_0"),
    "llama-decode-f32": lambda s: BatchedBench(s, "llama.cpp batched bench, f32, decode only", "F32"),
    "llama-decode-q8": lambda s: BatchedBench(s, "llama.cpp batched bench, Q8_0, decode only", "Q8_0"),
}


@dataclass(frozen=True)
class Quoted:
    """Figures of a rival that were taken on another machine: output tokens/s by concurrency, peak MiB at 32, start."""

    label: str
    tokens_per_s: Mapping[int, float]
    peak_mib: float | None = None
    start_s: str = ""


QUOTED_SHAPE: Final = ("gpt2", 128, 128)  # the quoted figures' model, prompt and output length
QUOTED_MACHINE: Final = "2 cores of an Emerald Rapids Xeon (AVX-512, BF16, VNNI, no AMX), 24 GiB"
QUOTED: Final = (
    Quoted("vLLM CPU build 0.28, bfloat16", {1: 40, 4: 133, 8: 150, 16: 196, 32: 207}, 6700, "66-104"),
    Quoted("vLLM CPU build 0.28, float32", {1: 30, 8: 141, 32: 245}, 7100),
    Quoted("naive padded engine, float32", {1: 21.6, 4: 38, 8: 52, 16: 46, 32: 59}, 2039, "6"),
    Quoted("llama.cpp batched bench, Q4_0, decode only", {1: 77, 8: 184, 32: 205}),
)
