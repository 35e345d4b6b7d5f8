"""The layers that own parameters; every `self.param` of the project is here.

The alphabet of shapes, used in names (x_BTD) and comments throughout:
B batch, T stream, S segment, D width, N heads, K kv-heads, G = N / K, H head dim, F hidden, V vocabulary, M patches,
p values a patch.
"""

import math
import re
import zlib

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from gpt4v_jax.sharding import shard

ACTIVATIONS = {
    "gelu": lambda x: 0.5 * x * (1 + jax.lax.erf(x * 0.5**0.5)),  # nn.gelu's erfc takes 1.6 times as long
    "gelu_tanh": nn.gelu,
    "quick_gelu": lambda x: x * nn.sigmoid(1.702 * x),  # Hendrycks & Gimpel 2016; CLIP's
    "relu": nn.relu,
    "silu": nn.silu,
    "swiglu": nn.silu,
    "geglu": nn.gelu,
}
GATED = ("swiglu", "geglu")  # the activated gate multiplies the values (Shazeer 2020)


WHOLE = 8  # rows of a step, to which fewer are filled up where values are summed: on a CPU XLA sums few in other orders
FEW = 32  # rows of a product up to which, on a CPU, integers are faster than a kernel of 8 bits made float32


@flax.struct.dataclass
class Turned:
    """A matrix with its outputs first, in place of a kernel or a table. In 8 bits row i is values[i] * scale[i]."""

    values: jax.Array  # [outputs, inputs] float32, or int8 from -127 to 127
    scale: jax.Array | None = None  # [outputs] float32, of int8
    digits: int = flax.struct.field(pytree_node=False, default=2)  # of int8: how many of 8 bits hold a value of x

    def product(self, x):
        """[N,inputs] -> [N,outputs] float32."""
        x = x.astype(jnp.float32)
        if self.scale is None:
            return _product(self.values, x)
        if len(x) <= FEW and jax.default_backend() == "cpu":
            return self._by_integers(x)
        return _product(self.values.astype(x.dtype), x) * self.scale

    def _by_integers(self, x):
        """Of few rows on a CPU, for XLA would write all of the matrix as float32 first, which takes longer than to
        read it so. Each row is its largest value times digits of 8 bits, two are 15 bits in all; sums are exact."""
        unit = jnp.maximum(jnp.abs(x).max(axis=1, keepdims=True), 1e-30) / 127
        high = jnp.round(x / unit)
        # One row alone would fall to a scalar loop: it has its second digit all the same.
        low = [jnp.round((x / unit - high) * 254)] if self.digits == 2 or len(x) == 1 else []
        digits = jnp.concatenate([high, *low]).astype(jnp.int8)
        if len(digits) > 2:
            sums = _product(self.values, digits, jnp.int32)
        else:
            sums = jax.lax.dot_general(digits, self.values, _LAST, preferred_element_type=jnp.int32)
        sums = sums.astype(jnp.float32)
        y = sums[: len(x)] + sums[len(x) :] / 254 if self.digits == 2 else sums[: len(x)]
        return y * unit * self.scale

    def take(self, ids):
        """ids [...] -> rows [...,inputs] float32."""
        rows = jnp.take(self.values, ids, axis=0)
        return rows if self.scale is None else rows * jnp.take(self.scale, ids, axis=0)[..., None]


_LAST = (((1,), (1,)), ((), ()))  # dot_general's numbers where both matrices have their inputs last


def _product(values, x, dtype=None):
    """values [outputs,inputs], x [N,inputs] -> [N,outputs]. With the matrix first XLA is faster on a CPU for few rows
    (docs/results/decode.md), unless it makes one loop of product and transpose: the barrier keeps them two."""
    y = jax.lax.dot_general(values, x, _LAST, preferred_element_type=dtype)
    return (jax.lax.optimization_barrier(y) if jax.default_backend() == "cpu" else y).T


def product(x, kernel):
    """x [N,inputs], a kernel [inputs,outputs] or Turned -> [N,outputs] in the kernel's dtype."""
    return kernel.product(x) if isinstance(kernel, Turned) else x.astype(kernel.dtype) @ kernel


class Matrix(nn.Module):
    """A module with a matrix that may be Turned."""

    def matrix(self, name: str, init, shape: tuple[int, ...]):
        found = self.get_variable("params", name)
        return found if isinstance(found, Turned) else self.param(name, init, shape)


class Linear(Matrix):
    """y = x W + b over the last len(inputs) dimensions of x: [..., *inputs] -> [..., *outputs].

    W starts with standard deviation gain / sqrt(fan-in), and its dtype is that of the product and of y. The product is
    one flat matrix product, which XLA runs faster on a CPU than the batched form.
    """

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    bias: bool = False
    gain: float = 1.0

    @nn.compact
    def __call__(self, x):
        fan_in, fan_out = math.prod(self.inputs), math.prod(self.outputs)
        init = nn.initializers.normal(self.gain * fan_in**-0.5)
        kernel = self.matrix("kernel", init, self.inputs + self.outputs)
        rows = x.shape[: x.ndim - len(self.inputs)]
        if x.shape[len(rows) :] != self.inputs:
            raise ValueError(f"{self.path}: expected [..., {self.inputs}], got {x.shape}")
        flat = kernel if isinstance(kernel, Turned) else kernel.reshape(fan_in, fan_out)
        y = product(x.reshape(-1, fan_in), flat)
        y = y.reshape(*rows, *self.outputs)
        return y + self.param("bias", nn.initializers.zeros, self.outputs).astype(y.dtype) if self.bias else y


