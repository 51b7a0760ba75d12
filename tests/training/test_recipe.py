"""The recipe of the bundled models runs from text to folders, in its smallest size."""

import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from minivllm.text.tokenizer import load_tokenizer


@pytest.mark.slow
def test_the_smallest_run_gives_loadable_models(repo: Path, shared_data: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "training.train", "--text", str(shared_data), "--out", str(tmp_path), "--smoke"]
    done = subprocess.run(command, cwd=repo, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-2000:]
    folders = sorted(p.parent for p in tmp_path.rglob("model.safetensors") if (p.parent / "config.json").exists())
    assert {"stories", "stories-draft"} <= {f.name for f in folders}
    for folder in folders:
        if folder.name.startswith("stories"):
            assert load_tokenizer(folder).has_chat_template
            AutoModelForCausalLM.from_pretrained(folder)
    assert not [p for p in tmp_path.rglob("*") if p.suffix in (".pt", ".bin", ".pkl")]
