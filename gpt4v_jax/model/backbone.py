"""The stack of transformer blocks. It knows streams and memory; it does not know what a picture is."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from gpt4v_jax import config
from gpt4v_jax.model import attention
from gpt4v_jax.model.layers import MLP, Linear, Norm, Table, Vector, dropout, named, numbered
from gpt4v_jax.sharding import shard

SAVED = {  # config.Compute.remat -> what of a block's values waits for the backward pass
    "minimal": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
    "offload": jax.checkpoint_policies.offload_dot_with_no_batch_dims("device", "pinned_host"),
}


class Attention(nn.Module):
    """Multi-head attention (grouped-query where kv_heads < heads) of x [B,T,D] over itself, or over a memory.

    `window`, `rope`: of this block; rope is None where queries and keys have no rotary positions.
    """

    config: config.Backbone
    out_gain: float
    window: int = 0
    rope: tuple[float, config.RopeScaling] | None = None

    @nn.compact
    def __call__(self, x_BTD, position_BT, sight: attention.Sight, kv=None, bias=None, capture=False, memory_BSD=None):
        """-> ([B,T,D], (k, v), captured).

        kv: the cached k and v that this stream's are written to at sight.cursor. memory_BSD: keys and values come from
        it; or, where it was read before, kv is all of them as it stands. bias: of relative positions.
        """
        c, D = self.config, x_BTD.shape[-1]

        def project(name, heads, x):
            y = Linear((D,), (heads, c.head_dim), "qkv" in c.bias, name=name)(x)
            if not c.qk_norm or name == "value":
                return y
            return Norm("rms" if c.norm == "layer" else c.norm, c.norm_eps, name=f"{name}_norm")(y)

        q = project("query", c.heads, x_BTD)
        if kv is None or sight.cursor is not None:
            source = x_BTD if memory_BSD is None else memory_BSD
            k, v = project("key", c.kv_heads, source), project("value", c.kv_heads, source)
            if self.rope:
                q, k = attention.rope(q, position_BT, *self.rope), attention.rope(k, position_BT, *self.rope)
            q, k, v = (shard(x, "batch", None, "heads") for x in (q, k, v))
            if kv is not None:
                at = (0, sight.cursor, 0, 0)
                fresh = (x.astype(old.dtype) for x, old in zip((k, v), kv, strict=True))
                k, v = (jax.lax.dynamic_update_slice(old, x, at) for x, old in zip(fresh, kv, strict=True))
        else:
            k, v = kv
        x_BTNH = attention.attend(q, k, v, sight, c.attention_scale or None, c.attention_cap, self.window, bias)
        out = Linear((c.heads, c.head_dim), (D,), "out" in c.bias, self.out_gain, name="out")(x_BTNH)
        return out, (k, v), {"query": q, "key": k} if capture else {}


class Block(nn.Module):
    """x + attention(norm(x)), in cross blocks x + attention(norm(x), memory), then x + mlp(norm(x)).

    Where the norms stand is config.norm_place.
    """

    config: config.Backbone
    kind: str
    rotary: bool

    @nn.compact
    def __call__(self, x, position, sight, kv=None, memory=None, bias=None, keys=None, capture=False):
        """memory: (its vectors or None, its k and v or None, the sight on it) -> (x, (k, v), memory's (k, v), out)."""
        c = self.config
        out_gain = (2 * c.depth) ** -0.5  # the residual stream's variance does not grow with depth (GPT-2)
        norm = functools.partial(Norm, c.norm, c.norm_eps)

        def before(name):
            return x if c.norm_place == "post" else norm(name=f"{name}_norm")(x)

        def after(name, branch):
            if c.norm_place == "sandwich":
                branch = norm(name=f"{name}_post_norm")(branch)
            if c.layer_scale:
                branch *= Vector(branch.shape[-1], c.layer_scale, name=f"{name}_scale")().astype(branch.dtype)
            total = shard(x + dropout(branch, c.dropout, keys, name), "batch")
            return norm(name=f"{name}_norm")(total) if c.norm_place == "post" else total

        local = self.kind == "local"
        rope = (c.rope_theta, c.rope_scaling)
        if local and c.local_theta:
            rope = (c.local_theta, config.RopeScaling())
        attend = Attention(c, out_gain, c.window if local else 0, rope if self.rotary else None, name="attention")
        mixed, kv, out = attend(before("attention"), position, sight, kv, bias, capture)
        x = after("attention", mixed)
        memory_kv = None
        if self.kind == "cross":
            vectors, memory_kv, memory_sight = memory
            attend = Attention(c, out_gain, name="cross")
            mixed, memory_kv, _ = attend(before("cross"), position, memory_sight, memory_kv, memory_BSD=vectors)
            x = after("cross", mixed)
        mixed = MLP(c.hidden, c.activation, "mlp" in c.bias, out_gain, name="mlp")(before("mlp"))
        return after("mlp", mixed), kv, memory_kv, out


class Backbone(nn.Module):
    """x [B,T,D] -> (final hidden states [B,T,D], the layers' k and v, the memory's, captured q and k by layer).

    Parameters lie in one tree for each block, however the blocks are computed: `compute` may make one loop of them
    (what the loop runs over is stacked on the way), and may have the backward pass compute them again.
    """

    config: config.Backbone
    rotary: bool = False
    both_ways: bool = False  # relative positions tell keys ahead from keys behind
    last_norm: bool = True
    compute: config.Compute = config.Compute()

    @nn.compact
    def __call__(self, x, position, sight, cache: attention.Cache | None = None, keys=None, capture=False, memory=None):
        """memory, for cross blocks: (vectors [B,S,D], or None where `cache` has their k and v; the sight on them).

        keys [B]: random keys of the rows, for dropout.
        """
        c = self.config
        kvs, memory_kvs, out = [], [], {}
        if keys is not None:
            keys = named(keys, "/".join(self.path))
            x = dropout(x, c.dropout, keys, "stream")
        table = Table(c.buckets, c.heads, name="relative") if c.buckets else None
        plain = cache is not None or capture or self.is_initializing()
        if plain or (self.compute.remat == "none" and not self.compute.scan):
            for i, kind in enumerate(c.kinds):  # a list, not a loop: faster on a CPU and in decoding
                kv = None if cache is None else (cache.k[i], cache.v[i])
                block_memory = None
                if kind == "cross":
                    vectors, memory_sight = memory
                    read = cache.memory[len(memory_kvs)] if vectors is None else None
                    block_memory = (vectors, read, memory_sight)
                block = Block(c, kind, self.rotary, name=f"block_{i}")
                block_keys, bias = _numbered(keys, i), self._bias(table)
                x, kv, memory_kv, captured = block(x, position, sight, kv, block_memory, bias, block_keys, capture)
                kvs.append(kv)
                if kind == "cross":
                    memory_kvs.append(memory_kv)
                out |= {f"block_{i}/{name}": value for name, value in captured.items()}
        else:
            x = self._pure(x, position, sight, keys, memory)
        if c.norm_place != "post" and self.last_norm:
            x = Norm(c.norm, c.norm_eps, name="norm")(x)
        return x, kvs, tuple(memory_kvs), out

    def _bias(self, table):
        """-> what attention adds to its scores: distances [B,T,S] -> [B,N,T,S]; None without relative positions."""
        if table is None:
            return None
        c = self.config

        def bias(behind_BTS):
            ids = attention.bucket(behind_BTS, c.buckets, c.bucket_distance, self.both_ways)
            return table(ids).transpose(0, 3, 1, 2)

        return bias

    def _pure(self, x, position, sight, keys, memory):
        """The blocks as a pure function of their parameters, for jax.checkpoint and jax.lax.scan."""
        c, compute, params = self.config, self.compute, self.variables["params"]
        read = (memory[0], None, memory[1]) if memory else None
        table = None
        if c.buckets:
            table = functools.partial(Table(c.buckets, c.heads, parent=None).apply, {"params": params["relative"]})

        def one(kind, x, i, block_params):
            block, block_memory = Block(c, kind, self.rotary, parent=None), read if kind == "cross" else None
            args = (x, position, sight, None, block_memory, self._bias(table), _numbered(keys, i))
            return block.apply({"params": block_params}, *args)[0]

        if compute.remat != "none":
            one = jax.checkpoint(one, policy=SAVED[compute.remat], static_argnums=0)

        def run(x, period):
            """period: [(number of the block, its parameters)], from the first kind of the pattern on."""
            for kind, (i, block_params) in zip(c.pattern, period, strict=False):
                x = one(kind, x, i, block_params)
            return x

        blocks = [(i, params[f"block_{i}"]) for i in range(c.depth)]
        P = len(c.pattern)
        periods = [blocks[i : i + P] for i in range(0, c.depth, P)]
        whole = c.depth // P if compute.scan else 0
        if whole:
            stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *periods[:whole])
            x, _ = jax.lax.scan(lambda x, period: (run(x, period), None), x, stacked, unroll=compute.scan)
        for period in periods[whole:]:
            x = run(x, period)
        return x


def _numbered(keys, number):
    return None if keys is None else numbered(keys, number)
