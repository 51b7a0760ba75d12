"""Checkpoints in every form they come in, and every way in which they can be broken."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from minivllm.errors import BrokenModelFolder, UnsupportedModel
from minivllm.models.hf_config import HFConfig
from minivllm.models.registry import ARCHITECTURES, read_model
from minivllm.runner import loader
from minivllm.runner.loader import RandomTensor, Staging, checkpoint_dtype, weight_files

PROMPT = [5, 9, 100, 42, 7, 7, 180]


def text_of(make_driver: Any, folder: Path, **options: Any) -> tuple[list[int], torch.Tensor]:
    seq = make_driver(model=str(folder), **options).generate([PROMPT], 8)[0]
    return seq.tokens, torch.stack(seq.logits)


@pytest.fixture
def copied(tiny_model: Any, tmp_path: Path) -> Any:
    """``copied(case)`` -> a copy of a model's folder that may be broken."""

    def get(case: str) -> Path:
        return Path(shutil.copytree(tiny_model(case)[0], tmp_path / case))

    return get


def change(folder: Path, edit: Any) -> None:
    """Rewrite the one weight file after ``edit(tensors)``."""
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def test_sharded_equals_single(tiny_model: Any, tiny_models: Any, tmp_path: Path, make_driver: Any) -> None:
    single, _ = tiny_model("llama-gqa")
    tiny_models.save_model("llama-gqa", tmp_path, max_shard_size="60KB")
    assert len(weight_files(tmp_path)) > 3 and not (tmp_path / "model.safetensors").exists()
    (tmp_path / "consolidated.safetensors").write_bytes(b"not for us")  # some repositories keep another format beside it
    tokens, logits = text_of(make_driver, single)
    other_tokens, other_logits = text_of(make_driver, tmp_path)
    assert tokens == other_tokens and torch.equal(logits, other_logits)


def test_gpt2_as_the_hub_has_it(copied: Any, tiny_model: Any, make_driver: Any) -> None:
    """No ``transformer.`` before the names, causal masks saved as tensors, a pickle beside the safetensors."""
    folder = copied("gpt2")

    def as_on_the_hub(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)
        for i in range(3):
            tensors[f"h.{i}.attn.bias"] = torch.ones(1, 1, 256, 256)
            tensors[f"h.{i}.attn.masked_bias"] = torch.tensor(-1e4)

    change(folder, as_on_the_hub)
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch ran'\ntR.")
    expected, found = text_of(make_driver, tiny_model("gpt2")[0]), text_of(make_driver, folder)
    assert expected[0] == found[0] and torch.equal(expected[1], found[1])


