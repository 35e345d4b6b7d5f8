"""Encoder and decoder: T5 (Raffel et al. 2020) and BART (Lewis et al. 2019). The encoder reads Batch.source."""

from gpt4v_jax import config
from gpt4v_jax.interop.families import common
from gpt4v_jax.interop.families.common import key
from gpt4v_jax.interop.table import Family, Key, Row

# ---- T5: no scale in attention, relative positions, RMSNorm, no biases

_T5_SELF = ("q", "k", "v", "o")


def _t5_stack(theirs: str, ours: str, cross: bool) -> tuple[Row, ...]:
    layer, block, mlp = f"{theirs}.block.{{i}}.layer", f"{ours}/block_{{i}}", 2 if cross else 1
    dense = f"{layer}.{mlp}.DenseReluDense"
    rows = (
        Row(f"{theirs}.block.0.layer.0.SelfAttention.relative_attention_bias.weight", f"{ours}/relative/table",
            "T N -> T N"),
        *common.attention(f"{layer}.0.SelfAttention", f"{block}/attention", _T5_SELF),
        *common.norm(f"{layer}.0.layer_norm", f"{block}/attention_norm"),
        *common.norm(f"{layer}.{mlp}.layer_norm", f"{block}/mlp_norm"),
        *common.linear(f"{dense}.wi", f"{block}/mlp/up", only=f"!{block}/mlp/gate/kernel"),
        *common.linear(f"{dense}.wi_0", f"{block}/mlp/gate"),
        *common.linear(f"{dense}.wi_1", f"{block}/mlp/up", only=f"{block}/mlp/gate/kernel"),
        *common.linear(f"{dense}.wo", f"{block}/mlp/down"), *common.norm(f"{theirs}.final_layer_norm", f"{ours}/norm"),
    )  # fmt: skip
    if not cross:
        return rows
    attention = common.attention(f"{layer}.1.EncDecAttention", f"{block}/cross", _T5_SELF)
    return *rows, *attention, *common.norm(f"{layer}.1.layer_norm", f"{block}/cross_norm")


def _t5_read(theirs: dict) -> dict:
    depth, width = theirs.get("num_layers", 6), theirs.get("d_model", 512)
    scaled = theirs.get("scale_decoder_outputs", theirs.get("tie_word_embeddings") is not False)
    return {"backbone.depth": theirs.get("num_decoder_layers") or depth, "logit_scale": width**-0.5 if scaled else 1.0}


def _t5_write(c: config.Model) -> dict:
    scaled = c.logit_scale != 1
    return {"num_decoder_layers": c.backbone.depth, "scale_decoder_outputs": scaled, "tie_word_embeddings": c.tied}


_BOTH = "backbone.{0} source.{0}"


def _both(theirs: str, name: str, default, values=()) -> Key:
    return key(theirs, _BOTH.format(name), default, values)


_T5_ACTS = (("relu", "relu"), ("gated-gelu", "geglu"), ("gated-silu", "swiglu"), ("gelu", "gelu"))

T5 = Family(
    "t5", ("T5ForConditionalGeneration",), config.Model,
    keys=(
        key("vocab_size", "vocab", 32128), key("n_positions", "context", 512), _both("d_model", "width", 512),
        _both("d_kv", "head_dim", 64),
        _both("d_ff", "hidden", 2048), key("num_layers", "source.depth", 6), _both("num_heads", "heads", 8),
        _both("relative_attention_num_buckets", "buckets", 32),
        _both("relative_attention_max_distance", "bucket_distance", 128),
        _both("layer_norm_epsilon", "norm_eps", 1e-6), _both("feed_forward_proj", "activation", "relu", _T5_ACTS),
        key("tie_word_embeddings", "tied", True),
    ),
    rows=(
        common.table("shared.weight", "text/embed"), *_t5_stack("encoder", "source", False),
        *_t5_stack("decoder", "backbone", True), *common.linear("lm_head", "head"),
    ),
    fixed={
        "position": "none", "backbone.pattern": ("cross",), "backbone.attention_scale": 1.0,
        "source.attention_scale": 1.0, "backbone.norm": "rms", "source.norm": "rms",
    },
    read=_t5_read, write=_t5_write, extra={"is_encoder_decoder": True},
    buffers=r"^(encoder|decoder)\.embed_tokens\.weight$|^lm_head\.weight$|1\.EncDecAttention\.relative_attention_bias",
    generates=True,
)  # fmt: skip

# ---- BART: post-norm, learned positions whose first two rows nothing reads

_BART_SELF = ("q_proj", "k_proj", "v_proj", "out_proj")


def _bart_stack(theirs: str, ours: str) -> tuple[Row, ...]:
    layer, block = f"{theirs}.layers.{{i}}", f"{ours}/block_{{i}}"
    return (
        *common.attention(f"{layer}.self_attn", f"{block}/attention", _BART_SELF),
        *common.norm(f"{layer}.self_attn_layer_norm", f"{block}/attention_norm"),
        *common.attention(f"{layer}.encoder_attn", f"{block}/cross", _BART_SELF),
        *common.norm(f"{layer}.encoder_attn_layer_norm", f"{block}/cross_norm"),
        *common.linear(f"{layer}.fc1", f"{block}/mlp/up"), *common.linear(f"{layer}.fc2", f"{block}/mlp/down"),
        *common.norm(f"{layer}.final_layer_norm", f"{block}/mlp_norm"),
    )  # fmt: skip


def _bart_read(theirs: dict) -> dict:
    return {"embed_scale": theirs.get("d_model", 1024) ** 0.5 if theirs.get("scale_embedding", False) else 1.0}


_BART_STACK = {"norm": "layer", "norm_eps": 1e-5, "norm_place": "post", "bias": config.BIASES}
BART = Family(
    "bart", ("BartForConditionalGeneration",), config.Model,
    keys=(
        key("vocab_size", "vocab", 50265), key("max_position_embeddings", "context", 1024),
        _both("d_model", "width", 1024), key("encoder_layers", "source.depth", 12),
        key("decoder_layers", "backbone.depth", 12), key("encoder_attention_heads", "source.heads", 16),
        key("decoder_attention_heads", "backbone.heads", 16), key("encoder_ffn_dim", "source.hidden", 4096),
        key("decoder_ffn_dim", "backbone.hidden", 4096),
        _both("activation_function", "activation", "gelu", common.MLP), Key("tie_word_embeddings", (), True),
    ),
    rows=(
        common.table("model.shared.weight", "text/embed"),
        common.table("model.encoder.embed_positions.weight", "text/source_position"),
        common.table("model.decoder.embed_positions.weight", "text/position"),
        *common.norm("model.encoder.layernorm_embedding", "source_norm"),
        *common.norm("model.decoder.layernorm_embedding", "embed_norm"),
        *_bart_stack("model.encoder", "source"), *_bart_stack("model.decoder", "backbone"),
        Row("final_logits_bias", "head_bias/value", "1 V -> V"),
    ),
    fixed={"position": "learned", "position_offset": 2, "embed_norm": True, "head_bias": True} | {
        f"{stack}.{name}": value for stack in ("backbone", "source") for name, value in _BART_STACK.items()
    } | {"backbone.pattern": ("cross",)},
    read=_bart_read, write=lambda c: {"scale_embedding": c.embed_scale != 1}, extra={"is_encoder_decoder": True},
    base="model.", zero=r"^final_logits_bias$",
    buffers=r"^model\.(encoder|decoder)\.embed_tokens\.weight$|^lm_head\.weight$", generates=True,
)  # fmt: skip

FAMILIES = (T5, BART)