def inputs(path: str, ndim: int) -> int:
    """How many of a kernel's dimensions are its inputs, the first ones; what joins heads has all but the last."""
    return ndim - 1 if re.search(r"(attention|cross)/(\w+_)?out/kernel$", path) else 1


class Kernel(Matrix):
    """A bare matrix [inputs, outputs] that starts like Linear's, for who takes the product in pieces."""

    inputs: int
    outputs: int
    gain: float = 1.0

    @nn.compact
    def __call__(self):
        init = nn.initializers.normal(self.gain * self.inputs**-0.5)
        return self.matrix("kernel", init, (self.inputs, self.outputs))


class Table(Matrix):
    """A table of `rows` learned vectors: ids [...] -> [..., width]. It is the tied head, too."""

    rows: int
    width: int
    std: float = 0.02

    def setup(self):
        self.table = self.matrix("table", nn.initializers.normal(self.std), (self.rows, self.width))

    def __call__(self, ids):
        if isinstance(self.table, Turned):
            return self.table.take(ids)
        # Gathered whole first: from a table that lies in parts XLA would move every row's vectors to every device.
        return jnp.take(shard(self.table), ids, axis=0)


class Vector(nn.Module):
    """A learned vector [width], or a number [] with width 0, that starts with standard deviation std around `start`."""

    width: int
    start: float = 0.0
    std: float = 0.0

    @nn.compact
    def __call__(self):
        def init(key, shape):
            return self.start + self.std * jax.random.normal(key, shape)

        return self.param("value", init, (self.width,) if self.width else ())


class Norm(nn.Module):
    """RMSNorm (Zhang & Sennrich 2019) or LayerNorm (Ba et al. 2016) over the last dimension, in float32.

    rms_plus_one multiplies by 1 + scale, and scale starts at 0 (Gemma): weight decay then draws it towards 1.
    """

    kind: str
    eps: float

    @nn.compact
    def __call__(self, x):
        dtype, rows, x = x.dtype, len(x), x.astype(jnp.float32)
        if x.shape[1:2] == (1,) and rows < WHOLE and jax.default_backend() == "cpu":
            x = jax.lax.optimization_barrier(jnp.pad(x, [(0, WHOLE - rows)] + [(0, 0)] * (x.ndim - 1)))
        if self.kind == "layer":
            x -= x.mean(-1, keepdims=True)
        x *= jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + self.eps)
        if self.kind == "rms_plus_one":
            x *= 1 + self.param("scale", nn.initializers.zeros, (x.shape[-1],))
        else:
            x *= self.param("scale", nn.initializers.ones, (x.shape[-1],))
        if self.kind == "layer":
            x += self.param("bias", nn.initializers.zeros, (x.shape[-1],))
        return x[:rows].astype(dtype)


class MLP(nn.Module):
    """D -> F -> D; with a gate the activated gate multiplies the F values."""

    hidden: int
    activation: str
    bias: bool
    out_gain: float = 1.0

    @nn.compact
    def __call__(self, x_BTD):
        D = x_BTD.shape[-1]
        act = ACTIVATIONS[self.activation]
        up_BTF = Linear((D,), (self.hidden,), self.bias, name="up")(x_BTD)
        if self.activation in GATED:
            up_BTF *= act(Linear((D,), (self.hidden,), self.bias, name="gate")(x_BTD))
        else:
            up_BTF = act(up_BTF)
        up_BTF = shard(up_BTF, "batch", None, "hidden")
        return Linear((self.hidden,), (D,), self.bias, self.out_gain, name="down")(up_BTF)


def named(keys, name: str):
    """Random keys [B] and a name -> keys [B] of their own, whatever other names there are."""
    salt = zlib.crc32(name.encode())
    return jax.vmap(lambda key: jax.random.fold_in(key, salt))(keys)


def numbered(keys, number):
    """Random keys [B] and a number, which may be traced -> keys [B] of their own."""
    return jax.vmap(lambda key: jax.random.fold_in(key, number))(keys)


def dropout(x, rate: float, keys, name: str):
    """Zeroes each value of x [B,...] with probability `rate` and scales the rest.

    keys [B]: of each row, so that what is drawn depends neither on the other rows nor on who holds them. No keys
    (evaluation) or rate 0: x itself.
    """
    if keys is None or rate == 0:
        return x
    keep = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - rate, x.shape[1:]))(named(keys, name))
    return jnp.where(keep, x / (1 - rate), 0)
