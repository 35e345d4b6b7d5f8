"""Rows and keys that several families share. `theirs` and `ours` are prefixes; a bias's row counts where ours has one.

The axes of patterns: V vocabulary, T positions, D width, F hidden, N heads, H head dim, C colours, P x Q a patch.
"""

from gpt4v_jax.interop.table import Key, Row

MLP = (("gelu", "gelu"), ("gelu_new", "gelu_tanh"), ("gelu_pytorch_tanh", "gelu_tanh"), ("quick_gelu", "quick_gelu"),
       ("relu", "relu"), ("silu", "silu"), ("swish", "silu"))  # fmt: skip
GATED = (("silu", "swiglu"), ("swish", "swiglu"), ("gelu_pytorch_tanh", "geglu"), ("gelu_new", "geglu"))
NONE = ((None, 0),)  # theirs None is our 0
NO_CAP = ((None, 0.0),)


def key(theirs: str, ours: str, default, values=()) -> Key:
    """ours: paths with blanks between them."""
    return Key(theirs, tuple(ours.split()), default, values)


def norm(theirs: str, ours: str) -> tuple[Row, ...]:
    return Row(f"{theirs}.weight", f"{ours}/scale", "D -> D"), Row(f"{theirs}.bias", f"{ours}/bias", "D -> D")


def linear(theirs: str, ours: str, only: str = "") -> tuple[Row, ...]:
    """torch.nn.Linear, whose matrix is [out, in]."""
    weight = Row(f"{theirs}.weight", f"{ours}/kernel", "F D -> D F", only=only)
    return weight, Row(f"{theirs}.bias", f"{ours}/bias", "F -> F", only=only)


def into_heads(theirs: str, ours: str) -> tuple[Row, ...]:
    weight = Row(f"{theirs}.weight", f"{ours}/kernel", "(N H) D -> D N H")
    return weight, Row(f"{theirs}.bias", f"{ours}/bias", "(N H) -> N H")


def from_heads(theirs: str, ours: str) -> tuple[Row, ...]:
    weight = Row(f"{theirs}.weight", f"{ours}/kernel", "D (N H) -> N H D")
    return weight, Row(f"{theirs}.bias", f"{ours}/bias", "D -> D")


def attention(theirs: str, ours: str, names: tuple[str, str, str, str]) -> tuple[Row, ...]:
    """names: theirs of query, key, value, out."""
    query, key_, value, out = (f"{theirs}.{name}" for name in names)
    return (
        *into_heads(query, f"{ours}/query"), *into_heads(key_, f"{ours}/key"), *into_heads(value, f"{ours}/value"),
        *from_heads(out, f"{ours}/out"),
    )  # fmt: skip


def table(theirs: str, ours: str) -> Row:
    return Row(theirs, f"{ours}/table", "T D -> T D")


def patches(theirs: str, ours: str) -> tuple[Row, ...]:
    """A convolution whose steps are its size <-> the matrix of flat patches, row by row, RGB."""
    weight = Row(f"{theirs}.weight", f"{ours}/kernel", "D C P Q -> (P Q C) D")
    return weight, Row(f"{theirs}.bias", f"{ours}/bias", "D -> D")


def pixels(ours: str, mean: tuple, std: tuple) -> tuple[Key, ...]:
    """preprocessor_config.json: how pixels are normalised."""
    return (
        key("preprocessor.image_mean", f"{ours}mean", mean), key("preprocessor.image_std", f"{ours}std", std),
        Key("preprocessor.do_normalize", (), True), Key("preprocessor.do_rescale", (), True),
        Key("preprocessor.rescale_factor", (), 1 / 255),
    )  # fmt: skip


def period(kinds: list[str]) -> tuple[str, ...]:
    """The kinds of all blocks -> the shortest pattern that repeats to them."""
    lengths = range(1, len(kinds) + 1)
    return next(tuple(kinds[:n]) for n in lengths if all(k == kinds[i % n] for i, k in enumerate(kinds)))


def biases(**parts: bool) -> tuple[str, ...]:
    return tuple(part for part, there in parts.items() if there)
