"""Every exercise can be solved, and its tests see a solution that is wrong."""

import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

# The mistake that each exercise is about.
WRONG = {
    "00_count": """
def computed(num_prompt, num_output, keeps_cache):
    return num_prompt + num_output if keeps_cache else sum(num_prompt + i for i in range(num_output))
""",
    "01_cache": """
import numpy as np
class Head:
    def __init__(self):
        self.keys, self.values = [], []
    def step(self, q, k, v):
        self.keys.append(k), self.values.append(v)
        scores = np.stack(self.keys) @ q
        weights = np.exp(scores - scores.max())
        return weights / weights.sum() @ np.stack(self.values)
""",
    "02_rectangle": """
def rectangle(prompts):
    width = max(map(len, prompts))
    missing = [width - len(p) for p in prompts]
    ids = [[0] * m + p for m, p in zip(missing, prompts)]
    return ids, [list(range(width))] * len(ids), [[False] * m + [True] * (width - m) for m in missing]
""",
    "03_batcher": """
def schedule(requests, num_rows):
    steps, step = [], 0
    for at in range(0, len(requests), num_rows):
        batch = requests[at : at + num_rows]
        steps += [list(range(step, step + wants)) for _, wants in batch]
        step += max(wants for _, wants in batch)
    return steps
""",
    "04_slots": """
def slots(table, start, count, block_size):
    return [sorted(table)[at // block_size] * block_size + at % block_size for at in range(start, start + count)]
def gather(cache, table, length):
    return cache[sorted(table)].reshape(-1, cache.shape[-1])[:length]
""",
    "05_prefix": """
def hits(prompt, known, block_size):
    def common(text):
        return next((i for i, (a, b) in enumerate(zip(prompt, text)) if a != b), min(len(prompt), len(text)))
    return max((common(text) // block_size * block_size for text in known), default=0)
""",
    "06_chunks": """
def plan(num_decodes, prompts_left, budget):
    chunks = []
    for left in prompts_left:
        chunks.append(min(left, budget))
        budget -= chunks[-1]
    return chunks
""",
    "07_sizes": """
def sizes(steps, most):
    often = sorted(steps, key=lambda rows: -steps[rows])[: most - 1]
    return sorted({*often, max(steps)})
""",
    "08_overlap": """
def ends(plan_ms, device_ms, num_steps, ahead):
    return [(i + 1) * (max(plan_ms, device_ms) if ahead else plan_ms + device_ms) for i in range(num_steps)]
""",
    "09_policy": """
from minivllm.scheduler.policy import FirstComeFirstServed
class ShortestFirst(FirstComeFirstServed):
    def claim(self, request):
        return (request.spec.sampling.max_tokens, request.uid)
""",
    "10_sampling": """
import numpy as np
def keep(logits, min_p, top_k, top_p):
    ids = np.argsort(-logits)
    chances = np.exp(logits[ids]) / np.exp(logits).sum()
    kept = (np.cumsum(chances) - chances < top_p) & (chances >= min_p * chances[0])
    return ids[kept][: top_k or None].tolist()
def draw(logits, u):
    return int(np.argmax(logits - np.log(-np.log(u))))
""",
    "11_memory": """
def kv_bytes(config, number_bytes):
    return 2 * config["num_hidden_layers"] * config["hidden_size"] * number_bytes
def most_texts(memory_bytes, tokens, block_size, config, number_bytes):
    return memory_bytes // (tokens * kv_bytes(config, number_bytes))
""",
    "12_victim": """
def victim(candidates):
    return min(candidates, key=lambda request: request.computed)
""",
    "13_trace": """
def where(records, name):
    rows = [row for record in records for row in record.rows if row.id == name]
    kinds = [row.kind for row in rows]
    found = {"prefill": kinds.count("prefill"), "decode": kinds.count("decode")}
    return {"queued": 0, **found, "away": 0, "recomputed": 0, "why": {}}
""",
}


def outcomes(repo: Path, solutions: Path, report: Path) -> dict[str, list[bool]]:
    """Of each exercise: which of its tests passed."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "docs/learn/exercises"]
    done = subprocess.run(
        [*command, "--solution", str(solutions), f"--junitxml={report}"],
        cwd=repo, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode in (0, 1), done.stdout + done.stderr
    found: dict[str, list[bool]] = {}
    for case in ElementTree.parse(report).iter("testcase"):
        name = case.attrib["classname"].rpartition(".test_")[2]
        passed = all(case.find(outcome) is None for outcome in ("failure", "error"))
        found.setdefault(name, []).append(passed)
    return found


@pytest.mark.slow
def test_the_solutions_are_right(repo: Path, tmp_path: Path) -> None:
    found = outcomes(repo, repo / "docs" / "learn" / "exercises" / "solutions", tmp_path / "report.xml")
    assert set(found) == set(WRONG)
    assert [name for name, passed in found.items() if not all(passed)] == []


@pytest.mark.slow
def test_mistakes_are_seen(repo: Path, tmp_path: Path) -> None:
    for name, code in WRONG.items():
        (tmp_path / f"{name}.py").write_text(code, encoding="utf-8")
    found = outcomes(repo, tmp_path, tmp_path / "report.xml")
    assert set(found) == set(WRONG)
    assert [name for name, passed in found.items() if all(passed)] == []


def test_an_exercise_asks_for_a_file(repo: Path) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "docs/learn/exercises/test_04_slots.py"]
    done = subprocess.run(command, cwd=repo, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "Name the file with your solution: --solution my.py" in done.stdout


def test_every_exercise_has_a_solution_and_a_mistake(repo: Path) -> None:
    folder = repo / "docs" / "learn" / "exercises"
    exercises = {file.stem.removeprefix("test_") for file in folder.glob("test_*.py")}
    assert exercises == {file.stem for file in (folder / "solutions").glob("*.py")} == set(WRONG)
