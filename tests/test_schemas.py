"""A model of random weights writes under 300 real schemas: whatever ends by itself is JSON and valid.

Weights that know nothing of JSON are the hard case: nothing but the masks keeps the text in the schema. The schemas are
jsonschemabench's; without that folder the test is skipped.
"""

import json
import lzma
import re
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
import transformers

from minivllm.errors import InvalidRequest
from minivllm.llm import LLM
from minivllm.text.grammar import json_grammar, matcher, vocabulary
from minivllm.text.json_schema import parts
from minivllm.types import SamplingParams

NUM_SCHEMAS, MAX_TOKENS = 300, 400
SETS = ["BFCL", "Glaiveai2K", "JME", "JsonSchemaStore", "Kubernetes", "MCPspec", "Snowplow", "WashingtonPost"]


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory, tiny_models: Any, bundled_model: Path) -> LLM:
    """A tiny random model with the bundled model's tokenizer."""
    folder = tmp_path_factory.mktemp("random")
    sizes = {"vocab_size": 4096, "num_hidden_layers": 2, "max_position_embeddings": 512, "eos_token_id": 0}
    model = transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**{**tiny_models.SMALL, **sizes}))
    tiny_models.randomize(model, 3)
    model.to(torch.float32).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(bundled_model / name, folder / name)
    return LLM(str(folder), device="cpu", dtype="float32", num_threads=1, max_num_seqs=100, seed=1)


@pytest.fixture(scope="module")
def schemas(shared_data: Path, llm: LLM) -> list[dict[str, Any]]:
    """Schemas that are taken, evenly from all sets that have any."""
    folder = shared_data / "jsonschemabench"
    if not folder.is_dir():
        pytest.skip("jsonschemabench is not in the shared data")
    words = vocabulary(llm.tokenizer, llm.info.vocab_size, llm.info.eos_token_ids)
    chosen: list[dict[str, Any]] = []
    for number, name in enumerate(SETS, 1):
        with lzma.open(folder / f"{name}.jsonl.xz", "rt", encoding="utf-8") as lines:
            found = [json.loads(line)["schema"] for line in lines]
        for schema in found[:: max(1, len(found) // 75)]:
            if len(chosen) < NUM_SCHEMAS * number // len(SETS) and judged_well(schema) and taken(schema, words):
                chosen.append(schema)
    return chosen


def taken(schema: dict[str, Any], words: Any) -> bool:
    try:
        matcher(json_grammar(schema), words)
    except InvalidRequest:
        return False
    return True


def judged_well(schema: dict[str, Any]) -> bool:
    """Whether the jsonschema package can judge by it: it divides binary fractions, and its patterns are Python's."""
    try:
        for part in parts(schema):
            re.compile(pattern if isinstance(pattern := part.get("pattern"), str) else "")
    except re.error:
        return False
    return all(isinstance(part.get("multipleOf", 1), int) for part in parts(schema))


@pytest.mark.slow
def test_random_weights_write_valid_json(llm: LLM, schemas: list[dict[str, Any]]) -> None:
    assert len(schemas) == NUM_SCHEMAS
    # Random weights never come to an end: tokens that close something are made likelier.
    closing = [t for t in range(llm.info.vocab_size) if llm.tokenizer.token_bytes(t) in (b'"', b"}", b"]", b'"}', b'",', b",")]
    sampling = [
        SamplingParams(
            grammar=json_grammar(schema), max_tokens=MAX_TOKENS, temperature=1.0, seed=number,
            logit_bias=tuple((token, 7.0) for token in closing),
        )
        for number, schema in enumerate(schemas)
    ]  # fmt: skip
    ends: Counter[str] = Counter()
    for schema, done in zip(schemas, llm.generate(["Once"] * len(schemas), sampling), strict=True):
        ends[str(done.finish_reason)] += 1
        if done.finish_reason == "stop":
            value = json.loads(done.text)
            judge = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)(schema)
            wrong = next(judge.iter_errors(value), None)
            assert wrong is None, (wrong, done.text, schema)
    assert ends["stop"] + ends["length"] == NUM_SCHEMAS
    assert ends["stop"] >= 0.9 * NUM_SCHEMAS, ends
