"""Causal language models: GPT-2, Llama, Mistral, Qwen2, Qwen3, Gemma 1, 2 and 3."""

from gpt4v_jax import config
from gpt4v_jax.interop.families import common
from gpt4v_jax.interop.families.common import key
from gpt4v_jax.interop.table import Family, Key, Row

# ---- GPT-2 (Radford et al. 2019). Its Conv1D matrices are [in, out], and q, k, v are one matrix.

_QKV = tuple(f"backbone/block_{{i}}/attention/{name}" for name in ("query", "key", "value"))
_BLOCK = "transformer.h.{i}"

GPT2 = Family(
    "gpt2", ("GPT2LMHeadModel", "GPT2Model"), config.Model,
    keys=(
        key("vocab_size", "vocab", 50257), key("n_positions", "context", 1024), key("n_layer", "backbone.depth", 12),
        key("n_embd", "backbone.width", 768), key("n_head", "backbone.heads", 12),
        key("n_inner", "backbone.hidden", None, common.NONE), key("layer_norm_epsilon", "backbone.norm_eps", 1e-5),
        key("activation_function", "backbone.activation", "gelu_new", common.MLP),
        key("tie_word_embeddings", "tied", True), Key("scale_attn_weights", (), True),
        Key("scale_attn_by_inverse_layer_idx", (), False), Key("add_cross_attention", (), False),
    ),
    rows=(
        common.table("transformer.wte.weight", "text/embed"), common.table("transformer.wpe.weight", "text/position"),
        *common.norm(f"{_BLOCK}.ln_1", "backbone/block_{i}/attention_norm"),
        Row(f"{_BLOCK}.attn.c_attn.weight", tuple(f"{p}/kernel" for p in _QKV), "D (N H) -> D N H", axis=1),
        Row(f"{_BLOCK}.attn.c_attn.bias", tuple(f"{p}/bias" for p in _QKV), "(N H) -> N H"),
        Row(f"{_BLOCK}.attn.c_proj.weight", "backbone/block_{i}/attention/out/kernel", "(N H) D -> N H D"),
        Row(f"{_BLOCK}.attn.c_proj.bias", "backbone/block_{i}/attention/out/bias", "D -> D"),
        *common.norm(f"{_BLOCK}.ln_2", "backbone/block_{i}/mlp_norm"),
        Row(f"{_BLOCK}.mlp.c_fc.weight", "backbone/block_{i}/mlp/up/kernel", "D F -> D F"),
        Row(f"{_BLOCK}.mlp.c_fc.bias", "backbone/block_{i}/mlp/up/bias", "F -> F"),
        Row(f"{_BLOCK}.mlp.c_proj.weight", "backbone/block_{i}/mlp/down/kernel", "F D -> F D"),
        Row(f"{_BLOCK}.mlp.c_proj.bias", "backbone/block_{i}/mlp/down/bias", "D -> D"),
        *common.norm("transformer.ln_f", "backbone/norm"), *common.linear("lm_head", "head"),
    ),
    fixed={"position": "learned", "backbone.norm": "layer", "backbone.bias": config.BIASES},
    base="transformer.", buffers=r"\.attn\.(masked_)?bias$|^lm_head\.weight$", generates=True,
)  # fmt: skip

# ---- Llama (Touvron et al. 2023) and those that are built like it


def _keys(**defaults) -> tuple[Key, ...]:
    """The keys that all of them have; defaults differ."""
    return (
        key("vocab_size", "vocab", defaults["vocab"]), key("max_position_embeddings", "context", defaults["context"]),
        key("tie_word_embeddings", "tied", defaults.get("tied", False)),
        key("hidden_size", "backbone.width", defaults["width"]),
        key("intermediate_size", "backbone.hidden", defaults["hidden"]),
        key("num_hidden_layers", "backbone.depth", defaults["depth"]),
        key("num_attention_heads", "backbone.heads", defaults["heads"]),
        key("num_key_value_heads", "backbone.kv_heads", defaults.get("kv_heads"), common.NONE),
        key("head_dim", "backbone.head_dim", defaults.get("head_dim"), common.NONE),
        key("rms_norm_eps", "backbone.norm_eps", 1e-6),
        key(defaults.get("act_name", "hidden_act"), "backbone.activation", defaults.get("act", "silu"),
            defaults.get("acts", common.GATED)),
    )  # fmt: skip


