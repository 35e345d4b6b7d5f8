"""Files of llama2.c: one written here in the documented order, files that are none, and the real stories260K."""

import pickle
import struct
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from gpt4v_jax import batch as batch_lib
from gpt4v_jax import config
from gpt4v_jax.data import chat
from gpt4v_jax.generate import decode
from gpt4v_jax.generate import prompts as prompts_lib
from gpt4v_jax.interop import hf, llama2c
from gpt4v_jax.model import attention
from gpt4v_jax.training.workdir import Trained

STORIES = Path(__file__).parents[3] / "shared" / "data" / "weights-stories260k"
TEXT = (
    "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. One day, she saw a "
    "big, red ball. She wanted to play with it, but it was too high."
)
WIDTH, HIDDEN, DEPTH, HEADS, KV_HEADS, CONTEXT, HEAD_DIM = 16, 24, 2, 4, 2, 12, 4
PIECES = ["<unk>", "\n<s>\n", "\n</s>\n", *(f"<0x{i:02X}>" for i in range(256)), "a", "b", " ", "ab", " ab", "é", "ba"]
SHAPES = {  # of a file, in its order
    "embed": (len(PIECES), WIDTH), "attention_norm": (DEPTH, WIDTH), "q": (DEPTH, WIDTH, WIDTH),
    "k": (DEPTH, KV_HEADS * HEAD_DIM, WIDTH), "v": (DEPTH, KV_HEADS * HEAD_DIM, WIDTH), "o": (DEPTH, WIDTH, WIDTH),
    "mlp_norm": (DEPTH, WIDTH), "gate": (DEPTH, HIDDEN, WIDTH), "down": (DEPTH, WIDTH, HIDDEN),
    "up": (DEPTH, HIDDEN, WIDTH), "norm": (WIDTH,), "rope": (2, CONTEXT, HEAD_DIM // 2), "head": (len(PIECES), WIDTH),
}  # fmt: skip


def values(tied: bool) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    made = {name: rng.normal(size=shape).astype("<f4") for name, shape in SHAPES.items()}
    return {name: x for name, x in made.items() if not (tied and name == "head")}


def write(folder: Path, tied=True, pieces=PIECES) -> tuple[Path, Path]:
    """-> (model, tokenizer)."""
    vocab = len(PIECES) if tied else -len(PIECES)
    header = struct.pack("<7i", WIDTH, HIDDEN, DEPTH, HEADS, KV_HEADS, vocab, CONTEXT)
    (folder / "m.bin").write_bytes(header + b"".join(x.tobytes() for x in values(tied).values()))
    words = [(float(-i) if i > 258 else 0.0, piece.encode()) for i, piece in enumerate(pieces)]
    data = b"".join(struct.pack("<fi", score, len(word)) + word for score, word in words)
    (folder / "t.bin").write_bytes(struct.pack("<i", 8) + data)
    return folder / "m.bin", folder / "t.bin"


@pytest.mark.parametrize("tied", [True, False])
def test_tensors_are_where_the_file_has_them(tied, tmp_path):
    imported, _ = llama2c.load(*write(tmp_path, tied))
    c, there, params = imported.config, values(tied), imported.params
    sizes = c.backbone.width, c.backbone.hidden, c.backbone.depth, c.backbone.heads, c.backbone.kv_heads
    assert sizes == (WIDTH, HIDDEN, DEPTH, HEADS, KV_HEADS) and (c.vocab, c.context) == (len(PIECES), CONTEXT)
    assert c.tied is tied and c.backbone.norm_eps == 1e-5 and ("head" in params) is not tied
    np.testing.assert_array_equal(params["text"]["embed"]["table"], there["embed"])
    np.testing.assert_array_equal(params["backbone"]["norm"]["scale"], there["norm"])
    if not tied:
        np.testing.assert_array_equal(params["head"]["kernel"], there["head"].T)
    for i in range(DEPTH):
        block = params["backbone"][f"block_{i}"]
        for name in ("gate", "up", "down"):
            np.testing.assert_array_equal(block["mlp"][name]["kernel"], there[name][i].T)
        for name in ("attention", "mlp"):
            np.testing.assert_array_equal(block[f"{name}_norm"]["scale"], there[f"{name}_norm"][i])
        value, out = (np.asarray(block["attention"][name]["kernel"]) for name in ("value", "out"))
        np.testing.assert_array_equal(value.reshape(WIDTH, -1), there["v"][i].T)
        np.testing.assert_array_equal(out.reshape(-1, WIDTH), there["o"][i].T)


def test_rope_turns_neighbours(tmp_path):
    """Scores of the file's own form, where (2i, 2i + 1) is a complex number, are those of ours, by halves."""
    imported, _ = llama2c.load(*write(tmp_path))
    there, block = values(True), imported.params["backbone"]["block_1"]["attention"]
    x, at = np.random.default_rng(1).normal(size=(7, WIDTH)), np.arange(7)
    turn = np.exp(1j * at[:, None] * 10_000.0 ** -(np.arange(0, HEAD_DIM, 2) / HEAD_DIM))[:, None]
    q, k = ((x @ there[name][1].T).reshape(7, -1, HEAD_DIM) for name in ("q", "k"))
    q, k = ((y[..., ::2] + 1j * y[..., 1::2]) * turn for y in (q, k))
    expected = np.einsum("TNH,SNH->NTS", q, np.repeat(k, HEADS // KV_HEADS, axis=1).conj()).real
    q, k = (jnp.einsum("TD,DNH->TNH", x, block[name]["kernel"])[None] for name in ("query", "key"))
    q, k = (attention.rope(y, at[None, :, None], 10_000.0)[0] for y in (q, k))
    ours = np.einsum("TNH,SNH->NTS", q, np.repeat(k, HEADS // KV_HEADS, axis=1))
    np.testing.assert_allclose(ours, expected, atol=1e-3)


def test_its_tokenizer(tmp_path):
    """A blank comes first; pairs are joined by score; what is no piece goes byte by byte."""
    _, tokenizer = llama2c.load(*write(tmp_path))
    names = [tokenizer.token(i) for i in tokenizer.prompt("ab b€")]
    assert names == ["<s>", "▁ab", "▁", "b", "<0xE2>", "<0x82>", "<0xAC>"]
    assert [tokenizer.token(i) for i in tokenizer.encode("baba")] == ["▁", "b", "ab", "a"]  # ab has the better score
    for text in ("ab b€", "é", "<s>", "two\nlines"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.special == {"<end>": 1} and tokenizer.vocab == len(PIECES)


def refused(model: Path, tokenizer: Path, named: str) -> None:
    with pytest.raises(config.InputError, match=named):
        llama2c.load(model, tokenizer)


@pytest.mark.parametrize("cut", [-1, -4, 100, 20, 0])
def test_a_file_cut_short(tmp_path, cut):
    model, tokenizer = write(tmp_path)
    model.write_bytes(model.read_bytes()[:cut])
    refused(model, tokenizer, "m.bin (has .* bytes, its header asks for|is no llama2.c model)")


def test_a_file_with_more(tmp_path):
    model, tokenizer = write(tmp_path)
    model.write_bytes(model.read_bytes() + bytes(4))
    refused(model, tokenizer, "m.bin has .* bytes, its header asks for")


class Trap:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_pickle(tmp_path):
    model, tokenizer = write(tmp_path)
    model.write_bytes(pickle.dumps([Trap(tmp_path / "touched"), *range(100)]))
    refused(model, tokenizer, "m.bin is no llama2.c model: .*pickled .bin files are not read")
    assert not (tmp_path / "touched").exists()


@pytest.mark.parametrize("at, value", [(0, -16), (2, 0), (3, 3), (4, 3), (0, 1 << 30), (6, 0)])
def test_a_header_that_makes_no_sense(tmp_path, at, value):
    model, tokenizer = write(tmp_path)
    raw = model.read_bytes()
    model.write_bytes(raw[: 4 * at] + struct.pack("<i", value) + raw[4 * at + 4 :])
    refused(model, tokenizer, "m.bin is no llama2.c model")


@pytest.mark.parametrize("pieces, named", [
    (PIECES[:-1], "t.bin is no llama2.c tokenizer of 266 tokens"), ([*PIECES, "c"], "another model's tokenizer"),
])  # fmt: skip
def test_the_tokenizer_of_another_model(tmp_path, pieces, named):
    assert len(PIECES) == 266
    refused(*write(tmp_path, pieces=pieces), named)


def test_no_tokenizer(tmp_path):
    model, tokenizer = write(tmp_path)
    refused(model, tmp_path / "absent.bin", "absent.bin cannot be read")
    refused(tmp_path / "absent.bin", tokenizer, "absent.bin cannot be read")
    tokenizer.write_bytes(b"{}")
    refused(model, tokenizer, "t.bin is no llama2.c tokenizer")


def stories():
    """-> (the real model, its tokenizer)."""
    imported, tokenizer = llama2c.load(STORIES / "stories260K.bin", STORIES / "tok512.bin")
    module, _ = hf.module_of(imported.config)
    layout = batch_lib.layout(imported.config, config.Data())
    run = config.Config(model=imported.config)
    return Trained(run, layout, tokenizer, None, module.clone(layout=layout), imported.params, 0), tokenizer


@pytest.mark.skipif(not STORIES.is_dir(), reason="the real file is not here")
def test_stories260k_tells_its_story():
    """The documented greedy text, from the first token alone."""
    trained, tokenizer = stories()
    start = chat.shifted(np.array([llama2c.BOS], np.int32), np.zeros(1, bool), np.ones(1, bool))
    answer = decode.generate(trained, [start], (), max_new_tokens=80)[0]
    assert answer.tokens[:10] == (403, 407, 261, 378, 432, 383, 286, 261, 376, 298)
    assert answer.text.startswith(TEXT)
    assert tokenizer.prompt(TEXT)[1:] == list(answer.tokens[: len(tokenizer.prompt(TEXT)) - 1])


@pytest.mark.skipif(not STORIES.is_dir(), reason="the real file is not here")
def test_text_goes_on_with_its_blank():
    """The tokenizer's decoder drops a text's first blank: not that between a prompt and what follows."""
    trained, _ = stories()
    answer = decode.generate(trained, [prompts_lib.prompt(trained, "Once upon")], (), 4)[0]
    assert answer.text.startswith(" a time")
