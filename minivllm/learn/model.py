"""The model that rungs 0 to 3 share: the engine's weights and layers, with attention written out in plain torch.

A call takes a rectangle of tokens, [rows, width], and gives for each row the logits of the token that follows its last one. It
keeps nothing between calls. What may be kept is handed back: for every layer the keys and values of all columns so far, which
the next call takes as ``past``. Whether to keep them is what rungs 0 and 1 differ in.

Rows of different lengths are padded on the *left*, so that the newest token of every row stands in the last column. ``mask``
says which columns hold a token, ``positions`` where in its own text each new token stands. Padding is two lies to undo: nobody
may look at an empty column (mask), and an empty column does not count (positions).

The engine's decoder (``models/decoder.py``) has neither rectangle nor mask: its tokens lie flat, and attention finds a row's
keys through a table of blocks.
"""

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from minivllm.attention.base import Angles, AttentionBackend
from minivllm.config import Config
from minivllm.kernels.ops import reference_ops
from minivllm.kernels.reference import rope
from minivllm.layers.attention import Attention
from minivllm.layers.setup import Setup
from minivllm.learn.arithmetic import Sizes
from minivllm.learn.meter import Meter
from minivllm.models.decoder import Block, Decoder
from minivllm.models.hf_config import HFConfig
from minivllm.models.hub import fetch_model
from minivllm.models.registry import read_model
from minivllm.parallel.comm import SoloComm
from minivllm.quant.none import PlainWeights
from minivllm.runner.choose import choose_device, choose_dtype
from minivllm.runner.loader import load_checkpoint, load_dummy

KV = list[tuple[Tensor, Tensor]]  # per layer: keys and values, both [rows, num_kv_heads, columns, head_dim]


@dataclass(frozen=True)
class Model:
    """A decoder, computed with nothing but torch."""

    decoder: Decoder
    device: torch.device
    meter: Meter

    @torch.inference_mode()
    def __call__(
        self, ids: Tensor, positions: Tensor, past: KV | None = None, mask: Tensor | None = None, *, keep: bool = True
    ) -> tuple[Tensor, KV]:
        """``ids`` and ``positions`` [rows, width], ``mask`` [rows, columns of past + width] (none: every column holds a token).
        Return logits [rows, vocab] float32 of each row's last token, and keys and values of all columns."""
        (rows, width), num_past = ids.shape, past[0][0].shape[2] if past else 0
        if mask is None:
            mask = torch.ones(rows, num_past + width, dtype=torch.bool)
        real = torch.stack((mask[:, :num_past].sum(1), mask[:, num_past:].sum(1)), dim=1).tolist()
        self.meter.call(real, num_past, width, kept=keep)
        ids, positions, mask = (t.to(self.device) for t in (ids, positions, mask))
        x = self.decoder.embedding(ids.flatten()).view(rows, width, -1)  # [rows, width, hidden]
        if self.decoder.positions is not None:
            x = x + self.decoder.positions(positions.flatten()).view(x.shape)
        angles = None if self.decoder.rope is None else self.decoder.rope(positions.flatten())
        kv: KV = []
        for i, layer in enumerate(self.decoder.layers):
            block = cast(Block, layer)
            attended, grown = _attend(block.attention, block.attention_norm(x), angles, past[i] if past else None, mask)
            kv.append(grown)
            x = x + attended
            x = x + block.mlp(block.mlp_norm(x))
        return self.decoder.head(self.decoder.final_norm(x[:, -1])), kv if keep else []


def _attend(
    layer: Attention, x: Tensor, angles: Angles | None, past: tuple[Tensor, Tensor] | None, mask: Tensor
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Attention of ``x`` [rows, width, hidden] over the past columns and these, and keys and values of them all."""
    (rows, width, _), spec = x.shape, layer.layer
    sizes = (spec.num_heads, spec.num_kv_heads, spec.num_kv_heads)
    q, k, v = layer.qkv(x).view(rows * width, -1, spec.head_dim).split(sizes, dim=1)  # [tokens, heads, head_dim]
    if layer.q_norm is not None and layer.k_norm is not None:
        q, k = layer.q_norm(q), layer.k_norm(k)
    if angles is not None:
        q, k = rope(q, *angles), rope(k, *angles)
    q, k, v = (t.reshape(rows, width, -1, spec.head_dim).transpose(1, 2) for t in (q, k, v))  # [rows, heads, width, head_dim]
    if past is not None:
        k, v = torch.cat((past[0], k), dim=2), torch.cat((past[1], v), dim=2)
    column = torch.arange(k.shape[2], device=x.device)
    own = column[-width:, None]  # the new tokens' columns
    seen = mask[:, None, :] & (column <= own)  # [rows, width, columns]: what is there, and not later than oneself
    if spec.window is not None:
        seen = seen & (column > own - spec.window)
    grouped = q.unflatten(1, (spec.num_kv_heads, -1))  # [rows, num_kv_heads, query heads of each, width, head_dim]
    scores = grouped.flatten(2, 3) @ k.transpose(-1, -2) * spec.scale  # those heads' queries side by side
    # The lowest number and not minus infinity: an empty column sees nothing, and a softmax of nothing would be no number.
    lowest = torch.finfo(scores.dtype).min
    scores = scores.view(*grouped.shape[:4], -1).masked_fill(~seen[:, None, None], lowest)  # [..., width, columns]
    weights = scores.softmax(-1, dtype=torch.float32).to(v.dtype)
    out = (weights.flatten(2, 3) @ v).view(q.shape)
    return layer.out(out.transpose(1, 2).flatten(2)), (k, v)


def load_model(config: Config, max_model_len: int) -> Model:
    """Load a model for texts of up to ``max_model_len`` tokens; raises ``StartupError``."""
    device, dummy = choose_device(config), config.model.load_format == "dummy"
    folder = fetch_model(config.model.model, config.model.revision, config.model.download_dir, weights=not dummy)
    blueprint = read_model(HFConfig.read(folder))
    dtype = choose_dtype(config, blueprint.spec, folder)
    no_paged_attention = cast(AttentionBackend, None)  # the layers' own attention is never called here
    setup = Setup(reference_ops(), SoloComm(), PlainWeights(), no_paged_attention, dtype, device)
    decoder = Decoder(blueprint.spec, setup, max_model_len)
    if dummy:
        load_dummy(decoder, blueprint.names, config.model.seed)
    else:
        load_checkpoint(decoder, blueprint.names, folder)
    return Model(decoder, device, Meter(Sizes.of(blueprint.spec, dtype.itemsize)))