_LAYER, _OURS = "model.layers.{i}", "backbone/block_{i}"
_SELF = ("q_proj", "k_proj", "v_proj", "o_proj")
_TWO_NORMS = (
    *common.norm(f"{_LAYER}.input_layernorm", f"{_OURS}/attention_norm"),
    *common.norm(f"{_LAYER}.post_attention_layernorm", f"{_OURS}/mlp_norm"),
)
_FOUR_NORMS = (
    *common.norm(f"{_LAYER}.input_layernorm", f"{_OURS}/attention_norm"),
    *common.norm(f"{_LAYER}.post_attention_layernorm", f"{_OURS}/attention_post_norm"),
    *common.norm(f"{_LAYER}.pre_feedforward_layernorm", f"{_OURS}/mlp_norm"),
    *common.norm(f"{_LAYER}.post_feedforward_layernorm", f"{_OURS}/mlp_post_norm"),
)
_ROWS = (
    common.table("model.embed_tokens.weight", "text/embed"),
    *common.attention(f"{_LAYER}.self_attn", f"{_OURS}/attention", _SELF),
    *common.norm(f"{_LAYER}.self_attn.q_norm", f"{_OURS}/attention/query_norm"),
    *common.norm(f"{_LAYER}.self_attn.k_norm", f"{_OURS}/attention/key_norm"),
    *common.linear(f"{_LAYER}.mlp.gate_proj", f"{_OURS}/mlp/gate"),
    *common.linear(f"{_LAYER}.mlp.up_proj", f"{_OURS}/mlp/up"),
    *common.linear(f"{_LAYER}.mlp.down_proj", f"{_OURS}/mlp/down"),
    *common.norm("model.norm", "backbone/norm"), *common.linear("lm_head", "head"),
)  # fmt: skip
_SAME = {"base": "model.", "buffers": r"rotary_emb\.inv_freq$|^lm_head\.weight$", "generates": True}

_SCALING = {"linear": {"factor": "factor"}, "llama3": {
    "factor": "factor", "original_max_position_embeddings": "original", "low_freq_factor": "low",
    "high_freq_factor": "high",
}, "yarn": {
    "factor": "factor", "original_max_position_embeddings": "original", "beta_fast": "beta_fast",
    "beta_slow": "beta_slow", "attention_factor": "attention", "truncate": "truncate",
}}  # fmt: skip


_REQUIRED = {
    "linear": ("factor",), "yarn": ("factor", "original_max_position_embeddings"),
    "llama3": ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
}  # fmt: skip


def _rope(theirs: dict) -> dict:
    """rope_parameters (new style), or rope_theta beside rope_scaling (old style) -> ours."""
    return _rope_of(_parameters(theirs) or _old_style(theirs), theirs, 10_000.0)


def _parameters(theirs: dict) -> dict:
    if theirs.get("rope_parameters") and theirs.get("rope_scaling"):
        raise config.InputError("rope_parameters and rope_scaling are both there: leave one of them")
    return theirs.get("rope_parameters") or {}


def _old_style(theirs: dict) -> dict:
    return (theirs.get("rope_scaling") or {}) | {"rope_theta": theirs.get("rope_theta")}


def _rope_of(rope: dict, theirs: dict, theta: float) -> dict:
    kind = rope.get("rope_type", rope.get("type", "default")) or "default"
    given = [value for value in (rope.get("rope_theta"), theirs.get("rope_theta"), theta) if value is not None]
    ours = {"backbone.rope_theta": float(given[0])}
    if kind == "default":
        return ours
    if kind not in _SCALING:
        raise config.InputError(f"rope_type={kind!r} is none of default, {', '.join(_SCALING)}")
    if rope.get("mscale") or rope.get("mscale_all_dim"):
        raise config.InputError("rope scaling with mscale is not supported")
    rope = {name: value for name, value in rope.items() if value is not None}
    name = "original_max_position_embeddings"  # where it stands beside rope_parameters, it counts
    contexts = (theirs.get(name), rope.get(name), theirs.get("max_position_embeddings"))
    rope[name] = next((value for value in contexts if value is not None), None)
    if kind == "yarn" and "factor" not in rope and rope[name]:
        rope["factor"] = theirs.get("max_position_embeddings", rope[name]) / rope[name]
    for needed in _REQUIRED[kind]:
        if rope.get(needed) is None:
            raise config.InputError(f"rope_type={kind!r} needs {needed}")
    scaling = {mine: rope[name] for name, mine in _SCALING[kind].items() if name in rope}
    return ours | {"backbone.rope_scaling": scaling | {"kind": kind}}


def _write_rope(c: config.Backbone) -> dict:
    if c.rope_scaling.kind == "none":
        return {"rope_type": "default", "rope_theta": c.rope_theta}
    names = _SCALING[c.rope_scaling.kind]
    values = {name: getattr(c.rope_scaling, mine) for name, mine in names.items()}
    if not values.get("attention_factor", 1):
        del values["attention_factor"]
    return {"rope_type": c.rope_scaling.kind, "rope_theta": c.rope_theta} | values


