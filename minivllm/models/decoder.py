"""The one decoder: embedding, blocks of attention and MLP, final norm, head. What differs between models is in ``ModelSpec``.

It is cut in two. ``body`` runs from the embedding to the final norm over every token of a step; ``head`` gives logits only for
the rows that something is wanted of. (The head of a large vocabulary costs as much as several layers, and a prompt needs it for
its last token alone.) Everything a step needs arrives as an argument; nothing is kept between steps but the weights.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn

from minivllm.attention.base import KVLayer
from minivllm.layers.attention import Attention, AttentionSpec
from minivllm.layers.embedding import LearnedPositions, VocabTable
from minivllm.layers.mlp import GatedMLP, PlainMLP
from minivllm.layers.norm import Norm
from minivllm.layers.rope import RopeTable
from minivllm.layers.setup import Setup
from minivllm.models.spec import ModelSpec


@dataclass(frozen=True)
class ForwardBatch:
    """One step's tokens, flat, row after row. Built once by the runner, complete, never written."""

    token_ids: Tensor  # [num_tokens] int64
    positions: Tensor  # [num_tokens] int64
    plans: tuple[Any, ...]  # per KV group: the attention backend's plan of this step
    logit_rows: Tensor  # [num_logits] int64: flat places whose logits are wanted


class Block(nn.Module):
    """One layer. The residual stream passes beside it: each norm first adds what the block before gave."""

    def __init__(self, setup: Setup, spec: ModelSpec, index: int) -> None:
        super().__init__()
        self.attention_norm = Norm(setup, spec.norm, spec.hidden_size, spec.norm_eps)
        self.attention = Attention(
            setup,
            AttentionSpec(
                hidden_size=spec.hidden_size,
                num_heads=spec.num_heads,
                num_kv_heads=spec.num_kv_heads,
                head_dim=spec.head_dim,
                scale=spec.scale,
                window=spec.windows[index],
                qkv_bias=spec.qkv_bias,
                out_bias=spec.out_bias,
                qk_norm_eps=spec.norm_eps if spec.qk_norm else None,
            ),
        )
        self.mlp_norm = Norm(setup, spec.norm, spec.hidden_size, spec.norm_eps)
        mlp = GatedMLP if spec.gated_mlp else PlainMLP
        self.mlp = mlp(setup, spec.hidden_size, spec.intermediate_size, spec.activation, bias=spec.mlp_bias)

    def forward(
        self, x: Tensor, residual: Tensor | None, angles: tuple[Tensor, Tensor] | None, plan: Any, cache: KVLayer
    ) -> tuple[Tensor, Tensor]:
        """Return what this layer gives and the residual stream, both [num_tokens, hidden]; their sum is the layer's output."""
        x, residual = (self.attention_norm(x), x) if residual is None else self.attention_norm.add(x, residual)
        x = self.attention(x, angles, plan, cache)
        x, residual = self.mlp_norm.add(x, residual)
        return self.mlp(x), residual


class Decoder(nn.Module):
    """A decoder-only model on one rank. Weights are written at loading only."""

    def __init__(self, spec: ModelSpec, setup: Setup, max_model_len: int) -> None:
        """``max_model_len``: positions that the rotary table is made for."""
        super().__init__()
        self.spec = spec
        self.embedding = VocabTable(setup, spec.vocab_size, spec.hidden_size)
        self.positions = None if spec.rope else LearnedPositions(setup, spec.max_positions, spec.hidden_size)
        self.rope = RopeTable(spec.rope, max_model_len, setup.device) if spec.rope else None
        self.layers = nn.ModuleList(Block(setup, spec, i) for i in range(spec.num_layers))
        self.final_norm = Norm(setup, spec.norm, spec.hidden_size, spec.norm_eps)
        self.head_table = None if spec.tied_embeddings else VocabTable(setup, spec.vocab_size, spec.hidden_size)

    def body(self, batch: ForwardBatch, caches: Sequence[KVLayer]) -> Tensor:
        """Run every token of the step; writes its K and V into ``caches`` (one per layer). [num_tokens, hidden]."""
        x: Tensor = self.embedding(batch.token_ids)
        if self.positions is not None:
            x = x + self.positions(batch.positions)
        angles = None if self.rope is None else self.rope(batch.positions)
        residual: Tensor | None = None
        for block, cache in zip(self.layers, caches, strict=True):
            x, residual = block(x, residual, angles, batch.plans[0], cache)
        if residual is None:
            return cast(Tensor, self.final_norm(x))
        return self.final_norm.add(x, residual)[0]

    def head(self, hidden: Tensor) -> Tensor:
        """Logits of ``hidden`` [num_rows, hidden]: [num_rows, vocab_size] float32."""
        return (self.head_table or self.embedding).logits(hidden)
