"""The models that ship: whole, small, loadable by transformers as they are, and as good as their card says."""

import json
import lzma
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from minivllm.text.tokenizer import load_tokenizer

MOST_BYTES = 22_000_000


@pytest.fixture(params=["stories", "stories-draft"])
def folder(request: pytest.FixtureRequest, bundled_model: Path) -> Path:
    return bundled_model.parent / request.param


def num_parameters(folder: Path) -> int:
    with safe_open(folder / "model.safetensors", "pt") as weights:
        tensors = [weights.get_tensor(name) for name in weights.keys()]  # noqa: SIM118
    assert {t.dtype for t in tensors} == {torch.bfloat16}
    return sum(t.numel() for t in tensors)


def test_they_are_small_and_of_the_promised_form(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["tie_word_embeddings"]
    assert config["max_position_embeddings"] == 1024
    assert config["num_key_value_heads"] < config["num_attention_heads"]
    assert (folder / "model.safetensors").stat().st_size < MOST_BYTES
    assert num_parameters(folder) <= (1_000_000 if folder.name.endswith("draft") else 11_000_000)


def test_both_have_the_same_tokenizer(bundled_model: Path) -> None:
    draft = bundled_model.parent / "stories-draft"
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (bundled_model / name).read_bytes() == (draft / name).read_bytes()


def test_transformers_loads_them_and_tokenizes_alike(folder: Path) -> None:
    theirs = AutoTokenizer.from_pretrained(folder)
    ours = load_tokenizer(folder)
    messages = [{"role": "user", "content": "Tell me a story with the words tree, cat and happy."}]
    rendered = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert ours.render_chat(messages) == rendered
    for text in ("Once upon a time", rendered, "Ünïcödé 🐈\n\tand \"quotes\"", ""):
        assert ours.encode(text) == theirs.encode(text)
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    ids = torch.tensor([ours.encode("Once upon a time")])
    assert model(ids).logits.shape[-1] == ours.vocab_size == 4096


def test_the_loss_on_held_out_stories_is_what_the_card_says(bundled_model: Path, shared_data: Path) -> None:
    tokenizer = load_tokenizer(bundled_model)
    stories = []
    with lzma.open(shared_data / "tinystories" / "tinystories.jsonl.xz", "rt", encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            if row["split"] == "valid":
                stories.append(row["text"])
    stream = [t for story in stories[:60] for t in (*tokenizer.encode(story), tokenizer.eos_id)]
    windows = torch.tensor(stream[: len(stream) // 513 * 513]).view(-1, 513)
    model = AutoModelForCausalLM.from_pretrained(bundled_model, dtype=torch.float32).eval()
    with torch.inference_mode():
        losses = [
            torch.nn.functional.cross_entropy(model(w[None, :-1]).logits[0], w[1:]).item() for w in windows
        ]
    assert sum(losses) / len(losses) < 1.75  # the whole split: 1.635; sixty stories spread around it
