"""What grammars cost a batch: 64 rows with 32 different schemas, and the same rows without.

    python -m benchmarks.structured.batch [--model A|tiny|bundled] [--rows 64] [--tokens 256] [--repeats 3] [--tokenizer FOLDER]
        [--temperature 0] [--workers 12] [--profile]

Both run to the same length: the schemas ask for arrays that are longer. "sampled": every token is sampled under its mask, also
where the grammar leaves no choice (that is how it is with logprobs). "with certain tokens": those are computed in one step with
what follows them, as requests get it that ask for no logprobs. The rows take turns, so that all share whatever else the machine
does, and the median counts. ``--profile``: then once more with clocks in the host's loop (``pieces.py``). ``--tokenizer``: a
real vocabulary in place of the shape's made-up one, for ids that both have.
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any, Final

from benchmarks.gpu.shapes import MODELS, MODELS_FOLDER
from benchmarks.structured.pieces import timed_pieces
from minivllm import LLM, SamplingParams
from minivllm.engine.grammars import Grammars
from minivllm.text.grammar import json_grammar
from minivllm.types import Grammar

NUM_SCHEMAS: Final = 32
PROMPT_IDS: Final = range(40, 104)


def schemas() -> list[dict[str, Any]]:
    """Different ones: records of a few typed fields, some with records inside, in arrays without end."""
    found = []
    for number in range(NUM_SCHEMAS):
        fields: dict[str, Any] = {
            f"id_{number}": {"type": "integer", "minimum": number, "maximum": 10_000 + number},
            f"name_{number}": {"type": "string", "maxLength": 20 + number},
            "kind": {"enum": [f"kind {i}" for i in range(2 + number % 7)]},
            "when": {"type": "string", "pattern": f"^20{number:02d}-[01][0-9]-[0-3][0-9]$"},
            "scores": {"type": "array", "items": {"type": "number"}, "maxItems": 1 + number % 5},
            "is_new": {"type": "boolean"},
        }
        kept = dict(list(fields.items())[: 3 + number % 4])
        if number % 3 == 0:
            kept["inner"] = {"type": "object", "properties": fields, "required": ["kind"], "additionalProperties": False}
        item = {"type": "object", "properties": kept, "required": list(kept), "additionalProperties": False}
        found.append({"type": "array", "items": item, "minItems": 10_000})
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", choices=("bundled", *MODELS), default="bundled")
    parser.add_argument("--models-folder", type=Path, default=MODELS_FOLDER)
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--temperature", type=float, default=1.0, help="0: the same few tokens again and again")
    parser.add_argument("--workers", type=int, help="processes that follow grammars")
    parser.add_argument("--profile", action="store_true")
    found = parser.parse_args()
    options: dict[str, Any] = {"max_num_seqs": found.rows, "max_model_len": 1024}
    folder = None
    if found.model != "bundled":
        model = MODELS[found.model]
        folder, options = str(model.folder(found.models_folder)), {**model.options, **options}
    if found.workers is not None:
        options["num_grammar_workers"] = found.workers
    if found.tokenizer is not None:
        options["tokenizer"] = str(found.tokenizer)
    llm = LLM(folder, **options) if folder else LLM(**{**options, "max_model_len": None})
    while llm.engine.prepare_more():
        pass
    grammars = [json_grammar(schema) for schema in schemas()]
    common: dict[str, Any] = {"max_tokens": found.tokens, "temperature": found.temperature, "ignore_eos": True}
    plain = [SamplingParams(seed=i, **common) for i in range(found.rows)]
    held = [SamplingParams(seed=i, grammar=grammars[i % NUM_SCHEMAS], **common) for i in range(found.rows)]
    cases = {"no grammar": (plain, True), "sampled": (held, False), "with certain tokens": (held, True)}
    rates: dict[str, list[float]] = {name: [] for name in cases}
    steps: dict[str, int] = {}
    prompts = [[id_ + row % 7 for id_ in PROMPT_IDS] for row in range(found.rows)]
    for turn in range(found.repeats + 1):  # the first makes the grammars and warms up
        for name, (sampling, hurries) in cases.items():
            counted = _prepared(llm, hurries)
            begin_s = time.perf_counter()
            done = llm.generate(prompts, sampling)
            taken_s = time.perf_counter() - begin_s
            short = [c.finish_reason for c in done if len(c.token_ids) < found.tokens]
            if short:
                raise SystemExit(f"{len(short)} texts of {name!r} ended early: {short[:3]}")
            steps[name] = counted[0]
            if turn:
                rates[name].append(found.rows * found.tokens / taken_s)
    base = statistics.median(rates["no grammar"])
    print(f"{found.rows} rows, model {found.model} on {llm.info.device}, {found.tokens} tokens each")
    for name, each in rates.items():
        middle = statistics.median(each)
        print(f"{name:<20} {middle:>10,.0f} tokens/s  {middle / base:6.3f} of no grammar  {steps[name]:>5} steps")
    for name, (sampling, hurries) in cases.items() if found.profile else ():
        counted = _prepared(llm, hurries)
        with timed_pieces() as clocks:
            llm.generate(prompts, sampling)
        print(f"{name}, with clocks:")
        clocks.report(counted[0])
    shape = {"rows": found.rows, "tokens": found.tokens, "temperature": found.temperature}
    record = {"model": found.model, "device": llm.info.device, **shape, "rates": rates}
    print(json.dumps(record))


def _prepared(llm: LLM, hurries: bool) -> list[int]:
    """Let the engine sample certain tokens or not, and count its steps from now on."""
    engine, count = llm.engine, [0]
    plain_prepare, plain_step = Grammars.prepare, type(engine).step

    def prepare(grammar: Grammar, *, hurries: bool = hurries) -> Any:
        return plain_prepare(engine._grammars, grammar, hurries=hurries)

    def step() -> Any:
        count[0] += 1
        return plain_step(engine)

    engine._grammars.prepare = lambda grammar, **_: prepare(grammar)
    engine.step = step
    return count


if __name__ == "__main__":
    main()