def _layers(theirs: dict, default: list[str] | None, window) -> dict:
    """layer_types, or what follows where config.json has none -> pattern and window."""
    names = {"full_attention": "global", "sliding_attention": "local"}
    types = theirs.get("layer_types") or default or ["full_attention"]
    if set(types) - set(names):
        raise config.InputError(f"layer_types={sorted(set(types) - set(names))} are none of {', '.join(names)}")
    kinds = [names[kind] for kind in types]
    return {"backbone.pattern": common.period(kinds), "backbone.window": window if "local" in kinds else 0}


def _write_layers(c: config.Backbone) -> dict:
    names = {"global": "full_attention", "local": "sliding_attention"}
    return {"layer_types": [names.get(kind, kind) for kind in c.kinds], "sliding_window": c.window or None}


def _llama_read(theirs: dict) -> dict:
    attention, mlp = theirs.get("attention_bias", False), theirs.get("mlp_bias", False)
    return _rope(theirs) | {"backbone.bias": common.biases(qkv=attention, out=attention, mlp=mlp)}


def _llama_write(c: config.Model) -> dict:
    b = c.backbone
    return {"rope_parameters": _write_rope(b), "attention_bias": "qkv" in b.bias, "mlp_bias": "mlp" in b.bias}


def _mistral_read(theirs: dict) -> dict:
    window = theirs.get("sliding_window", 4096)
    # The reference slides in every layer, whatever layer_types says.
    return _rope(theirs) | _layers({}, ["sliding_attention"] if window else None, window)


def _mistral_write(c: config.Model) -> dict:
    return {"rope_parameters": _write_rope(c.backbone), "sliding_window": c.backbone.window or None}


def _qwen_read(theirs: dict) -> dict:
    depth, window = theirs.get("num_hidden_layers", 32), theirs.get("sliding_window", 4096)
    first = theirs.get("max_window_layers", 28)
    types = ["full_attention"] * depth
    if theirs.get("use_sliding_window") and window:
        types = ["sliding_attention" if i >= first else "full_attention" for i in range(depth)]
    bias = theirs.get("attention_bias", False) and {"backbone.bias": ("qkv", "out")} or {}
    return _rope(theirs) | _layers(theirs, types, window) | bias


def _qwen_write(c: config.Model) -> dict:
    layers = _write_layers(c.backbone) | {"use_sliding_window": "local" in c.backbone.kinds}
    return {"rope_parameters": _write_rope(c.backbone), "attention_bias": "out" in c.backbone.bias} | layers


def _gemma_read(theirs: dict) -> dict:
    bias = theirs.get("attention_bias", False)
    scale = theirs.get("hidden_size", _GEMMA_WIDTH[theirs["model_type"]]) ** 0.5
    return {"embed_scale": scale, "backbone.bias": common.biases(qkv=bias, out=bias)}


def _gemma_write(c: config.Model) -> dict:
    return {"rope_parameters": _write_rope(c.backbone), "attention_bias": "qkv" in c.backbone.bias}


def _gemma2_read(theirs: dict) -> dict:
    depth = theirs.get("num_hidden_layers", 26)
    types = ["full_attention" if i % 2 else "sliding_attention" for i in range(depth)]
    layers = _layers(theirs, types, theirs.get("sliding_window", 4096))
    scale = {"backbone.attention_scale": theirs.get("query_pre_attn_scalar", 256) ** -0.5}
    return _gemma_read(theirs) | _rope(theirs) | layers | scale


def _gemma2_write(c: config.Model) -> dict:
    scalar = c.backbone.attention_scale**-2 if c.backbone.attention_scale else c.backbone.head_dim
    return _gemma_write(c) | _write_layers(c.backbone) | {"query_pre_attn_scalar": round(scalar)}


def _gemma3_read(theirs: dict) -> dict:
    depth, every = theirs.get("num_hidden_layers", 26), theirs.get("sliding_window_pattern", 6)
    types = ["sliding_attention" if (i + 1) % every else "full_attention" for i in range(depth)]
    layers = _layers(theirs, types, theirs.get("sliding_window", 4096))
    new = _parameters(theirs)
    rope = _rope_of(new.get("full_attention") or _old_style(theirs), theirs, 1_000_000.0)
    local = new.get("sliding_attention") or {"rope_theta": theirs.get("rope_local_base_freq", 10_000.0)}
    if local.get("rope_type", "default") != "default":
        raise config.InputError(f"rope_type={local['rope_type']!r} of sliding_attention is not supported")
    rope |= {"backbone.local_theta": float(local.get("rope_theta") or 10_000.0)}
    scale = {"backbone.attention_scale": theirs.get("query_pre_attn_scalar", 256) ** -0.5}
    return _gemma_read(theirs) | rope | layers | scale


