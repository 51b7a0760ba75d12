"""The same schemas, instances and harness as ``benchmarks.structured.schemas``, with another engine of grammars.

    pip install xgrammar outlines-core tokenizers numpy        # in an environment of its own
    python -m benchmarks.structured.rivals xgrammar [--data FOLDER] [--limit N] [--tokenizer FOLDER]
    python -m benchmarks.structured.rivals outlines --limit 10

Each is set to what JSON Schema says (unknown names allowed unless the schema forbids them), with one thread and no cache.
"""

import argparse
import ctypes
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from benchmarks.structured.harness import Engine, measure

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
EOS = "<|endoftext|>"


def _byte_alphabet() -> dict[str, int]:
    """Character -> byte of byte-level vocabularies."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(others)}


def xgrammar_engine(tokenizer: tokenizers.Tokenizer) -> Engine:
    """xgrammar: pushdown automata, masks of places computed at compile time."""
    import xgrammar

    names = [tokenizer.id_to_token(i) or "" for i in range(tokenizer.get_vocab_size())]
    info = xgrammar.TokenizerInfo(names, xgrammar.VocabType.BYTE_LEVEL, stop_token_ids=[tokenizer.token_to_id(EOS)])
    compiler = xgrammar.GrammarCompiler(info, max_threads=1, cache_enabled=False)
    mask = xgrammar.allocate_token_bitmask(1, info.vocab_size)

    class Walk:
        def __init__(self, made: Any) -> None:
            self.matcher = xgrammar.GrammarMatcher(made)

        def mask(self) -> None:
            self.matcher.fill_next_token_bitmask(mask)

        def accept(self, token: int) -> bool:
            return bool(self.matcher.accept_token(token))

        def may_end(self) -> bool:
            return bool(self.matcher.accept_token(info.stop_token_ids[0]))

    def engine(schema: dict[str, Any]) -> Callable[[], Walk]:
        made = compiler.compile_json_schema(json.dumps(schema), any_whitespace=True, strict_mode=False)
        return lambda: Walk(made)

    return engine


def outlines_engine(tokenizer: tokenizers.Tokenizer) -> Engine:
    """outlines-core: the schema as one regular expression, its automaton's states indexed over the vocabulary."""
    import outlines_core
    from outlines_core.json_schema import build_regex_from_schema

    eos, alphabet = tokenizer.token_to_id(EOS), _byte_alphabet()
    pieces: dict[bytes, list[int]] = {}
    for token in range(tokenizer.get_vocab_size()):
        if token != eos:
            pieces.setdefault(bytes(alphabet[c] for c in tokenizer.id_to_token(token)), []).append(token)
    vocabulary = outlines_core.Vocabulary(eos, pieces)
    mask = np.zeros(-(-tokenizer.get_vocab_size() // 32), dtype=np.int32)

    class Walk:
        def __init__(self, index: Any) -> None:
            self.guide = outlines_core.Guide(index)

        def mask(self) -> None:
            self.guide.write_mask_into(mask.ctypes.data_as(ctypes.c_void_p).value, mask.size, 4)

        def accept(self, token: int) -> bool:
            try:
                self.guide.advance(token, return_tokens=False)
            except ValueError:
                return False
            return True

        def may_end(self) -> bool:
            return bool(self.guide.is_finished() or eos in self.guide.get_tokens())

    def engine(schema: dict[str, Any]) -> Callable[[], Walk]:
        index = outlines_core.Index(build_regex_from_schema(json.dumps(schema)), vocabulary)
        return lambda: Walk(index)

    return engine


RIVALS = {"xgrammar": xgrammar_engine, "outlines": outlines_engine}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rival", choices=sorted(RIVALS))
    parser.add_argument("--data", type=Path, default=SHARED / "jsonschemabench")
    parser.add_argument("--limit", type=int, help="schemas of each data set, evenly spread")
    parser.add_argument("--tokenizer", type=Path, default=SHARED / "tokenizers" / "gpt2", help="a folder with a byte-level one")
    args = parser.parse_args()
    tokenizer = tokenizers.Tokenizer.from_file(str(args.tokenizer / "tokenizer.json"))

    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    print(f"{args.rival}, {tokenizer.get_vocab_size():,} tokens")
    figures = measure(RIVALS[args.rival](tokenizer), encode, args.data, args.limit)
    print(json.dumps({**figures, "rival": args.rival, "limit": args.limit}))


if __name__ == "__main__":
    main()
