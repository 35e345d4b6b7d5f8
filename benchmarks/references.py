"""The references of benchmarks/parity.py: tiny Hugging Face models with random weights.

initializer_range is 0.2, so that every operation matters: at 0.02 a wrong rope theta keeps 98 % of the argmaxes.
Biases, norms and eps are away from their defaults.
"""

import copy
import dataclasses
import re
from typing import Any

VOCAB = 83


@dataclasses.dataclass(frozen=True)
class Case:
    """A reference: its class in transformers and the values of its config. kind: decoder | masked | seq2seq | image |
    towers."""

    architecture: str
    kind: str
    values: dict[str, Any]
    arguments: dict[str, Any] = dataclasses.field(default_factory=dict)  # of the class and of its from_pretrained
    untied: bool = False  # the head is another matrix than the table, whatever the config says (FLAN-T5)


_TEXT = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 3,
         "num_attention_heads": 4, "max_position_embeddings": 64, "initializer_range": 0.2}  # fmt: skip
_GQA = _TEXT | {"num_key_value_heads": 2, "rms_norm_eps": 1e-5, "bos_token_id": None, "eos_token_id": None}
_IMAGE = {"hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 2, "num_attention_heads": 4,
          "image_size": 32, "patch_size": 8, "initializer_range": 0.2}  # fmt: skip
_TOWER_TEXT = _TEXT | {"num_hidden_layers": 2, "layer_norm_eps": 1e-4, "eos_token_id": VOCAB - 1}
_T5 = {"vocab_size": VOCAB, "d_model": 32, "d_kv": 12, "d_ff": 56, "num_layers": 3, "num_decoder_layers": 2,
       "num_heads": 4, "relative_attention_num_buckets": 12, "relative_attention_max_distance": 15,
       "layer_norm_epsilon": 1e-5, "decoder_start_token_id": 0, "eos_token_id": None}  # fmt: skip


def _rope(kind: str, **values) -> dict:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 500.0, "factor": 4.0} | values}


