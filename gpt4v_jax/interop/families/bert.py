"""BERT (Devlin et al. 2018): a bidirectional stream with a head for masked tokens."""

from gpt4v_jax import config
from gpt4v_jax.interop.families import common
from gpt4v_jax.interop.families.common import key
from gpt4v_jax.interop.table import Family, Key, Row

_LAYER, _BLOCK = "bert.encoder.layer.{i}", "backbone/block_{i}"

BERT = Family(
    "bert", ("BertForMaskedLM", "BertForPreTraining"), config.Model,
    keys=(
        key("vocab_size", "vocab", 30522), key("max_position_embeddings", "context", 512),
        key("type_vocab_size", "token_types", 2), key("hidden_size", "backbone.width", 768),
        key("num_hidden_layers", "backbone.depth", 12), key("num_attention_heads", "backbone.heads", 12),
        key("intermediate_size", "backbone.hidden", 3072), key("layer_norm_eps", "backbone.norm_eps", 1e-12),
        key("hidden_act", "backbone.activation head_hidden", "gelu", common.MLP),
        Key("position_embedding_type", (), "absolute"), Key("is_decoder", (), False),
        Key("add_cross_attention", (), False), Key("tie_word_embeddings", (), True),
    ),
    rows=(
        common.table("bert.embeddings.word_embeddings.weight", "text/embed"),
        common.table("bert.embeddings.position_embeddings.weight", "text/position"),
        common.table("bert.embeddings.token_type_embeddings.weight", "text/token_type"),
        *common.norm("bert.embeddings.LayerNorm", "embed_norm"),
        *common.attention(f"{_LAYER}.attention", f"{_BLOCK}/attention",
                          ("self.query", "self.key", "self.value", "output.dense")),
        *common.norm(f"{_LAYER}.attention.output.LayerNorm", f"{_BLOCK}/attention_norm"),
        *common.linear(f"{_LAYER}.intermediate.dense", f"{_BLOCK}/mlp/up"),
        *common.linear(f"{_LAYER}.output.dense", f"{_BLOCK}/mlp/down"),
        *common.norm(f"{_LAYER}.output.LayerNorm", f"{_BLOCK}/mlp_norm"),
        *common.linear("cls.predictions.transform.dense", "head_hidden"),
        *common.norm("cls.predictions.transform.LayerNorm", "head_norm"),
        Row("cls.predictions.bias", "head_bias/value", "V -> V"),
    ),
    fixed={
        "causal": False, "position": "learned", "embed_norm": True, "head_bias": True, "backbone.norm": "layer",
        "backbone.norm_place": "post", "backbone.bias": config.BIASES,
    },
    buffers=r"position_ids$|^cls\.predictions\.decoder\.(weight|bias)$",
    unread=r"^cls\.seq_relationship\.|^bert\.pooler\.", renamed=((r"\.gamma$", ".weight"), (r"\.beta$", ".bias")),
)  # fmt: skip

FAMILIES = (BERT,)
