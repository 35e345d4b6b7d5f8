"""Maps of attention against what the model really computed."""

import numpy as np
import pytest

from gpt4v_jax import config
from gpt4v_jax.data import chat, packing
from gpt4v_jax.interpret import attention as interpret
from gpt4v_jax.model import attention
from gpt4v_jax.training.workdir import Trained
from tests import tiny


def make(**values) -> Trained:
    module, params = tiny.make_model(tiny.make_config(**values))
    return Trained(config.Config(model=module.config), module.layout, None, None, module, params, 0)


def used(trained, document, monkeypatch) -> list[np.ndarray]:
    """-> the weights [heads, T, T] of each layer in a forward pass of the whole document.

    What attention returns is linear in its values: unit vectors in their place return the weights themselves.
    """
    seen, real = [], attention.attend

    def attend(q, k, v, sight, *rest):
        S, H = v.shape[1], v.shape[3]
        units = np.pad(np.eye(S, dtype=np.float32), ((0, 0), (0, -S % H))).reshape(S, -1, H)
        values = [np.broadcast_to(units[None, :, i, None], v.shape) for i in range(units.shape[1])]
        parts = [real(q, k, value, sight, *rest) for value in values]
        seen.append(np.concatenate(parts, axis=-1)[0, :, :, :S].transpose(1, 0, 2))
        return real(q, k, v, sight, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(attention, "attend", attend)
        batch = packing.stack([packing.fill([document], tiny.reader(trained.layout), trained.layout)])
        trained.model.apply({"params": trained.params}, batch)  # not compiled, so that the values are there to be seen
    return seen


@pytest.mark.parametrize("values", [
    {}, {"kind": "prefix_lm"}, {"heads": 4, "kv_heads": 2, "depth": 3, "qk_norm": True},
])  # fmt: skip
@pytest.mark.parametrize("text", ["I U4 A2", "U2 A2 I U3 A2", "U1 I I A4"])
def test_maps_are_the_weights_that_the_model_used(values, text, monkeypatch):
    trained = make(**values)
    document = tiny.document(text, trained.layout)
    layers = used(trained, document, monkeypatch)
    first = document.media[0][0]
    for query in (first + 1, len(document) - 4, len(document) - 1):
        maps = interpret.over_picture(trained, document, tiny.reader(trained.layout), query)
        assert maps.shape == (trained.run.model.backbone.depth, 2, 2)
        expected = [w[:, query, first : first + 4].mean(0).reshape(2, 2) for w in layers]
        np.testing.assert_allclose(maps, expected, atol=1e-6)
        shares = maps.sum((1, 2))
        assert (maps >= 0).all() and (shares <= 1 + 1e-6).all() and (shares > 0).all()
        assert np.ptp(maps, axis=(1, 2)).min() > 1e-3, "the patches are told apart"


def test_what_comes_before_the_picture_sees_nothing_of_it():
    trained = make()
    document = tiny.document("U2 A2 I U3", trained.layout)
    first, read = document.media[0][0], tiny.reader(trained.layout)
    assert (interpret.over_picture(trained, document, read, first - 1) == 0).all()
    assert (interpret.over_picture(trained, document, read, first) > 0).all()


def test_the_first_picture_is_found_among_clips_and_sounds():
    """And of a picture in tiles the map is the thumbnail's."""
    trained = make(media=True, context=64, image={"tiles": 4})
    pieces = [*tiny.pieces("V S5"), chat.Piece("user", medium=chat.Medium("image", 5, (8, 8))), *tiny.pieces("U2 I A2")]
    document = chat.document(pieces, tiny.SPECIAL, trained.layout)
    first = 1 + 8 + 3
    assert [at for at, _ in document.media] == [1, 9, first, first + 5 * 4 + 2]
    read, query = tiny.reader(trained.layout), len(document) - 1
    maps = interpret.over_picture(trained, document, read, query)

    def changed(medium):  # of the picture in tiles, the thumbnail's last patch
        views = read(medium)
        if len(views) > 1:
            views[0][0][3] ^= 255
        return views

    other = interpret.over_picture(trained, document, changed, query)
    ratio = (other / maps)[0]
    assert maps.shape == (2, 2, 2) and (maps > 0).all() and (maps.sum((1, 2)) < 1).all()
    assert abs(ratio[1, 1] - ratio[0, 0]) > 1e-3, "the last of the four is the patch that was changed"


@pytest.mark.parametrize("kind", ["concat", "cross_attention"])
@pytest.mark.parametrize("row, column", [(0, 0), (0, 1), (1, 0)])
def test_a_weight_lies_where_its_patch_is(row, column, kind):
    """In the first layer a patch's weight depends on that patch alone, but for the sum that all weights are divided by:
    when one patch changes, the weights of the others keep their ratios."""
    trained = make(**tiny.FUSIONS[kind], heads=1)  # a mean over heads would mix their sums
    document = tiny.document("I U3", trained.layout)
    def read(medium):
        ((patches, index),) = tiny.reader(trained.layout)(medium)
        return [(patches ^ 255 * (index == [0, row, column]).all(1, keepdims=True).astype(np.uint8), index)]

    both = (tiny.reader(trained.layout), read)
    before, after = (interpret.over_picture(trained, document, r, len(document) - 1)[0] for r in both)
    ratio = after / before
    others = np.delete(ratio.ravel(), 2 * row + column)
    np.testing.assert_allclose(others, others[0], rtol=1e-4)
    assert abs(ratio[row, column] / others[0] - 1) > 0.1


@pytest.mark.parametrize("kind", ["concat", "cross_attention", "encoder_decoder"])
def test_the_picture_of_a_number(kind):
    """Two pictures: the map of the second one changes where its patch does, and the first one's keeps its ratios. In a
    source the patches see each other, and no ratio is kept: there the changed one's changes most."""
    trained = make(**tiny.FUSIONS[kind], heads=1)
    document = tiny.document("U1 I U1 I U3", trained.layout)
    second = document.media[1][1]

    def read(medium):
        ((patches, index),) = tiny.reader(trained.layout)(medium)
        here = (index == [0, 1, 0]).all(1, keepdims=True) & (medium == second)
        return [(patches ^ 255 * here.astype(np.uint8), index)]

    query = len(document) - 1
    ratios = []
    for number in (0, 1):
        before, after = (
            interpret.over_picture(trained, document, r, query, number)[0] for r in (tiny.reader(trained.layout), read)
        )
        ratios.append((after / before).ravel())
    first, other = ratios
    change = np.abs(np.concatenate([first, other]) / np.median([first, other]) - 1)
    assert change.argmax() == 4 + 2 and change.max() > 0.1
    if kind != "encoder_decoder":
        np.testing.assert_allclose(first, first[0], rtol=1e-4)
    with pytest.raises(config.InputError, match="picture 2 of 2"):
        interpret.over_picture(trained, document, tiny.reader(trained.layout), query, 2)


def test_maps_where_the_picture_is_read_apart():
    """Of a memory and of a source, the blocks that read them; a resampler's vectors have no place in the picture."""
    for kind, layers in (("cross_attention, latest", 1), ("encoder_decoder", 2), ("q_former", 0)):
        trained = make(**tiny.FUSIONS[kind])
        document = tiny.document("U1 I U3", trained.layout)
        maps = interpret.over_picture(trained, document, tiny.reader(trained.layout), len(document) - 1)
        assert maps.shape == (layers, 2, 2) and (maps > 0).all()
        shares = maps.sum((1, 2))
        np.testing.assert_array_less(shares, 1 + 1e-6)
        assert (shares > 1 - 1e-6).all() == (layers < 2), "in a source the prompt is seen, too"
