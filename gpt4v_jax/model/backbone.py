"""The stack of transformer blocks. It knows streams and memory; it does not know what a picture is."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from gpt4v_jax import batch as batch_lib
from gpt4v_jax import config
from gpt4v_jax.model import attention
from gpt4v_jax.model.layers import MLP, Linear, Norm, Table, Vector, dropout, named, numbered
from gpt4v_jax.sharding import shard

SAVED = {  # config.Compute.remat -> what of a block's values waits for the backward pass
    "minimal": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
    "offload": jax.checkpoint_policies.offload_dot_with_no_batch_dims("device", "pinned_host"),
}


def routed(route: batch_lib.Route | None, f, x):
    """f(prefix, x [B,T,...]) -> [B,T,...], which makes modules whose names start with `prefix`. With a route the
    positions of each modality have modules of their own (mixture of transformers, Liang et al. 2024)."""
    y = f("", x)
    if route is None or not route.names:
        return y

    def take(x, at):
        return jnp.take_along_axis(x, at.reshape(*at.shape, *[1] * (x.ndim - 2)), axis=1)

    own = [f(f"{name}_", take(x, at)) for name, at in zip(route.names, route.at, strict=True)]
    own = take(jnp.concatenate(own, axis=1), jnp.maximum(route.slot, 0))
    return jnp.where((route.slot >= 0).reshape(*route.slot.shape, *[1] * (y.ndim - 2)), own, y)


class Attention(nn.Module):
    """Multi-head attention (grouped-query where kv_heads < heads) of x [B,T,D] over itself, or over a memory.

    `window`, `rope`: of this block; rope is None where queries and keys have no rotary positions.
    """

    config: config.Backbone
    out_gain: float
    window: int = 0
    rope: tuple[float, config.RopeScaling] | None = None

    @nn.compact
    def __call__(self, x_BTD, position_BT, sight: attention.Sight, kv=None, bias=None, capture=False, memory_BSD=None,
                 route=None):  # fmt: skip
        """-> ([B,T,D], what kv has become, captured).

        kv: the cached k and v [B,K,S,H], which the stream's are written to at sight.cursor, or the memory's put behind.
        memory_BSD: keys and values come from it, however wide it is; then x may be one query [B,1,D] for all positions.
        bias: of relative positions.
        """
        c, D = self.config, x_BTD.shape[-1]

        def project(name, heads, prefix, x):
            y = Linear((x.shape[-1],), (heads, c.head_dim), "qkv" in c.bias, name=prefix + name)(x)
            if not c.qk_norm or name == "value":
                return y
            return Norm("rms" if c.norm == "layer" else c.norm, c.norm_eps, name=f"{prefix}{name}_norm")(y)

        source = x_BTD if memory_BSD is None else memory_BSD
        sources = (("query", c.heads, x_BTD), ("key", c.kv_heads, source), ("value", c.kv_heads, source))
        q, k, v = (routed(route, functools.partial(project, name, heads), x) for name, heads, x in sources)
        if self.rope:
            q, k = attention.rope(q, position_BT, *self.rope), attention.rope(k, position_BT, *self.rope)
        q, k, v = (shard(x, "batch", None, "heads") for x in (q, k, v))
        if kv is not None:
            fresh = [x.astype(old.dtype).swapaxes(1, 2) for x, old in zip((k, v), kv, strict=True)]
            if memory_BSD is None:
                kv = tuple(attention.entered(old, x, sight.cursor) for x, old in zip(fresh, kv, strict=True))
            else:
                kv = tuple(jnp.concatenate(pair, axis=2) for pair in zip(kv, fresh, strict=True))
            k, v = (x.swapaxes(1, 2) for x in kv)
        q = jnp.broadcast_to(q, (*sight.q_step.shape, *q.shape[2:]))
        x_BTNH = attention.attend(q, k, v, sight, c.attention_scale or None, c.attention_cap, self.window, bias)

        def out(prefix, x):
            return Linear((c.heads, c.head_dim), (D,), "out" in c.bias, self.out_gain, name=f"{prefix}out")(x)

        return routed(route, out, x_BTNH), kv, {"query": q, "key": k} if capture else {}


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); where the norms stand is config.norm_place.

    `kind` says what it does besides. inject: vectors are added first. gated: x + tanh(a) attention(norm(x), memory) and
    x + tanh(b) mlp(norm(x)) come before all, a and b from 0 on (Flamingo, Alayrac et al. 2022). pooled: x + attention
    of one learned query to the memory comes before all. cross: x + attention(norm(x), memory) before the mlp.
    """

    config: config.Backbone
    kind: str
    rotary: bool

    @nn.compact
    def __call__(self, x, position, sight, kv=None, memory=None, bias=None, keys=None, capture=False, inject=None,
                 route=None):  # fmt: skip
        """memory: (its vectors, the k and v of what was there before or None, the sight on both) -> (x, (k, v),
        memory's (k, v), out)."""
        c, parts = self.config, self.kind.split("+")
        out_gain = (2 * c.depth) ** -0.5  # the residual stream's variance does not grow with depth (GPT-2)

        def norm(name, x):
            return routed(route, lambda prefix, x: Norm(c.norm, c.norm_eps, name=f"{prefix}{name}_norm")(x), x)

        def mlp(name, x):
            def one(prefix, x):
                return MLP(c.hidden, c.activation, "mlp" in c.bias, out_gain, name=prefix + name)(x)

            return routed(route, one, x)

        def before(name):
            return x if c.norm_place == "post" else norm(name, x)

        def after(name, branch):
            if c.norm_place == "sandwich":
                branch = norm(f"{name}_post", branch)
            if c.layer_scale:
                branch *= Vector(branch.shape[-1], c.layer_scale, name=f"{name}_scale")().astype(branch.dtype)
            total = shard(x + dropout(branch, c.dropout, keys, name), "batch")
            return norm(name, total) if c.norm_place == "post" else total

        def read(query):
            """-> (attention of the query to the memory, the memory's k and v, what is captured)."""
            vectors, kv, sight = memory
            return Attention(c, out_gain, name="cross")(query, None, sight, kv, None, capture, vectors)

        def gated(name, branch):
            gate = jnp.tanh(Vector(0, name=f"{name}_gate")()).astype(branch.dtype)
            return shard(x + gate * dropout(branch, c.dropout, keys, name), "batch")

        memory_kv, looked = None, {}
        if "inject" in parts:
            x = x + inject.astype(x.dtype)
        if "gated" in parts:
            mixed, memory_kv, looked = read(norm("cross", x))
            x = gated("cross", mixed)
            x = gated("cross_mlp", mlp("cross_mlp", norm("cross_mlp", x)))
        if "pooled" in parts:
            probe = Vector(c.width, std=1.0, name="probe")().astype(x.dtype)
            mixed, memory_kv, looked = read(jnp.broadcast_to(probe, (x.shape[0], 1, c.width)))
            x = shard(x + dropout(mixed, c.dropout, keys, "cross"), "batch")

        local = "local" in parts
        rope = (c.rope_theta, c.rope_scaling)
        if local and c.local_theta:
            rope = (c.local_theta, config.RopeScaling())
        attend = Attention(c, out_gain, c.window if local else 0, rope if self.rotary else None, name="attention")
        mixed, kv, out = attend(before("attention"), position, sight, kv, bias, capture, route=route)
        x = after("attention", mixed)
        if "cross" in parts:
            mixed, memory_kv, looked = read(before("cross"))
            x = after("cross", mixed)
        out |= {f"cross/{name}": value for name, value in looked.items()}
        return after("mlp", mlp("mlp", before("mlp"))), kv, memory_kv, out


