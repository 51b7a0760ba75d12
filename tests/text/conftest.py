"""Tokenizers for the text tests: the bundled one, small ones trained here, and (where present) public ones."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from minivllm.text.tokenizer import Tokenizer, load_tokenizer

CORPUS = [
    "Once upon a time there was a little girl who lived near the forest.",
    "naïve café, déjà vu; Ελληνικά, русский язык, 你好世界, こんにちは, 😀👍🏽🎉",
    "  def f(x):\n\treturn x  # two  spaces",
] * 20


def _byte_level() -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=["<|end|>", "<|user|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    backend.train_from_iterator(CORPUS, trainer)
    backend.add_tokens(["plain added", "emoji 😀 token", "é"])  # not special; the last is a letter of the byte alphabet
    return backend


def _sentencepiece(decoder: decoders.Decoder) -> tokenizers.Tokenizer:
    """A BPE with byte fallback as conversions of SentencePiece models write it."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2}
    for byte in range(256):
        vocab[f"<0x{byte:02X}>"] = len(vocab)
    for piece in ["▁", "▁▁", "▁Once", "▁up", "on", "é", "你", "a", "b", "▁a", "<0xZZ>", "😀", ".", "\n"]:
        vocab[piece] = len(vocab)
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoder
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return backend


@pytest.fixture(scope="session")
def save() -> Callable[..., Path]:
    """Write a tokenizer as a model folder."""

    def write(folder: Path, backend: tokenizers.Tokenizer | None, **config: object) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        if backend is not None:
            backend.save(str(folder / "tokenizer.json"))
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        return folder

    return write


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, save: Callable[..., Path]) -> Path:
    """A folder with a small byte-level tokenizer."""
    return save(tmp_path_factory.mktemp("trained"), _byte_level(), eos_token="<|end|>")


KINDS = ["bundled", "trained", "llama", "gemma", "metaspace", "gpt2", "mistral-v1", "mistral-v3"]


@pytest.fixture(scope="session", params=KINDS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, save: Callable[..., Path]) -> Path:
    """Each tokenizer's folder in turn."""
    kind: str = request.param
    if kind == "bundled":
        path: Path = request.getfixturevalue("bundled_model")
        if not (path / "tokenizer.json").is_file():
            pytest.skip("the bundled tokenizer is not there")
        return path
    if kind == "trained":
        trained_folder: Path = request.getfixturevalue("trained")
        return trained_folder
    if kind in ("gpt2", "mistral-v1", "mistral-v3"):
        shared: Path = request.getfixturevalue("shared_data") / "tokenizers" / kind
        if not shared.is_dir():
            pytest.skip(f"the {kind} tokenizer is not in the shared data")
        return shared
    fused = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    decoder = {
        "llama": decoders.Sequence([*fused, decoders.Strip(" ", 1, 0)]),
        "gemma": decoders.Sequence(fused),
        "metaspace": decoders.Metaspace(),
    }[kind]
    return save(tmp_path_factory.mktemp(kind), _sentencepiece(decoder), bos_token="<s>", eos_token="</s>", add_bos_token=True)


@pytest.fixture(scope="session")
def tokenizer(folder: Path) -> Tokenizer:
    """Each tokenizer in turn."""
    return load_tokenizer(folder)


@pytest.fixture(scope="session")
def library(folder: Path) -> tokenizers.Tokenizer:
    """The same one, as the library decodes with it."""
    return tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))


@pytest.fixture(scope="session")
def trained_tokenizer(trained: Path) -> Tokenizer:
    """The small byte-level tokenizer."""
    return load_tokenizer(trained)