CASES = {
    "gpt2": Case("GPT2LMHeadModel", "decoder", {
        "vocab_size": VOCAB, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_inner": 56, "n_positions": 64,
        "layer_norm_epsilon": 1e-4, "initializer_range": 0.2, "bos_token_id": None, "eos_token_id": None}),
    "llama": Case("LlamaForCausalLM", "decoder", _GQA | {
        "rope_parameters": {"rope_theta": 700.0, "rope_type": "default"}, "head_dim": 12}),
    "llama, tied, biases": Case("LlamaForCausalLM", "decoder", _GQA | {
        "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True, "num_key_value_heads": 4}),
    "llama, linear rope": Case("LlamaForCausalLM", "decoder", _GQA | _rope("linear")),
    "llama, llama3 rope": Case("LlamaForCausalLM", "decoder", _GQA | _rope(
        "llama3", low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16)),
    "llama, yarn rope": Case("LlamaForCausalLM", "decoder", _GQA | _rope(
        "yarn", original_max_position_embeddings=16, beta_fast=4.0, beta_slow=1.0)),
    "mistral": Case("MistralForCausalLM", "decoder", _GQA | {"sliding_window": 8, "head_dim": 12}),
    "qwen2": Case("Qwen2ForCausalLM", "decoder", _GQA | {
        "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}),
    "qwen3": Case("Qwen3ForCausalLM", "decoder", _GQA | {"head_dim": 12, "attention_bias": True}),
    "qwen3, square": Case("Qwen3ForCausalLM", "decoder", _GQA | {"head_dim": 8, "tie_word_embeddings": True}),
    "gemma": Case("GemmaForCausalLM", "decoder", _GQA | {"head_dim": 12, "num_key_value_heads": 1}),
    "gemma2": Case("Gemma2ForCausalLM", "decoder", _GQA | {
        "head_dim": 12, "sliding_window": 8, "query_pre_attn_scalar": 20, "attn_logit_softcapping": 5.0,
        "final_logit_softcapping": 3.0}),
    "gemma3_text": Case("Gemma3ForCausalLM", "decoder", _GQA | {
        "head_dim": 12, "sliding_window": 8, "query_pre_attn_scalar": 20, "sliding_window_pattern": 3,
        "rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5000.0},
                            "sliding_attention": {"rope_type": "default", "rope_theta": 300.0}}}),
    "bert": Case("BertForMaskedLM", "masked", _TEXT | {"layer_norm_eps": 1e-4, "type_vocab_size": 3}),
    "t5": Case("T5ForConditionalGeneration", "seq2seq", _T5 | {"initializer_factor": 1.0}),
    "t5, v1.1": Case("T5ForConditionalGeneration", "seq2seq", _T5 | {
        "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
    "t5, v1.1, untied": Case("T5ForConditionalGeneration", "seq2seq", _T5 | {
        "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}, untied=True),
    "bart": Case("BartForConditionalGeneration", "seq2seq", {
        "vocab_size": VOCAB, "d_model": 32, "encoder_layers": 2, "decoder_layers": 3, "encoder_attention_heads": 4,
        "decoder_attention_heads": 2, "encoder_ffn_dim": 56, "decoder_ffn_dim": 48, "max_position_embeddings": 64,
        "init_std": 0.2, "scale_embedding": True, "decoder_start_token_id": 2, "eos_token_id": None,
        "forced_eos_token_id": None, "activation_function": "gelu"}),
    "vit": Case("ViTForImageClassification", "image", _IMAGE | {"num_labels": 7, "layer_norm_eps": 1e-5}),
    "vit, features": Case("ViTModel", "image", _IMAGE | {"qkv_bias": False, "layer_norm_eps": 1e-4},
                          {"add_pooling_layer": False}),
    "dinov2": Case("Dinov2Model", "image", _IMAGE | {"mlp_ratio": 2, "layer_norm_eps": 1e-5}),
    "dinov2, swiglu": Case("Dinov2Model", "image", _IMAGE | {"mlp_ratio": 2, "use_swiglu_ffn": True}),
    "clip": Case("CLIPModel", "towers", {
        "text_config": _TOWER_TEXT, "vision_config": _IMAGE | {"layer_norm_eps": 1e-4}, "projection_dim": 24}),
    "clip_vision_model": Case("CLIPVisionModel", "image", _IMAGE),
    "clip_vision_model, projected": Case("CLIPVisionModelWithProjection", "image", _IMAGE | {"projection_dim": 24}),
    "siglip": Case("SiglipModel", "towers", {
        "text_config": _TOWER_TEXT | {"projection_size": 40},
        "vision_config": _IMAGE | {"hidden_size": 40, "layer_norm_eps": 1e-4}}),
    "siglip_vision_model": Case("SiglipVisionModel", "image", _IMAGE),
    "siglip_vision_model, no head": Case("SiglipVisionModel", "image", _IMAGE | {
        "vision_use_head": False, "image_size": 35}),
}  # fmt: skip


def reference(name: str, seed: int = 0):
    """-> the reference with random weights: matrices by its own initialisation, vectors (biases, norms) moved by 0.2,
    tables of embeddings small."""
    import torch
    import transformers

    case = CASES[name]
    torch.manual_seed(seed)
    architecture = getattr(transformers, case.architecture)
    made = architecture.config_class(**copy.deepcopy(case.values))
    made._attn_implementation = "eager"
    model = architecture(made, **case.arguments).eval()
    if case.untied:
        model.lm_head.weight = torch.nn.Parameter(0.2 * torch.randn_like(model.lm_head.weight))
    with torch.no_grad():
        for path, p in model.named_parameters():
            if p.ndim < 2 or "probe" in path or "cls_token" in path or "position_embeddings" in path:
                p.add_(0.2 * torch.randn_like(p))
            if re.search(r"(wte|wpe|embed_tokens|word_embeddings|shared|embed_positions)\.weight$", path):
                p.mul_(0.05)  # so that the first norm's eps matters
        for path, buffer in model.named_buffers():
            if path == "final_logits_bias":
                buffer.add_(0.2 * torch.randn_like(buffer))
    return model
