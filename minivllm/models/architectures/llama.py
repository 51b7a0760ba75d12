"""Llama 2 and 3 (``LlamaForCausalLM``), and what its relatives have in common with it.

RMSNorm before each block, rotary positions, grouped-query attention, SwiGLU. https://arxiv.org/abs/2302.13971.
"""

from dataclasses import replace

from minivllm.errors import UnsupportedModel
from minivllm.kernels.reference import ACTIVATIONS
from minivllm.models.hf_config import MAX_LAYERS, HFConfig, read_rope
from minivllm.models.spec import Blueprint, ModelSpec, Weight, WeightNames


def llama(config: HFConfig) -> Blueprint:
    """Read a Llama model."""
    attention_bias = config.flag("attention_bias", False)
    spec = replace(
        llama_like(config),
        qkv_bias=attention_bias,
        out_bias=attention_bias,
        mlp_bias=config.flag("mlp_bias", False),
    )
    return Blueprint(spec, llama_names(spec))


def llama_like(config: HFConfig) -> ModelSpec:
    """The spec that Llama, Mistral and Qwen share: no biases, no windows, no norm of q and k."""
    hidden, heads = config.integer("hidden_size"), config.integer("num_attention_heads")
    layers = config.integer("num_hidden_layers", most=MAX_LAYERS)
    head_dim = config.integer("head_dim", hidden // heads)
    kv_heads = config.integer("num_key_value_heads", heads)
    if heads % kv_heads:
        raise UnsupportedModel(f"{heads} attention heads cannot be grouped over {kv_heads} KV heads.")
    activation = config.text("hidden_act", "silu")
    if activation not in ACTIVATIONS:
        raise UnsupportedModel(f"The activation {activation!r} is not served; served are {', '.join(ACTIVATIONS)}.")
    rope, max_positions, notes = read_rope(config, head_dim, config.integer("max_position_embeddings", 2048))
    return ModelSpec(
        architecture=config.architecture,
        vocab_size=config.integer("vocab_size"),
        hidden_size=hidden,
        intermediate_size=config.integer("intermediate_size"),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        max_positions=max_positions,
        norm="rms",
        norm_eps=config.number("rms_norm_eps", 1e-6),
        rope=rope,
        activation=activation,
        gated_mlp=True,
        qkv_bias=False,
        out_bias=False,
        mlp_bias=False,
        qk_norm=False,
        tied_embeddings=config.flag("tie_word_embeddings", False),
        windows=(None,) * layers,
        bos_id=config.bos_id(),
        eos_ids=config.eos_ids(),
        dtype=config.dtype,
        notes=notes,
    )


def llama_names(spec: ModelSpec) -> WeightNames:
    """Where the tensors of a Llama-like checkpoint belong."""
    places: dict[str, tuple[Weight, ...]] = {
        "model.embed_tokens.weight": (Weight("embedding"),),
        "model.norm.weight": (Weight("final_norm"),),
    }
    if not spec.tied_embeddings:
        places["lm_head.weight"] = (Weight("head_table"),)
    for i in range(spec.num_layers):
        theirs, ours = f"model.layers.{i}", f"layers.{i}"
        places[f"{theirs}.input_layernorm.weight"] = (Weight(f"{ours}.attention_norm"),)
        places[f"{theirs}.post_attention_layernorm.weight"] = (Weight(f"{ours}.mlp_norm"),)
        linears = [
            *((f"self_attn.{p}_proj", "attention.qkv", p, spec.qkv_bias) for p in "qkv"),
            ("self_attn.o_proj", "attention.out", "", spec.out_bias),
            *((f"mlp.{p}_proj", "mlp.gate_up", p, spec.mlp_bias) for p in ("gate", "up")),
            ("mlp.down_proj", "mlp.down", "", spec.mlp_bias),
        ]
        for name, module, part, bias in linears:
            for tensor in ("weight", "bias") if bias else ("weight",):
                places[f"{theirs}.{name}.{tensor}"] = (Weight(f"{ours}.{module}", part, tensor),)
        if spec.qk_norm:
            for p in "qk":
                places[f"{theirs}.self_attn.{p}_norm.weight"] = (Weight(f"{ours}.attention.{p}_norm"),)
    # Old checkpoints keep the rotary frequencies, which follow from the config; a tied one may repeat its table.
    ignored = (r".*\.rotary_emb\.inv_freq", *((r"lm_head\.weight",) if spec.tied_embeddings else ()))
    return WeightNames(places, ignored)


def layer_windows(config: HFConfig, num_layers: int, window: int | None, default: list[str]) -> tuple[int | None, ...]:
    """Each layer's sliding window: ``layer_types`` where config.json has it, else ``default``."""
    kinds = config.values.get("layer_types") or default
    if len(kinds) != num_layers or any(k not in ("full_attention", "sliding_attention") for k in kinds):
        raise UnsupportedModel("layer_types must name full_attention or sliding_attention for each layer.")
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)
