"""Starting imports only what is needed: the compiler stack of torch alone would cost more than a second."""

import subprocess
import sys


def test_no_compiler_is_imported_on_the_way_to_the_first_token() -> None:
    code = """
import sys
from minivllm.llm import LLM
from minivllm.types import SamplingParams
LLM(num_threads=1).generate(["Once"], SamplingParams(max_tokens=2, seed=0))
heavy = {"torch._dynamo", "torch._inductor", "sympy", "transformers", "huggingface_hub", "fastapi", "uvicorn"}
print(sorted(heavy & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