def test_tied_checkpoint_may_repeat_its_table(copied: Any, make_driver: Any) -> None:
    folder = copied("llama-mha-tied")
    change(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    text_of(make_driver, folder)


def drop(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["model.layers.1.mlp.up_proj.weight"]


def add(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.1.mlp.extra.weight"] = torch.zeros(2)


def reshape(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.1.self_attn.k_proj.weight"] = torch.zeros(16, 64)


@pytest.mark.parametrize(
    ("edit", "match"),
    [
        (drop, r"lacks 1 tensors \(model.layers.1.mlp.up_proj.weight\)"),
        (add, r"unexpected 1 tensors \(model.layers.1.mlp.extra.weight\)"),
        (reshape, r"k_proj.weight has shape \(16, 64\) where config.json leads to \(32, 64\)"),
    ],
)
def test_every_tensor_is_accounted_for(edit: Any, match: str, copied: Any, make_driver: Any) -> None:
    folder = copied("llama-gqa")
    change(folder, edit)
    with pytest.raises(BrokenModelFolder, match=match):
        make_driver(model=str(folder))


def test_fused_tensor_of_wrong_length(copied: Any, make_driver: Any) -> None:
    folder = copied("gpt2")
    change(folder, lambda t: t.update({"transformer.h.0.attn.c_attn.bias": torch.zeros(200)}))
    with pytest.raises(BrokenModelFolder, match=r"c_attn\.bias has 200 rows where config.json leads to 192"):
        make_driver(model=str(folder))


@pytest.mark.parametrize("keep", [0, 6, 500, 60_000])
def test_truncated_file(keep: int, copied: Any, make_driver: Any) -> None:
    folder = copied("llama-gqa")
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(BrokenModelFolder) as error:
        make_driver(model=str(folder))
    assert str(error.value).count(". ") == 0  # one sentence


def test_dtype_of_a_checkpoint(tmp_path: Path) -> None:
    for dtype in ("float32", "bfloat16", "float16"):
        save_file({"a": torch.zeros(3, dtype=getattr(torch, dtype))}, tmp_path / "model.safetensors")
        assert checkpoint_dtype(tmp_path) == dtype
    (tmp_path / "model.safetensors").write_bytes(b"\x05\0\0\0\0\0\0\0[1,2]")
    with pytest.raises(BrokenModelFolder):
        checkpoint_dtype(tmp_path)


def test_dummy_weights(copied: Any, make_driver: Any) -> None:
    """Seeded, whole, finite, varied; and no weight file is needed."""
    for case in ("gpt2", "llama-gqa", "llama-mha-tied", "qwen3-mha-tied-bias"):
        folder = copied(case)
        (folder / "model.safetensors").unlink()
        options = {"load_format": "dummy", "model": str(folder)}
        first, again, other = (make_driver(**options, seed=s).generate([PROMPT], 64)[0] for s in (1, 1, 2))
        assert first.tokens == again.tokens != other.tokens
        logits = torch.stack(first.logits)
        assert logits.isfinite().all() and logits.std() > 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(7,), (1024, 3), (2500, 5)])
def test_random_numbers_are_the_same_for_every_slice(triton_device: Any, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """In whatever pieces they are read, on the device where they are wanted and in its precision."""
    source = RandomTensor(shape, 3, 1.0, 0.5, dtype, triton_device)
    whole = source.read()
    assert whole.shape == shape and whole.dtype == dtype and whole.device.type == triton_device.type
    assert whole.isfinite().all() and whole.unique().numel() > 0.3 * min(whole.numel(), 1000)
    assert not torch.equal(whole, RandomTensor(shape, 4, 1.0, 0.5, dtype, triton_device).read())
    for start, stop in ((0, 1), (1, shape[0]), (1000, 1030), (2047, 2500)):
        rows = slice(min(start, shape[0]), min(stop, shape[0]))
        if rows.start < rows.stop:
            assert torch.equal(source.read(rows), whole[rows])
    if len(shape) == 2:
        assert torch.equal(source.read(slice(1, 900), slice(1, 3)), whole[1:900, 1:3])
        means = (whole.double().mean() - 1.0).abs(), (whole.double().std() - 0.5).abs()
        assert max(means) < 0.05


def test_random_numbers_on_a_cpu_stay_what_they_were() -> None:
    """A model of dummy weights says the same in every version: from seeded blocks of float32, rounded afterwards."""
    drawn = RandomTensor((2, 3), 5, 0.0, 0.3, torch.float32, torch.device("cpu")).read()
    expected = torch.empty((2, 3)).normal_(0.0, 0.3, generator=torch.Generator().manual_seed(5 * 1_000_003))
    assert torch.equal(drawn, expected)


class StagingInMemory:
    """Stands for ``Staging`` where there is no GPU, and counts."""

    def __init__(self) -> None:
        self.num_sent = 0

    def send(self, piece: torch.Tensor) -> torch.Tensor:
        self.num_sent += 1
        return piece.clone()


@pytest.mark.parametrize("case", ["gpt2", "llama-gqa"])
def test_files_that_stay_open_give_the_same_weights(
    case: str, tiny_model: Any, tiny_models: Any, tmp_path: Path, make_driver: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The way to a GPU, but for its copies: transposed and fused tensors, several files."""
    tiny_models.save_model(case, tmp_path, max_shard_size="60KB")
    expected = text_of(make_driver, tiny_model(case)[0])
    staging = StagingInMemory()
    monkeypatch.setattr(loader, "make_staging", lambda device: staging)
    found = text_of(make_driver, tmp_path)
    assert staging.num_sent > 10
    assert expected[0] == found[0] and torch.equal(expected[1], found[1])


def test_pieces_through_pinned_pages(triton_device: Any) -> None:
    """Of every size and layout, more of them than there are pages, one larger than a page."""
    if triton_device.type != "cuda":
        pytest.skip("pinned memory needs a GPU")
    staging = Staging(triton_device)
    whole = torch.randn(3000, 2000)
    cut = (whole[:7], whole[5:2000].bfloat16(), whole[:900, 3:1700], whole.t()[:1500, 1:1000], whole[0])
    pieces = [whole, *cut, *whole[:64].split(8)]
    sent = [staging.send(piece) for piece in pieces]
    assert all(torch.equal(a.cpu(), b) for a, b in zip(sent, pieces, strict=True))


# ------------------------------------------------------------------------------------------------------------ configs


BASE = {
    "architectures": ["LlamaForCausalLM"], "vocab_size": 99, "hidden_size": 64, "intermediate_size": 96,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096,
}  # fmt: skip


def spec_of(generation: dict[str, Any] | None = None, **changes: Any) -> Any:
    return read_model(HFConfig({**BASE, **changes}, generation)).spec


def test_old_and_new_spelling_of_rope() -> None:
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 1024}
    old = spec_of(rope_theta=5e5, rope_scaling={**scaling, "type": "llama3"})
    new = spec_of(rope_parameters={**scaling, "rope_type": "llama3", "rope_theta": 5e5})
    assert old.rope == new.rope and old.rope.kind == "llama3" and old.rope.theta == 5e5
    assert old.max_positions == 4096
    assert spec_of(rope_theta=5e5, rope_scaling=None).rope.kind == "default"
    assert spec_of().rope.theta == 10000.0


def test_stretched_contexts() -> None:
    assert spec_of(rope_scaling={"type": "linear", "factor": 2.0}).max_positions == 8192
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}
    assert spec_of(rope_parameters=yarn).max_positions == 16384
    dynamic = spec_of(rope_scaling={"type": "dynamic", "factor": 2.0})
    assert dynamic.max_positions == 4096 and "4096" in dynamic.notes[0]


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"rope_parameters": {"rope_type": "longrope", "factor": 2.0}}, "longrope"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "between kinds of layers"),
        ({"hidden_act": "xielu"}, "xielu"),
        ({"num_key_value_heads": 3}, "4 attention heads"),
        ({"architectures": ["MambaForCausalLM"]}, "MambaForCausalLM is not served; served are .*LlamaForCausalLM"),
        ({"architectures": ["Qwen3ForCausalLM"], "use_sliding_window": True, "layer_types": ["chunked_attention"] * 2},
         "layer_types"),
        ({"architectures": ["GPT2LMHeadModel"], "scale_attn_by_inverse_layer_idx": True},
         "scale_attn_by_inverse_layer_idx"),
    ],
)  # fmt: skip
def test_what_is_not_served_is_named(changes: dict[str, Any], match: str) -> None:
    with pytest.raises(UnsupportedModel, match=match):
        spec_of(**changes)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"vocab_size": None}, "no vocab_size"),
        ({"hidden_size": "64"}, "hidden_size must be a whole number over 0, not '64'"),
        ({"hidden_size": True}, "hidden_size"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"rms_norm_eps": "x"}, "rms_norm_eps must be a number"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings must be true or false"),
        ({"hidden_act": 3}, "hidden_act must be a text"),
        ({"eos_token_id": "</s>"}, "eos_token_id"),
        ({"architectures": None}, "architectures"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 2.0}}, "low_freq_factor"),
    ],
)
def test_broken_configs_name_the_field(changes: dict[str, Any], match: str) -> None:
    with pytest.raises(BrokenModelFolder, match=match):
        spec_of(**changes)


def test_end_tokens_and_precision() -> None:
    assert spec_of(eos_token_id=7).eos_ids == (7,)
    assert spec_of(generation={"eos_token_id": [3, 5, 3]}, eos_token_id=7).eos_ids == (3, 5)
    assert spec_of().eos_ids == ()
    assert spec_of(torch_dtype="bfloat16").dtype == "bfloat16" and spec_of(dtype="float16").dtype == "float16"


def test_windows_by_layer() -> None:
    qwen = {"architectures": ["Qwen2ForCausalLM"], "sliding_window": 8, "num_hidden_layers": 4}
    assert spec_of(**qwen).windows == (None,) * 4
    assert spec_of(**qwen, use_sliding_window=True, max_window_layers=3).windows == (None, None, None, 8)
    kinds = ["full_attention", "sliding_attention"] * 2
    assert spec_of(**qwen, use_sliding_window=True, layer_types=kinds).windows == (None, 8, None, 8)
    assert spec_of(architectures=["MistralForCausalLM"], sliding_window=32).windows == (32, 32)
    assert spec_of(architectures=["MistralForCausalLM"], sliding_window=None).windows == (None, None)


def test_every_architecture_can_be_imported() -> None:
    for name in ARCHITECTURES:
        with pytest.raises(BrokenModelFolder, match="which this architecture needs"):
            read_model(HFConfig({"architectures": [name]}))


def test_config_files_that_are_no_config(tmp_path: Path) -> None:
    with pytest.raises(BrokenModelFolder, match=r"has no config\.json"):
        HFConfig.read(tmp_path)
    for text in ("{", "[]", "\xff"):
        (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
        with pytest.raises(BrokenModelFolder):
            HFConfig.read(tmp_path)
