"""Layers split between ranks: the slices make up the whole, and ranks together compute what one computes."""

import threading
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from minivllm.attention.base import AttnMeta, AttnNeed, KVLayer
from minivllm.attention.torch_sdpa import TorchAttention
from minivllm.kernels.ops import reference_ops
from minivllm.layers.embedding import VocabTable
from minivllm.layers.linear import column_linear, head_share, qkv_linear, row_linear
from minivllm.layers.rope import RopeSpec
from minivllm.layers.setup import Setup
from minivllm.layers.source import RowRange, Transposed
from minivllm.models.architectures.llama import llama_names
from minivllm.models.decoder import Decoder, ForwardBatch
from minivllm.models.spec import Blueprint, ModelSpec
from minivllm.parallel.comm import SoloComm
from minivllm.quant.base import linear_method
from minivllm.runner.kv_cache import allocate
from minivllm.runner.loader import load_dummy

CPU = torch.device("cpu")
NEED = AttnNeed(8, 2, 8, (None,), 16, torch.float32, torch.float32, CPU, False)
SPEC = ModelSpec(
    architecture="LlamaForCausalLM", vocab_size=101, hidden_size=32, intermediate_size=48, num_layers=2, num_heads=8,
    num_kv_heads=2, head_dim=8, max_positions=64, norm="rms", norm_eps=1e-5, rope=RopeSpec(8, 10000.0), activation="silu",
    gated_mlp=True, qkv_bias=True, out_bias=True, mlp_bias=True, qk_norm=True, tied_embeddings=False, windows=(None, None),
    bos_id=None, eos_ids=(), dtype="float32",
)  # fmt: skip


