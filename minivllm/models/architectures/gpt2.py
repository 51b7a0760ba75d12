"""GPT-2 (``GPT2LMHeadModel``): LayerNorm, learned positions, plain MLP, a bias everywhere, tied embeddings.

Its linears are stored transposed ("Conv1D"), q, k and v as one tensor, and checkpoints have ``transformer.`` before each name
or not, depending on who saved them.
"""

from minivllm.errors import UnsupportedModel
from minivllm.kernels.reference import ACTIVATIONS
from minivllm.models.hf_config import MAX_LAYERS, HFConfig
from minivllm.models.spec import Blueprint, ModelSpec, Weight, WeightNames


def gpt2(config: HFConfig) -> Blueprint:
    """Read a GPT-2 model."""
    config.refuse(scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False, add_cross_attention=False)
    hidden, heads, layers = config.integer("n_embd"), config.integer("n_head"), config.integer("n_layer", most=MAX_LAYERS)
    activation = config.text("activation_function", "gelu_new")
    if activation not in ACTIVATIONS:
        raise UnsupportedModel(f"The activation {activation!r} is not served; served are {', '.join(ACTIVATIONS)}.")
    spec = ModelSpec(
        architecture=config.architecture,
        vocab_size=config.integer("vocab_size"),
        hidden_size=hidden,
        intermediate_size=config.integer("n_inner", 4 * hidden),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=hidden // heads,
        max_positions=config.integer("n_positions", 1024),
        norm="layer",
        norm_eps=config.number("layer_norm_epsilon", 1e-5),
        rope=None,
        activation=activation,
        gated_mlp=False,
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        qk_norm=False,
        tied_embeddings=config.flag("tie_word_embeddings", True),
        windows=(None,) * layers,
        bos_id=config.bos_id(),
        eos_ids=config.eos_ids(),
        dtype=config.dtype,
    )
    return Blueprint(spec, _names(spec))


def _names(spec: ModelSpec) -> WeightNames:
    """Where the tensors of a GPT-2 checkpoint belong."""
    places: dict[str, tuple[Weight, ...]] = {"wte.weight": (Weight("embedding"),), "wpe.weight": (Weight("positions"),)}
    if not spec.tied_embeddings:
        places["lm_head.weight"] = (Weight("head_table"),)
    norms = [("ln_f", "final_norm")]
    for i in range(spec.num_layers):
        theirs, ours = f"h.{i}", f"layers.{i}"
        norms += [(f"{theirs}.ln_1", f"{ours}.attention_norm"), (f"{theirs}.ln_2", f"{ours}.mlp_norm")]
        linears = (("attn.c_proj", "attention.out"), ("mlp.c_fc", "mlp.up"), ("mlp.c_proj", "mlp.down"))
        for tensor in ("weight", "bias"):
            transposed = tensor == "weight"
            places[f"{theirs}.attn.c_attn.{tensor}"] = tuple(
                Weight(f"{ours}.attention.qkv", part, tensor, transposed, (n * spec.hidden_size, (n + 1) * spec.hidden_size))
                for n, part in enumerate("qkv")
            )
            for name, module in linears:
                places[f"{theirs}.{name}.{tensor}"] = (Weight(f"{ours}.{module}", "", tensor, transposed),)
    for name, module in norms:
        for tensor in ("weight", "bias"):
            places[f"{name}.{tensor}"] = (Weight(module, "", tensor),)
    # The causal mask was saved as a tensor by old versions; a tied checkpoint may repeat its table.
    ignored = (r"h\.\d+\.attn\.(masked_)?bias", *((r"lm_head\.weight",) if spec.tied_embeddings else ()))
    return WeightNames(places, ignored, optional_prefix="transformer.")
