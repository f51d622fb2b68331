"""The shape of every tensor that a config calls for, by its Hugging Face name."""

from bridge.config.model import ModelConfig


def tensor_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of a checkpoint by its Hugging Face name, in canonical order (clause 9.3)."""
    D, F = config.hidden_size, config.intermediate_size
    q_width = config.num_attention_heads * config.head_dim
    kv_width = config.num_key_value_heads * config.head_dim
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, D)}
    for i in range(config.num_hidden_layers):
        layer: dict[str, tuple[int, ...]] = {"input_layernorm.weight": (D,)}
        for name, width in (("q", q_width), ("k", kv_width), ("v", kv_width)):
            layer[f"self_attn.{name}_proj.weight"] = (width, D)
            if config.qkv_bias:
                layer[f"self_attn.{name}_proj.bias"] = (width,)
        layer["self_attn.o_proj.weight"] = (D, q_width)
        if config.o_bias:
            layer["self_attn.o_proj.bias"] = (D,)
        if config.qk_norm:
            layer["self_attn.q_norm.weight"] = layer["self_attn.k_norm.weight"] = (config.head_dim,)
        layer["post_attention_layernorm.weight"] = (D,)
        for name, shape in (("gate", (F, D)), ("up", (F, D)), ("down", (D, F))):
            layer[f"mlp.{name}_proj.weight"] = shape
            if config.mlp_bias:
                layer[f"mlp.{name}_proj.bias"] = shape[:1]
        layer = _with_lora(config, layer)
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}
        shapes |= bridge_shapes(config, i)
    shapes["model.norm.weight"] = (D,)
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, D)
    return shapes


def lora_names(config: ModelConfig) -> list[str]:
    """The tensors of low-rank updates, in canonical order; none without `config.lora`."""
    return [name for name in tensor_shapes(config) if ".lora_" in name]


def _with_lora(
    config: ModelConfig, layer: dict[str, tuple[int, ...]]
) -> dict[str, tuple[int, ...]]:
    """A layer's tensors with the updates of its matrices (clause 5.10), each after its module's."""
    if config.lora is None:
        return layer
    shapes: dict[str, tuple[int, ...]] = {}
    modules = [name.rpartition(".")[0] for name in layer]
    for name, module, following in zip(layer, modules, [*modules[1:], ""], strict=True):
        shapes[name] = layer[name]
        if module != following and module.rpartition(".")[2] in config.lora.targets:
            out, inward = layer[f"{module}.weight"]
            shapes[f"{module}.lora_A.weight"] = (config.lora.rank, inward)
            shapes[f"{module}.lora_B.weight"] = (out, config.lora.rank)
    return shapes


def bridge_shapes(config: ModelConfig, layer: int) -> dict[str, tuple[int, ...]]:
    """The Bridge tensors of one layer; empty where the layer has no block (clauses 3.1, 8.1)."""
    bridge, D = config.bridge, config.hidden_size
    if bridge is None or layer not in bridge.layers:
        return {}
    E = bridge.inner
    if bridge.kind == "attention":
        shapes = {"q_proj": (E, D), "k_proj": (E, D), "v_proj": (E, D), "o_proj": (D, E)}
    else:
        shapes = {"up_proj": (2 * E, D), "down_proj": (D, 2 * E)}
    prefix = f"model.layers.{layer}.bridge"
    return {f"{prefix}.{name}.weight": shape for name, shape in {"norm": (D,), **shapes}.items()}
