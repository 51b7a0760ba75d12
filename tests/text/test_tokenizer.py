"""Loading tokenizer folders of every kind, whole and broken; ids as transformers gives them."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import models, processors

from minivllm.errors import BrokenModelFolder, InvalidRequest, UnsupportedModel
from minivllm.text.tokenizer import Tokenizer, load_tokenizer

TEXTS = ["", " ", "Hello world", "  two  spaces\n\n", "naïve 你好 😀", "<|end|>x<s>y</s><|endoftext|>"]
TEXTS += ["\x00\u2028", "a" * 3000]


def test_ids_are_those_of_transformers(folder: Path, tokenizer: Tokenizer) -> None:
    transformers = pytest.importorskip("transformers")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config.pop("tokenizer_class", None)
    hf = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), **config)
    for text in TEXTS:
        for special in (True, False):
            assert tokenizer.encode(text, special) == hf.encode(text, add_special_tokens=special)
    assert tokenizer.vocab_size == len(hf)
    assert tokenizer.bos_id == hf.bos_token_id
    assert tokenizer.eos_id == hf.eos_token_id
    assert tokenizer.special_ids >= set(hf.all_special_ids)


def test_gpt2_from_vocab_and_merges(shared_data: Path, tmp_path: Path) -> None:
    source = shared_data / "tokenizers" / "gpt2"
    if not source.is_dir():
        pytest.skip("the gpt2 tokenizer is not in the shared data")
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        shutil.copy(source / name, tmp_path / name)
    two_files, one_file = load_tokenizer(tmp_path), load_tokenizer(source)
    for case in json.loads((source / "llama_cpp_vectors.json").read_text()):
        assert two_files.encode(case["text"]) == one_file.encode(case["text"]) == case["ids"]
        assert two_files.decode(case["ids"]) == case["text"]
    assert two_files.special_ids == one_file.special_ids == {50256}
    assert two_files.bos_id == two_files.eos_id == 50256
    assert two_files.encode("a<|endoftext|>") == one_file.encode("a<|endoftext|>")

    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "Qwen2Tokenizer"}')
    with pytest.raises(UnsupportedModel, match=r"Qwen2Tokenizer.*add its tokenizer.json"):
        load_tokenizer(tmp_path)


def test_two_files_without_shared_data(trained: Path, tmp_path: Path) -> None:
    model = json.loads((trained / "tokenizer.json").read_text())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    (tmp_path / "merges.txt").write_text("\n".join(" ".join(m) for m in model["merges"]))
    (tmp_path / "special_tokens_map.json").write_text('{"eos_token": {"content": "<|end|>"}}')
    two_files, one_file = load_tokenizer(tmp_path), load_tokenizer(trained)
    for text in ("Once upon a time", "  你好 😀\n", "x<|end|>"):
        assert two_files.encode(text) == one_file.encode(text)
    assert two_files.eos_id == one_file.eos_id in two_files.special_ids


def test_added_tokens_of_the_side_files(trained: Path, tmp_path: Path, save: Callable[..., Path]) -> None:
    backend = tokenizers.Tokenizer.from_file(str(trained / "tokenizer.json"))
    size = backend.get_vocab_size()
    added: dict[str, Any] = {
        str(size): {"content": "<tool>", "special": True},
        str(size + 1): {"content": "<x>", "special": False},
    }
    loaded = load_tokenizer(save(tmp_path / "a", backend, added_tokens_decoder=added))
    assert loaded.encode("<tool><x>") == [size, size + 1]
    assert size in loaded.special_ids and size + 1 not in loaded.special_ids
    assert loaded.decode([size, size + 1]) == "<x>"
    assert loaded.decode([size, size + 1], skip_special_tokens=False) == "<tool><x>"

    folder = save(tmp_path / "b", backend, eos_token="<tool>")
    (folder / "added_tokens.json").write_text(json.dumps({"<tool>": size}))
    assert load_tokenizer(folder).eos_id == size in load_tokenizer(folder).special_ids

    with pytest.raises(BrokenModelFolder, match="disagree about the id"):
        load_tokenizer(save(tmp_path / "c", backend, added_tokens_decoder={"7": {"content": "<tool>"}}))
    with pytest.raises(BrokenModelFolder, match="added tokens"):
        load_tokenizer(save(tmp_path / "d", backend, added_tokens_decoder={"7": 5}))


def test_a_named_token_that_the_vocabulary_lacks_gets_no_id(trained: Path, tmp_path: Path, save: Callable[..., Path]) -> None:
    backend = tokenizers.Tokenizer.from_file(str(trained / "tokenizer.json"))
    loaded = load_tokenizer(save(tmp_path, backend, bos_token="[BOS]", add_bos_token=True))
    assert loaded.bos_id is None
    assert loaded.vocab_size == backend.get_vocab_size()
    assert loaded.encode("a") == loaded.encode("a", add_special_tokens=False)


def test_stated_bos_and_eos_beat_the_post_processor(trained: Path, tmp_path: Path, save: Callable[..., Path]) -> None:
    backend = tokenizers.Tokenizer.from_file(str(trained / "tokenizer.json"))
    backend.post_processor = processors.TemplateProcessing(single="<|user|> $A", special_tokens=[("<|user|>", 1)])
    backend.enable_truncation(3)
    backend.enable_padding(length=30)
    text = "Once upon a time"
    names = {"bos_token": "<|end|>", "eos_token": "<|user|>"}
    plain = load_tokenizer(save(tmp_path / "a", backend, **names))
    ids = plain.encode(text, add_special_tokens=False)
    assert len(ids) > 3  # neither cut nor padded
    assert plain.encode(text) == [1, *ids]
    for bos in (True, False):
        for eos in (True, False):
            loaded = load_tokenizer(save(tmp_path / "b", backend, **names, add_bos_token=bos, add_eos_token=eos))
            assert loaded.encode(text) == [0] * bos + ids + [1] * eos
            assert loaded.encode("") == [0] * bos + [1] * eos


@pytest.mark.parametrize("text", ["\ud800", "abc\udfffdef", "\ud83d\ude00"])
def test_lone_surrogates_are_refused(trained_tokenizer: Tokenizer, text: str) -> None:
    with pytest.raises(InvalidRequest, match="lone surrogate") as caught:
        trained_tokenizer.encode(text)
    assert caught.value.status == 400
    assert str(caught.value).isascii()  # the error itself can be sent


def test_ids_that_cannot_be(trained_tokenizer: Tokenizer) -> None:
    assert trained_tokenizer.decode([10**6]) == ""
    for bad in (-1, 2**32, 10**30):
        with pytest.raises(InvalidRequest, match="not a token id"):
            trained_tokenizer.decode([bad])


def test_broken_folders(tmp_path: Path, trained: Path) -> None:
    with pytest.raises(BrokenModelFolder, match=r"no tokenizer.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"\x0a")
    with pytest.raises(UnsupportedModel, match=r"SentencePiece.*save_pretrained"):
        load_tokenizer(tmp_path)
    (tmp_path / "vocab.json").write_text("{")
    (tmp_path / "merges.txt").write_text("")
    with pytest.raises(BrokenModelFolder, match="cannot be read"):
        load_tokenizer(tmp_path)
    whole = (trained / "tokenizer.json").read_bytes()
    for broken in (b"", b"[]", whole[: len(whole) // 2], b"\xff\xfe"):
        (tmp_path / "tokenizer.json").write_bytes(broken)
        with pytest.raises(BrokenModelFolder, match="fetch the model again"):
            load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes(whole)
    for name in ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"):
        for broken in (b"{", b"[]", b"\xff"):
            (tmp_path / name).write_bytes(broken)
            with pytest.raises(BrokenModelFolder, match=name):
                load_tokenizer(tmp_path)
        (tmp_path / name).unlink()
    word_level = tokenizers.Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    word_level.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UnsupportedModel, match="decoder"):
        load_tokenizer(tmp_path)


def test_needs_neither_torch_nor_transformers(repo: Path) -> None:
    code = (
        "import sys, minivllm.text.outputs, minivllm.text.chat\n"
        "sys.exit([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules] or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=repo, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
