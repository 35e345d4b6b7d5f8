"""Models of llama2.c (Karpathy 2023): its version-0 export and its tokenizer, as a Llama of our tables.

The file is seven int32 (width, hidden, depth, heads, kv-heads, vocabulary, context; a negative vocabulary: the head is
not the table) and float32 tensors, a kind after the other over all layers. Its rope turns neighbours (2i, 2i + 1).
"""

import struct
from pathlib import Path

import flax
import jax
import numpy as np
import tokenizers
from tokenizers import decoders, models, normalizers, processors

from gpt4v_jax import config
from gpt4v_jax.data.tokenizer import Tokenizer
from gpt4v_jax.interop import families, hf, table

BOS, EOS = 1, 2


def load(path: Path, tokenizer: Path, dtype: str = "float32", mesh: jax.sharding.Mesh | None = None):
    """-> (the model: hf.Imported, its Tokenizer). Raises InputError for a file that is no such export."""
    theirs, tensors = _read(path)
    family = families.FAMILIES["llama"]
    ours = families.read_config(theirs, str(path))
    rows = table.tensors_of(family, ours, hf.abstract_params(ours))
    params = {}
    for row in rows:
        for name, x in table.to_ours(row, tensors[row.name]):
            params[name] = hf.put(x, name, hf.DTYPES.get(dtype, np.float32), mesh)
    tree = flax.traverse_util.unflatten_dict(params, sep="/")
    return hf.Imported(family, ours, tree, theirs), _tokenizer(tokenizer, ours.vocab)


def _read(path: Path) -> tuple[dict, dict[str, np.ndarray]]:
    """-> (a Llama's config.json, its tensors by their Hugging Face names)."""
    try:
        size, head = path.stat().st_size, path.open("rb").read(28)
    except OSError as error:
        raise config.InputError(f"{path} cannot be read: {error.strerror}") from error
    sizes = struct.unpack("<7i", head) if len(head) == 28 else (0,) * 7
    width, hidden, depth, heads, kv_heads, vocab, context = sizes
    tied, vocab = vocab > 0, abs(vocab)
    plausible = min(sizes[:5] + (vocab, context)) > 0 and max(sizes) < 1 << 24 and width % heads == 0
    if not plausible or heads % kv_heads:
        raise config.InputError(f"{path} is no llama2.c model: its header is {sizes}; pickled .bin files are not read")
    head_dim = width // heads
    shapes = {  # in the order of the file
        "embed": (vocab, width), "attention_norm": (depth, width), "q": (depth, heads * head_dim, width),
        "k": (depth, kv_heads * head_dim, width), "v": (depth, kv_heads * head_dim, width),
        "o": (depth, width, heads * head_dim), "mlp_norm": (depth, width), "gate": (depth, hidden, width),
        "down": (depth, width, hidden), "up": (depth, hidden, width), "norm": (width,),
        "rope": (2, context, head_dim // 2), "head": () if tied else (vocab, width),
    }  # fmt: skip
    counts = {name: int(np.prod(shape)) if shape else 0 for name, shape in shapes.items()}
    if size != 28 + 4 * sum(counts.values()):
        raise config.InputError(f"{path} has {size} bytes, its header asks for {28 + 4 * sum(counts.values())}")
    flat, values, start = np.fromfile(path, np.float32, offset=28), {}, 0
    for name, shape in shapes.items():
        values[name] = flat[start : start + counts[name]].reshape(shape or (0,))
        start += counts[name]
    tensors = {"model.embed_tokens.weight": values["embed"], "model.norm.weight": values["norm"]}
    if not tied:
        tensors["lm_head.weight"] = values["head"]
    names = {
        "attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm", "v": "self_attn.v_proj",
        "o": "self_attn.o_proj", "gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj",
    }  # fmt: skip
    for i in range(depth):
        for name, theirs in names.items():
            tensors[f"model.layers.{i}.{theirs}.weight"] = values[name][i]
        for name in ("q", "k"):
            tensors[f"model.layers.{i}.self_attn.{name}_proj.weight"] = _halves(values[name][i], head_dim)
    return {
        "model_type": "llama", "vocab_size": vocab, "hidden_size": width, "intermediate_size": hidden,
        "num_hidden_layers": depth, "num_attention_heads": heads, "num_key_value_heads": kv_heads,
        "max_position_embeddings": context, "rms_norm_eps": 1e-5, "tie_word_embeddings": tied, "rope_theta": 10_000.0,
        "bos_token_id": BOS, "eos_token_id": BOS,  # llama2.c's own stop: the next story's first token
    }, tensors  # fmt: skip


def _halves(x, head_dim: int):
    """Rows of [heads x head_dim, width]: dimensions 2i and 2i + 1 of a head -> i and i + head_dim / 2."""
    return x.reshape(-1, head_dim // 2, 2, x.shape[1]).swapaxes(1, 2).reshape(x.shape)


def _tokenizer(path: Path, vocab: int) -> Tokenizer:
    """max_len, then (score, length, bytes) a token: the pair of the best score is joined first, as in sentencepiece."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise config.InputError(f"{path} cannot be read: {error.strerror}") from error
    pieces, scores, at = [], [], 4
    try:
        for _ in range(vocab):
            score, length = struct.unpack_from("<fi", raw, at)
            pieces.append(raw[at + 8 : at + 8 + length].decode())
            scores.append(score)
            at += 8 + length
    except (struct.error, UnicodeDecodeError) as error:
        raise config.InputError(f"{path} is no llama2.c tokenizer of {vocab} tokens: {error}") from error
    if at != len(raw):
        raise config.InputError(f"{path} has {len(raw)} bytes, {vocab} tokens take {at}: another model's tokenizer?")
    pieces[:3] = ["<unk>", "<s>", "</s>"]  # the file has them with blank lines around
    ids = {piece.replace(" ", "▁"): i for i, piece in enumerate(pieces)}
    merges = sorted(
        ((ids[whole], whole[:cut], whole[cut:]) for whole in ids for cut in range(1, len(whole))
         if whole[:cut] in ids and whole[cut:] in ids and ids[whole] > 258),
        key=lambda merge: -scores[merge[0]],
    )  # fmt: skip
    inner = tokenizers.Tokenizer(
        models.BPE(ids, [merge[1:] for merge in merges], unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    inner.post_processor = processors.TemplateProcessing("<s> $0", special_tokens=[("<s>", BOS)])
    inner.decoder = decoders.Sequence([
        decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0),
    ])  # fmt: skip
    inner.add_special_tokens(["<unk>", "<s>", "</s>"])
    return Tokenizer(inner, ("<s>",))