def _gemma3_write(c: config.Model) -> dict:
    local = {"rope_type": "default", "rope_theta": c.backbone.local_theta}
    rope = {"full_attention": _write_rope(c.backbone), "sliding_attention": local}
    return _gemma2_write(c) | {"rope_parameters": rope}


_RMS = {"position": "rope", "backbone.norm": "rms"}
_GEMMA = {"position": "rope", "backbone.norm": "rms_plus_one"}
_GEMMA_WIDTH = {"gemma": 3072, "gemma2": 2304, "gemma3_text": 2304}
_TANH = {"act": "gelu_pytorch_tanh", "tied": True}
_CAPS = (
    key("attn_logit_softcapping", "backbone.attention_cap", 50.0, common.NO_CAP),
    key("final_logit_softcapping", "logit_cap", 30.0, common.NO_CAP),
)
_LAST_CAP = (  # the reference keeps Gemma 3's attn_logit_softcapping, and does not use it
    Key("attn_logit_softcapping", (), None), key("final_logit_softcapping", "logit_cap", None, common.NO_CAP),
)

LLAMA = Family(
    "llama", ("LlamaForCausalLM",), config.Model, _keys(
        vocab=32000, context=2048, width=4096, hidden=11008, depth=32, heads=32,
    ), (*_ROWS, *_TWO_NORMS), _RMS, _llama_read, _llama_write, **_SAME,
)  # fmt: skip
MISTRAL = Family(  # Jiang et al. 2023
    "mistral", ("MistralForCausalLM",), config.Model, _keys(
        vocab=32000, context=4096 * 32, width=4096, hidden=14336, depth=32, heads=32, kv_heads=8,
    ), (*_ROWS, *_TWO_NORMS), _RMS, _mistral_read, _mistral_write, **_SAME,
)  # fmt: skip
QWEN2 = Family(  # Yang et al. 2024
    "qwen2", ("Qwen2ForCausalLM",), config.Model, _keys(
        vocab=151936, context=32768, width=4096, hidden=22016, depth=32, heads=32, kv_heads=32,
    ), (*_ROWS, *_TWO_NORMS), _RMS | {"backbone.bias": ("qkv",)}, _qwen_read, _qwen_write, **_SAME,
)  # fmt: skip
QWEN3 = Family(  # Yang et al. 2025
    "qwen3", ("Qwen3ForCausalLM",), config.Model, _keys(
        vocab=151936, context=32768, width=4096, hidden=22016, depth=32, heads=32, kv_heads=32, head_dim=128,
    ), (*_ROWS, *_TWO_NORMS), _RMS | {"backbone.qk_norm": True}, _qwen_read, _qwen_write, **_SAME,
)  # fmt: skip
GEMMA = Family(  # Gemma Team 2024
    "gemma", ("GemmaForCausalLM",), config.Model, _keys(
        vocab=256000, context=8192, width=3072, hidden=24576, depth=28, heads=16, kv_heads=16, head_dim=256, **_TANH,
        acts=(*common.GATED, ("gelu", "geglu")),  # an older name in the official files, which means the tanh form
    ), (*_ROWS, *_TWO_NORMS), _GEMMA, lambda theirs: _gemma_read(theirs) | _rope(theirs), _gemma_write, **_SAME,
)  # fmt: skip
GEMMA2 = Family(  # Gemma Team 2024b
    "gemma2", ("Gemma2ForCausalLM",), config.Model, _keys(
        vocab=256000, context=8192, width=2304, hidden=9216, depth=26, heads=8, kv_heads=4, head_dim=256,
        act_name="hidden_activation", **_TANH,
    ) + _CAPS, (*_ROWS, *_FOUR_NORMS), _GEMMA | {"backbone.norm_place": "sandwich"}, _gemma2_read, _gemma2_write,
    **_SAME,
)  # fmt: skip
GEMMA3 = Family(  # Gemma Team 2025
    "gemma3_text", ("Gemma3ForCausalLM",), config.Model, _keys(
        vocab=262208, context=131072, width=2304, hidden=9216, depth=26, heads=8, kv_heads=4, head_dim=256,
        act_name="hidden_activation", **_TANH,
    ) + _LAST_CAP + (Key("use_bidirectional_attention", (), False),), (*_ROWS, *_FOUR_NORMS),
    _GEMMA | {"backbone.norm_place": "sandwich", "backbone.qk_norm": True}, _gemma3_read, _gemma3_write, **_SAME,
)  # fmt: skip

FAMILIES = (GPT2, LLAMA, MISTRAL, QWEN2, QWEN3, GEMMA, GEMMA2, GEMMA3)