class Backbone(nn.Module):
    """x [B,T,D] -> (final hidden states [B,T,D], the layers' k and v, the memory's, {name: what was captured}).

    Parameters lie in one tree for each block, however the blocks are computed: `compute` may make one loop of them
    (what the loop runs over is stacked on the way), and may have the backward pass compute them again.
    """

    config: config.Backbone
    rotary: bool = False
    both_ways: bool = False  # relative positions tell keys ahead from keys behind
    last_norm: bool = True
    compute: config.Compute = config.Compute()
    taps: tuple[int, ...] = ()  # numbers of blocks whose results are captured, as "block_3"

    @nn.compact
    def __call__(self, x, position, sight, cache: attention.Cache | None = None, keys=None, capture=False, memory=None,
                 inject=(), route=None):  # fmt: skip
        """memory, for blocks that read one: (vectors [B,S,D], the sight on them; with a cache, on its memory and them).

        keys [B]: random keys of the rows, for dropout. inject: [B,T,D] for each `inject` block. route: of `routed`.
        """
        c = self.config
        kvs, memory_kvs, out = [], [], {}
        if keys is not None:
            keys = named(keys, "/".join(self.path))
            x = dropout(x, c.dropout, keys, "stream")
        table = Table(c.buckets, c.heads, name="relative") if c.buckets else None
        plain = cache is not None or capture or self.is_initializing()
        if plain or (self.compute.remat == "none" and not self.compute.scan):
            for i, (kind, added) in enumerate(zip(c.kinds, self._injected(inject), strict=True)):
                # A list, not a loop: faster on a CPU and in decoding.
                kv = None if cache is None else (cache.k[i], cache.v[i])
                block_memory = None
                if _reads(kind):
                    before = None if cache is None else cache.memory[len(memory_kvs)]
                    block_memory = (memory[0], before, memory[1])
                block = Block(c, kind, self.rotary, name=f"block_{i}")
                block_keys, bias = _numbered(keys, i), self._bias(table)
                x, kv, memory_kv, captured = block(
                    x, position, sight, kv, block_memory, bias, block_keys, capture, added, route
                )
                kvs.append(kv)
                if _reads(kind):
                    memory_kvs.append(memory_kv)
                out |= {f"block_{i}/{name}": value for name, value in captured.items()}
                out |= {f"block_{i}": x} if i in self.taps else {}
        else:
            x, states = self._pure(x, position, sight, keys, memory, inject, route)
            out = {f"block_{i}": states[i] for i in self.taps}
        if c.norm_place != "post" and self.last_norm:
            x = Norm(c.norm, c.norm_eps, name="norm")(x)
        return x, kvs, tuple(memory_kvs), out

    def _injected(self, inject) -> list:
        """-> what each block adds to the stream, None for most."""
        left = iter(inject)
        return [next(left) if "inject" in kind else None for kind in self.config.kinds]

    def _bias(self, table):
        """-> what attention adds to its scores: distances [B,T,S] -> [B,N,T,S]; None without relative positions."""
        if table is None:
            return None
        c = self.config

        def bias(behind_BTS):
            ids = attention.bucket(behind_BTS, c.buckets, c.bucket_distance, self.both_ways)
            return table(ids).transpose(0, 3, 1, 2)

        return bias

    def _pure(self, x, position, sight, keys, memory, inject, route):
        """The blocks as a pure function of their parameters, for jax.checkpoint and jax.lax.scan -> (x, the result of
        every block where some are tapped)."""
        c, compute, params = self.config, self.compute, self.variables["params"]
        read = (memory[0], None, memory[1]) if memory else None
        table = None
        if c.buckets:
            table = functools.partial(Table(c.buckets, c.heads, parent=None).apply, {"params": params["relative"]})

        def one(kind, x, i, block_params, added):
            block, block_memory = Block(c, kind, self.rotary, parent=None), read if _reads(kind) else None
            args = (x, position, sight, None, block_memory, self._bias(table), _numbered(keys, i), False, added, route)
            return block.apply({"params": block_params}, *args)[0]

        if compute.remat != "none":
            one = jax.checkpoint(one, policy=SAVED[compute.remat], static_argnums=0)

        def run(x, period):
            """period: [(number of the block, its parameters, what it adds)], from the first kind of the pattern on."""
            states = []
            for kind, block in zip(c.pattern, period, strict=False):
                x = one(kind, x, *block)
                states.append(x)
            return x, states if self.taps else []

        blocks = [(i, params[f"block_{i}"], added) for i, added in enumerate(self._injected(inject))]
        P = len(c.pattern)
        periods = [blocks[i : i + P] for i in range(0, c.depth, P)]
        whole, states = c.depth // P if compute.scan else 0, []
        if whole:
            stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *periods[:whole])
            x, of_periods = jax.lax.scan(run, x, stacked, unroll=compute.scan)
            states += [state[k] for k in range(whole) for state in of_periods]
        for period in periods[whole:]:
            x, more = run(x, period)
            states += more
        return x, states


def _reads(kind: str) -> bool:
    return any(part in config.READS for part in kind.split("+"))


def _numbered(keys, number):
    return None if keys is None else numbered(keys, number)
