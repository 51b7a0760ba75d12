"""What is settled at start: memory, precision, device, and the notes that say why."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from minivllm.config import make_config
from minivllm.errors import InvalidOption, NotEnoughMemory
from minivllm.runner import sizing
from minivllm.runner.kv_cache import KVShape

CPU = torch.device("cpu")
SHAPE = KVShape(16, 2, 16, torch.float32)
BLOCK = 2 * 3 * 16 * 2 * 16 * 4  # K and V, 3 layers, bytes


@pytest.fixture
def spec(tiny_model: Any) -> Any:
    from minivllm.models.hf_config import HFConfig
    from minivllm.models.registry import read_model

    return read_model(HFConfig.read(tiny_model("llama-gqa")[0])).spec


@pytest.fixture
def free_memory(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Set what the machine has free."""

    def put(free: int) -> None:
        monkeypatch.setattr(sizing, "memory_bytes", lambda device: (free, 2 * free))

    return put


def settle(spec: Any, weights: int = 1000, **options: Any) -> sizing.Sizes:
    return sizing.settle(make_config(**options), spec, SHAPE, sizing.FixedMemory(weights, torch.float32, 0), CPU)


def test_a_block_has_this_many_bytes() -> None:
    assert SHAPE.block_bytes(3) == BLOCK


def test_explicit_sizes(spec: Any) -> None:
    assert settle(spec, num_gpu_blocks_override=40).num_blocks == 40
    found = settle(spec, kv_cache_memory_bytes=50 * BLOCK + 5)
    assert found.num_blocks == 50 and found.kv_bytes == 50 * BLOCK


def test_share_of_free_memory(spec: Any, free_memory: Any) -> None:
    work = sizing.workspace_bytes(make_config(max_num_seqs=1000), spec, torch.float32, 256)
    free_memory(10 * (work + 1000 + 100 * BLOCK))
    assert settle(spec, max_num_seqs=1000).num_blocks == int(0.4 * 10 * (work + 1000 + 100 * BLOCK) - work - 1000) // BLOCK
    assert settle(spec, max_num_seqs=1000, gpu_memory_utilization=0.1).num_blocks in (99, 100)


def test_never_more_than_can_be_used(spec: Any, free_memory: Any) -> None:
    free_memory(2**40)
    assert settle(spec, max_num_seqs=3).num_blocks == 3 * 256 // 16 + 1
    longer = dataclasses.replace(spec, max_positions=10**7)
    assert settle(longer, max_num_batched_tokens=16).kv_bytes <= sizing.CPU_CACHE_LIMIT_BYTES
    assert settle(longer, max_num_batched_tokens=16, gpu_memory_utilization=0.5).kv_bytes > sizing.CPU_CACHE_LIMIT_BYTES


def test_context_that_does_not_fit(spec: Any) -> None:
    with pytest.raises(NotEnoughMemory, match=r"sequence of 200 tokens needs .* GiB .* hold 144 tokens.*lower --max-model-len"):
        settle(spec, num_gpu_blocks_override=10, max_model_len=200)
    assert settle(spec, num_gpu_blocks_override=10, max_model_len=144).max_model_len == 144
    capped = settle(spec, num_gpu_blocks_override=10)
    assert capped.max_model_len == 144 and "capped at 144 of the model's 256" in capped.notes[0]
    with pytest.raises(InvalidOption, match="positions end at 256"):
        settle(spec, max_model_len=257)


def test_model_that_does_not_fit(spec: Any, free_memory: Any) -> None:
    free_memory(10**9)
    with pytest.raises(NotEnoughMemory, match="GiB are available; free memory"):
        settle(spec, weights=4 * 10**8)
    with pytest.raises(NotEnoughMemory):
        settle(spec, kv_cache_memory_bytes=10**9)


def test_free_memory_is_read() -> None:
    free, total = sizing.memory_bytes(CPU)
    assert 2**26 < free <= total


def test_info_and_notes(tiny_model: Any, make_driver: Any) -> None:
    folder, model = tiny_model("llama-gqa")
    assert any("native backend, other ops on the native kernels" in note for note in make_driver(model=str(folder)).info.notes)
    info = make_driver(model=str(folder), cpu_kernels="torch").info
    assert info.weights_bytes == 4 * sum(p.numel() for p in model.parameters())
    assert (info.max_model_len, info.vocab_size, info.num_blocks, info.block_size) == (256, 199, 200, 16)
    assert (info.device, info.dtype, info.eos_token_ids) == ("cpu", "float32", (2,))
    assert any("torch-sdpa" in note for note in info.notes)
    invariant = make_driver(model=str(folder), batch_invariant=True, cpu_kernels="torch").info
    assert any("passed over" in note for note in invariant.notes)
    assert info.workspace_bytes > 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_precisions(dtype: str, tiny_model: Any, make_driver: Any) -> None:
    driver = make_driver(model=str(tiny_model("llama-gqa")[0]), dtype=dtype)
    wanted = getattr(torch, dtype)
    assert {p.dtype for p in driver.runner.decoder.parameters()} == {wanted} and driver.runner.caches[0].k.dtype == wanted
    assert driver.info.dtype == dtype
    seq = driver.generate([[5, 6, 7]], 4)[0]
    assert len(seq.tokens) == 7 and seq.logits[0].dtype == torch.float32


def test_precision_of_the_checkpoint(tiny_model: Any, make_driver: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minivllm.runner.choose._cpu_flags", lambda: frozenset({"avx2"}))
    folder = Path(tiny_model("llama-gqa")[0])
    assert make_driver(model=str(folder), dtype="auto").info.dtype == "float32"
    options = {"model": str(folder), "dtype": "float16", "cpu_kernels": "torch"}
    assert any("no matrix instructions for 16-bit" in note for note in make_driver(**options).info.notes)
    monkeypatch.setattr("minivllm.runner.choose._cpu_flags", lambda: frozenset({"amx_fp16", "amx_bf16"}))
    assert not any("instructions" in n for n in make_driver(**options).info.notes)


def test_device_that_is_not_there(tiny_model: Any, make_driver: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(InvalidOption, match="--device cpu or auto"):
        make_driver(model=str(tiny_model("llama-gqa")[0]), device="cuda")


def test_invariance_that_cannot_be_kept_is_refused(tiny_model: Any, make_driver: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minivllm.runner.build.check_linear", lambda weight: False)
    with pytest.raises(InvalidOption, match="--batch-invariant cannot be kept here"):
        make_driver(model=str(tiny_model("llama-gqa")[0]), batch_invariant=True, cpu_kernels="torch")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bundled_model(dtype: str, bundled_model: Path, make_driver: Any) -> None:
    """The model that ships with the project, against transformers."""
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(bundled_model, dtype=torch.float32).eval()
    driver = make_driver(model=str(bundled_model), dtype=dtype, shuffle=1)
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(10, 4000, (n,), generator=generator).tolist() for n in (3, 40, 17)]
    allowed = 1e-4 if dtype == "float32" else 0.05
    for seq in driver.generate(prompts, 6, chunk=16):
        with torch.inference_mode():
            expected = model(torch.tensor([seq.tokens[:-1]])).logits[0, -6:]
        difference = (torch.stack(seq.logits) - expected).abs().amax(-1) / expected.abs().amax(-1)
        assert float(difference.max()) < allowed
