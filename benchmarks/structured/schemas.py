"""Real JSON schemas: how many can be followed, whether rightly, and what compiling them and making masks costs.

    python -m benchmarks.structured.schemas [--data FOLDER] [--limit N] [--tokenizer FOLDER]

The schemas and instances are jsonschemabench's (``*.jsonl.xz``: one ``{name, schema, tests: [{valid, data}]}`` a line). Each
schema is compiled as a request's would be (checks and limits included, nothing kept from another); then a walk goes along the
tokens of each instance, with its properties in the schema's order, and on valid ones a mask over the whole vocabulary is made
before every token. One thread. A table, then one line of JSON.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from llguidance import LLMatcher

from benchmarks.structured.harness import measure
from minivllm.text.grammar import json_grammar, matcher, vocabulary
from minivllm.text.tokenizer import load_tokenizer

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"


class Walk:
    """See ``harness.Walk``."""

    def __init__(self, made: LLMatcher, mask: np.ndarray) -> None:
        self.matcher = made
        self.words = mask

    def mask(self) -> None:
        """See ``harness.Walk``."""
        self.matcher.unsafe_compute_mask_ptr(self.words.ctypes.data, self.words.nbytes)

    def accept(self, token: int) -> bool:
        """See ``harness.Walk``."""
        return bool(self.matcher.consume_token(token))

    def may_end(self) -> bool:
        """See ``harness.Walk``."""
        return bool(self.matcher.is_accepting() or self.matcher.is_stopped())


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=SHARED / "jsonschemabench")
    parser.add_argument("--limit", type=int, help="schemas of each data set, evenly spread")
    parser.add_argument("--tokenizer", type=Path, default=SHARED / "tokenizers" / "gpt2", help="a folder; another vocabulary")
    args = parser.parse_args()
    tokenizer = load_tokenizer(args.tokenizer)
    words = vocabulary(tokenizer, tokenizer.vocab_size, [tokenizer.eos_id or 0])
    mask = np.zeros(-(-words.vocab_size // 32), dtype=np.int32)

    def engine(schema: dict[str, Any]) -> Any:
        made = matcher(json_grammar(schema), words)
        return lambda: Walk(made.deep_copy(), mask)

    print(f"llguidance, {tokenizer.vocab_size:,} tokens")
    figures = measure(engine, words.tokenize_str, args.data, args.limit)
    print(json.dumps({**figures, "vocab_size": tokenizer.vocab_size, "limit": args.limit}))


if __name__ == "__main__":
    main()