class Held:
    """A tensor in memory as a source that counts what is read."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor, self.num_read = tensor, 0

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    def read(self, rows: slice = slice(None), cols: slice = slice(None)) -> torch.Tensor:
        found = self.tensor[rows] if self.tensor.ndim == 1 else self.tensor[rows, cols]
        self.num_read += found.numel()
        return found


class ThreadComm:
    """Ranks that are threads of this process."""

    def __init__(self, rank: int, world: int, barrier: threading.Barrier, board: dict[int, torch.Tensor]) -> None:
        self.rank, self.world, self.barrier, self.board = rank, world, barrier, board

    def _exchange(self, x: torch.Tensor) -> list[torch.Tensor]:
        self.board[self.rank] = x
        self.barrier.wait(20)
        found = [self.board[r] for r in range(self.world)]
        self.barrier.wait(20)
        return found

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack(self._exchange(x)).sum(0)

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat(self._exchange(x), dim=-1)


class Silent(SoloComm):
    """One of several ranks that never speaks; enough to load."""

    def __init__(self, rank: int, world: int) -> None:
        self.rank, self.world = rank, world  # type: ignore[misc]


def setup(comm: Any) -> Setup:
    ops = reference_ops()
    return Setup(ops, comm, linear_method("none"), TorchAttention(NEED, ops), torch.float32, CPU)


def numbers(*shape: int) -> torch.Tensor:
    return torch.arange(int(np.prod(shape)), dtype=torch.float32).reshape(shape)


def test_two_ranks_slices_make_up_the_whole() -> None:
    q, k, v = numbers(64, 32), numbers(16, 32) + 5000, numbers(16, 32) + 9000
    parts = []
    for rank in range(2):
        layer = qkv_linear(setup(Silent(rank, 2)), 32, (8, 2), 8, bias=True)
        for name, tensor in (("q", q), ("k", k), ("v", v)):
            assert layer.shape(name, "weight") == tuple(tensor.shape) and layer.shape(name, "bias") == (len(tensor),)
            source = Held(tensor)
            layer.load(name, "weight", source)
            assert source.num_read == tensor.numel() // 2  # a rank never reads what it does not keep
            layer.load(name, "bias", Held(tensor[:, 0]))
        parts.append(layer)
    weights = [p.get_parameter("weight").split([32, 8, 8]) for p in parts]
    for i, whole in enumerate((q, k, v)):
        assert torch.equal(torch.cat([w[i] for w in weights]), whole)
    biases = [p.get_parameter("bias").split([32, 8, 8]) for p in parts]
    assert torch.equal(torch.cat([b[1] for b in biases]), k[:, 0])


def test_kv_heads_are_kept_by_several_ranks_when_there_are_fewer() -> None:
    k = numbers(16, 32)
    for rank in range(4):
        layer = qkv_linear(setup(Silent(rank, 4)), 32, (8, 2), 8, bias=False)
        layer.load("k", "weight", Held(k))
        own = k[:8] if rank < 2 else k[8:]  # ranks 0 and 1 have query heads 0-3, which read KV head 0
        assert torch.equal(layer.get_parameter("weight")[16:24], own)
    assert head_share(8, 2, Silent(0, 4)).num_kv_heads == 1


def test_columns_rows_and_tables() -> None:
    up, gate, down, table = numbers(48, 32), numbers(48, 32) + 9000, numbers(32, 48), numbers(101, 32)
    columns, rows, tables = [], [], []
    for rank in range(2):
        both = column_linear(setup(Silent(rank, 2)), 32, (("gate", 48), ("up", 48)), bias=False)
        both.load("gate", "weight", Held(gate))
        both.load("up", "weight", Held(up))
        columns.append(both.get_parameter("weight"))
        half = row_linear(setup(Silent(rank, 2)), 48, 32, bias=False)
        half.load("", "weight", Held(down))
        rows.append(half.get_parameter("weight"))
        vocab = VocabTable(setup(Silent(rank, 2)), 101, 32)
        vocab.load("", "weight", Held(table))
        tables.append(vocab.get_parameter("weight"))
    assert torch.equal(torch.cat([c[:24] for c in columns]), gate) and torch.equal(torch.cat([c[24:] for c in columns]), up)
    assert torch.equal(torch.cat(rows, dim=1), down)
    assert torch.equal(torch.cat(tables)[:101], table) and not torch.cat(tables)[101:].any()


def test_sources_of_other_forms() -> None:
    fused = Held(numbers(32, 96))  # [num_in, num_out] as GPT-2 stores it, q, k and v side by side
    k = RowRange(Transposed(fused), 32, 64)
    assert k.shape == (32, 32)
    assert torch.equal(k.read(slice(16, 32), slice(0, 8)), fused.tensor.t()[48:64, 0:8])
    assert torch.equal(k.read(), fused.tensor.t()[32:64])
    assert RowRange(Held(numbers(40)), 32, 64).shape == (8,)  # too short: the shape says so


def test_what_cannot_be_shared_is_refused() -> None:
    with pytest.raises(ValueError, match="47 outputs"):
        column_linear(setup(Silent(0, 2)), 32, (("up", 47),), bias=False)
    with pytest.raises(ValueError, match="8 heads"):
        qkv_linear(setup(Silent(0, 3)), 32, (8, 2), 8, bias=False)
    with pytest.raises(ValueError, match="6 ranks cannot share 4 KV heads"):
        qkv_linear(setup(Silent(0, 6)), 32, (12, 4), 8, bias=False)


def run_rank(blueprint: Blueprint, comm: Any) -> torch.Tensor:
    """Load a rank of a random model and run two rows of 9 and 4 tokens through it: logits [13, vocab]."""
    with torch.inference_mode():
        decoder = Decoder(blueprint.spec, setup(comm), 64)
        load_dummy(decoder, blueprint.names, seed=3)
        backend = TorchAttention(replace(NEED, num_kv_heads=head_share(8, 2, comm).num_kv_heads), reference_ops())
        caches: tuple[KVLayer, ...] = allocate(backend, torch.float32, 2, 3, CPU)
        at = torch.tensor([*range(9), *range(4)])
        slots = torch.cat((at[:9] + 16, at[9:] + 32))
        table = np.array([[1], [2]], dtype=np.int32)
        meta = AttnMeta(np.array([0, 9, 13]), np.array([9, 4]), np.array([0, 1]), table, 16, slots)
        batch = ForwardBatch(torch.arange(13) * 7, at, (backend.plan(meta),), torch.arange(13))
        return decoder.head(decoder.body(batch, caches))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("world", [2, 4])
def test_ranks_together_equal_one(world: int, tied: bool) -> None:
    spec = replace(SPEC, tied_embeddings=tied)
    blueprint = Blueprint(spec, llama_names(spec))
    expected = run_rank(blueprint, SoloComm())
    barrier, board = threading.Barrier(world), {}
    found: dict[int, torch.Tensor] = {}

    def work(rank: int) -> None:
        found[rank] = run_rank(blueprint, ThreadComm(rank, world, barrier, board))

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(found) == world
    for logits in found.values():
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
