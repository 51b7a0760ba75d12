"""The standard's own JSON Schema test suite (2020-12, required cases) against the grammars made of its schemas.

What must hold: every text that a grammar lets through is valid, and no valid text with its properties in the schema's order is
refused. Where it does not hold, and which schemas are refused altogether, stands in ``json_schema_exceptions.json``; the test
fails when the table says less than is so, and when it says more. ``python -m tests.text.test_json_schema_suite SUITE.tar.xz``
writes the table anew; the reasons in it are written by hand.
"""

import json
import re
import sys
import tarfile
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from llguidance import LLMatcher, LLTokenizer
from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask

from minivllm.errors import InvalidRequest
from minivllm.text.grammar import json_grammar, matcher, vocabulary
from minivllm.text.tokenizer import load_tokenizer

TABLE = Path(__file__).with_name("json_schema_exceptions.json")
ARCHIVE = Path("json-schema-test-suite", "json-schema-test-suite.tar.xz")
STORIES = Path(__file__).parents[2] / "minivllm" / "assets" / "stories"
Differences = dict[str, dict[str, Any]]


def cases(archive: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """File name and case of everything required in the newest draft."""
    with tarfile.open(archive) as tar:
        for name in sorted(n for n in tar.getnames() if re.fullmatch(r"(\./)?tests/draft2020-12/[^/]*\.json", n)):
            opened = tar.extractfile(name)
            assert opened is not None
            for case in json.load(opened):
                yield Path(name).name, case


def known_names(schema: Any) -> list[str]:
    """Names of properties in the order in which a grammar writes them: a schema's own, then those of its parts."""
    names: list[str] = []
    if isinstance(schema, Mapping):
        properties = schema.get("properties")
        names += [*(properties if isinstance(properties, Mapping) else ()), *schema.get("required", ())]
        names += [name for value in schema.values() for name in known_names(value)]
    elif isinstance(schema, list):
        names += [name for value in schema for name in known_names(value)]
    return names


def in_schema_order(value: Any, names: list[str]) -> Any:
    """An instance with known properties first, in the schema's order."""
    if isinstance(value, list):
        return [in_schema_order(item, names) for item in value]
    if not isinstance(value, dict):
        return value
    ordered = sorted(value, key=lambda name: names.index(name) if name in names else len(names))
    return {name: in_schema_order(value[name], names) for name in ordered}


def admits(made: LLMatcher, words: LLTokenizer, text: str) -> bool:
    """Whether the grammar lets the whole text through."""
    walk, tokens = made.deep_copy(), words.tokenize_str(text)
    return walk.try_consume_tokens(tokens) == len(tokens) and (walk.is_accepting() or walk.is_stopped())


def grammar_of(schema: Any, words: LLTokenizer) -> LLMatcher | str:
    """The schema's matcher, or why there is none."""
    try:
        return matcher(json_grammar(schema), words)
    except InvalidRequest as refused:
        short = str(refused).removeprefix("The grammar cannot be followed here: ").removesuffix("; change or simplify it.")
        return re.sub(r"\((http|urn)[^)]*\)", "(...)", short.removeprefix("The JSON Schema "))


def differences(archive: Path, words: LLTokenizer) -> Differences:
    """Everything that is not as it should be, in the form of the table."""
    found: Differences = {"refused schemas": {}, "valid but refused": {}, "invalid but admitted": {}}
    refused: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for file, case in cases(archive):
        made = grammar_of(case["schema"], words)
        if isinstance(made, str):
            refused[made][file].append(case["description"])
            continue
        names = known_names(case["schema"])
        for test in case["tests"]:
            instance = in_schema_order(test["data"], names)
            answers = {
                admits(made, words, json.dumps(instance, ensure_ascii=False, separators=separators))
                for separators in ((", ", ": "), (",", ":"))
            }
            if answers != {test["valid"]}:
                kind = "valid but refused" if test["valid"] else "invalid but admitted"
                found[kind].setdefault(file, []).append(f"{case['description']}: {test['description']}")
    found["refused schemas"] = {why: dict(files) for why, files in sorted(refused.items())}
    return found


@pytest.fixture(scope="module")
def words() -> LLTokenizer:
    tokenizer = load_tokenizer(STORIES)
    return vocabulary(tokenizer, tokenizer.vocab_size, [tokenizer.eos_id or 0])


@pytest.fixture(scope="module")
def archive(shared_data: Path) -> Path:
    path = shared_data / ARCHIVE
    if not path.is_file():
        pytest.skip("the JSON Schema test suite is not in the shared data")
    return path


def test_differences_are_those_of_the_table(archive: Path, words: LLTokenizer) -> None:
    table = json.loads(TABLE.read_text(encoding="utf-8"))
    assert table["invalid but admitted"] == {}
    assert set(table.pop("why")) == set(table["valid but refused"])
    assert differences(archive, words) == table


def test_most_of_the_suite_is_followed(archive: Path, words: LLTokenizer) -> None:
    """The table is not a list of everything."""
    made = [(case, grammar_of(case["schema"], words)) for _, case in cases(archive)]
    followed = [case for case, grammar in made if not isinstance(grammar, str)]
    assert len(made) == 383 and sum(len(case["tests"]) for case, _ in made) == 1299
    assert len(followed) > 165 and sum(len(case["tests"]) for case in followed) > 600


# ----------------------------------------------------------------------------------------------------------- random texts


class Writer:
    """Writes random texts that a grammar lets through; rather plain ones that come to an end."""

    def __init__(self, words: LLTokenizer, seed: int) -> None:
        self.words = words
        self.draw = np.random.default_rng(seed)
        self.bytes = [words.decode_bytes([token]) for token in range(words.vocab_size)]
        self.weight = np.array([self._liking(piece) for piece in self.bytes])
        self.weight[words.eos_token] = 8
        self.mask = allocate_token_bitmask(1, words.vocab_size)

    @staticmethod
    def _liking(piece: bytes) -> float:
        if len(piece) > 1 or not piece:
            return 0.002
        return 12 if piece in b'"}]' else 5 if piece in b"\\abxyz019,:" else 1 if piece.isascii() else 0.05

    def write(self, made: LLMatcher, max_tokens: int) -> bytes | None:
        """A text; None if it did not end."""
        walk, text = made.deep_copy(), b""
        for _ in range(max_tokens):
            fill_next_token_bitmask(walk, self.mask, 0)
            allowed = np.unpackbits(self.mask.view(np.uint8), bitorder="little")[: self.words.vocab_size]
            chance = self.weight * allowed
            token = int(self.draw.choice(len(chance), p=chance / chance.sum()))
            if token == self.words.eos_token:
                return text
            walk.consume_token(token)
            text += self.bytes[token]
            if walk.is_stopped():
                return text
        return None


@pytest.mark.slow
def test_what_grammars_let_through_is_valid(archive: Path, words: LLTokenizer) -> None:
    """Ten random texts under each schema that is taken, judged by the jsonschema package.

    It divides binary fractions for ``multipleOf`` and does not know ``\\p`` in patterns, so it cannot judge those.
    """
    writer, num_judged, wrong = Writer(words, 1), 0, []
    for file, case in cases(archive):
        schema, made = case["schema"], grammar_of(case["schema"], words)
        if isinstance(made, str) or "multipleOf" in file or "\\p" in json.dumps(schema):
            continue
        judge = jsonschema.Draft202012Validator(schema)
        for _ in range(10):
            text = writer.write(made, 200)
            if text is not None:
                num_judged += 1
                if not judge.is_valid(json.loads(text)):
                    wrong.append((file, case["description"], text))
    assert wrong == []
    assert num_judged > 1000


def _write_table(archive: Path) -> None:
    tokenizer = load_tokenizer(STORIES)
    found = differences(archive, vocabulary(tokenizer, tokenizer.vocab_size, [tokenizer.eos_id or 0]))
    why = json.loads(TABLE.read_text(encoding="utf-8"))["why"] if TABLE.is_file() else {}
    TABLE.write_text(json.dumps({"why": why, **found}, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    _write_table(Path(sys.argv[1]))
