"""The stack of transformer blocks. It knows streams; it does not know what a picture is."""

import flax.linen as nn
import jax

from gpt4v_jax import config
from gpt4v_jax.model import attention
from gpt4v_jax.model.layers import MLP, Linear, Norm, dropout
from gpt4v_jax.sharding import shard


class Attention(nn.Module):
    """Multi-head self-attention (grouped-query where kv_heads < heads): [B,T,D] -> [B,T,D]."""

    config: config.Backbone
    rotary: bool
    out_gain: float

    @nn.compact
    def __call__(self, x_BTD, position_BT, sight: attention.Sight, kv=None, capture=False):
        c, D = self.config, x_BTD.shape[-1]

        def project(name, heads):
            return Linear((D,), (heads, c.head_dim), c.bias, name=name)(x_BTD)

        q, k, v = project("query", c.heads), project("key", c.kv_heads), project("value", c.kv_heads)
        if c.qk_norm:
            q, k = Norm("rms", c.norm_eps, name="query_norm")(q), Norm("rms", c.norm_eps, name="key_norm")(k)
        if self.rotary:
            q, k = attention.rope(q, position_BT, c.rope_theta), attention.rope(k, position_BT, c.rope_theta)
        q, k, v = (shard(x, "batch", None, "heads") for x in (q, k, v))
        if kv is not None:
            at = (0, sight.cursor, 0, 0)
            kv = tuple(jax.lax.dynamic_update_slice(old, new, at) for old, new in zip(kv, (k, v), strict=True))
            k, v = kv
        x_BTNH = attention.attend(q, k, v, sight)
        out = Linear((c.heads, c.head_dim), (D,), c.bias, self.out_gain, name="out")(x_BTNH)
        return out, kv, {"query": q, "key": k} if capture else {}


class Block(nn.Module):
    """Pre-norm residual block: x + attention(norm(x)), then x + mlp(norm(x))."""

    config: config.Backbone
    rotary: bool

    @nn.compact
    def __call__(self, x, position, sight, kv=None, key=None, capture=False):
        c = self.config
        out_gain = (2 * c.depth) ** -0.5  # the residual stream's variance does not grow with depth (GPT-2)
        keys = (None, None) if key is None else jax.random.split(key)
        norm = Norm(c.norm, c.norm_eps, name="attention_norm")
        mixed, kv, out = Attention(c, self.rotary, out_gain, name="attention")(norm(x), position, sight, kv, capture)
        x = shard(x + dropout(mixed, c.dropout, keys[0]), "batch")
        norm = Norm(c.norm, c.norm_eps, name="mlp_norm")
        mlp = MLP(c.hidden, c.activation, c.bias, out_gain, name="mlp")
        return shard(x + dropout(mlp(norm(x)), c.dropout, keys[1]), "batch"), kv, out


class Backbone(nn.Module):
    """x [B,T,D] -> (final hidden states [B,T,D], the layers' k and v, captured q and k by layer)."""

    config: config.Backbone
    rotary: bool

    @nn.compact
    def __call__(self, x, position, sight, cache: attention.Cache | None = None, key=None, capture=False):
        c = self.config
        kvs, out = [], {}
        if key is not None:
            x = dropout(x, c.dropout, jax.random.fold_in(key, c.depth))
        for i in range(c.depth):  # a list, not a scan: faster on a CPU and in decoding
            kv = None if cache is None else (cache.k[i], cache.v[i])
            layer_key = None if key is None else jax.random.fold_in(key, i)
            x, kv, captured = Block(c, self.rotary, name=f"block_{i}")(x, position, sight, kv, layer_key, capture)
            kvs.append(kv)
            out |= {f"block_{i}/{name}": value for name, value in captured.items()}
        return Norm(c.norm, c.norm_eps, name="norm")(x), kvs, out
