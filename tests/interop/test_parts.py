"""init_from: parts of a model from folders of others, and a CLIP encoder among packed pictures."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt4v_jax import batch as batch_lib
from gpt4v_jax import config, sharding
from gpt4v_jax.interop import hf, parts
from gpt4v_jax.model.gpt4v import GPT4V
from gpt4v_jax.model.image import ImageEmbed, ImageTower
from gpt4v_jax.training import step as step_lib
from tests.interop import tiny


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """-> the folder with one folder of each of some families."""
    path = tmp_path_factory.mktemp("folders")
    for model_type in ("llama", "gpt2", "bert", "siglip", "clip", "siglip_vision_model", "dinov2"):
        tiny.folder(path / model_type, model_type)
    return path


def run_of(folders, backbone="", image="", update=None, image_update=None, **changed) -> config.Config:
    """A config file's work: settings of the folders, then what is changed."""
    values = config.default()
    values.model.update(vocab=32, context=48)
    if backbone:
        values.model.update(parts.settings(folders / backbone))
        values.init_from.backbone = str(folders / backbone)
    if image:
        values.model.image.update(parts.settings(folders / image))
        values.init_from.image = str(folders / image)
    values = values.to_dict()
    for path, value in changed.items():
        *sections, key = path.split("__")
        section = values["model"]
        for name in sections:
            section = section[name]
        section[key] = value
    return config.parse(values)


def initialised(run):
    """-> (parameters as a run starts, parameters with the parts, the lines), both flat."""
    module = GPT4V(run.model, batch_lib.layout(run.model, config.Data(image=config.Budget(2))))
    mesh = sharding.make_mesh(config.Mesh())
    rng = np.random.default_rng(9)  # drawn here, because initialisation takes its time to compile
    start = jax.tree.map(lambda x: jnp.array(rng.normal(size=x.shape), x.dtype), step_lib.abstract_params(module))
    filled, lines = parts.initialise(start, run, mesh)
    start, filled = tiny.flat(start), tiny.flat(filled)
    assert {p: (x.shape, x.dtype) for p, x in start.items()} == {p: (x.shape, x.dtype) for p, x in filled.items()}
    return start, filled, lines


def equal(filled, expected, paths):
    assert paths
    for path in paths:
        np.testing.assert_array_equal(filled[path], expected[path], err_msg=path)


def test_nothing_is_taken_without_a_folder(folders):
    start, filled, lines = initialised(run_of(folders))
    equal(filled, start, start)
    assert not lines


def test_a_whole_language_model(folders):
    start, filled, lines = initialised(run_of(folders, "llama"))
    theirs = tiny.flat(tiny.imported("llama").params)
    assert filled.keys() == theirs.keys()
    equal(filled, theirs, theirs)
    assert lines[0].startswith(f"init_from.backbone  {folders}/llama (llama): {len(theirs)} parameters")
    assert lines[-1] == "newly initialised: nothing"


@pytest.mark.parametrize("image", ["siglip", "clip", "siglip_vision_model", "dinov2"])
def test_an_image_encoder_in_a_language_model(folders, image):
    start, filled, lines = initialised(run_of(folders, "llama", image))
    theirs = tiny.flat(tiny.imported("llama").params)
    tower = tiny.flat(tiny.imported(image).params)
    tower = tower if not any(p.startswith("image/encoder/") for p in tower) else {
        p.removeprefix("image/"): x for p, x in tower.items() if p.startswith("image/")
    }  # fmt: skip
    tower = {f"image/{p}": x for p, x in tower.items() if p.startswith(("image/", "encoder/", "pre_norm/"))}
    tower.pop("image/image/mask_token/value", None)
    equal(filled, theirs | tower, theirs.keys() | tower.keys())
    new = filled.keys() - theirs.keys() - tower.keys()
    assert new == {"image/connector/kernel", "image/connector/bias"}
    equal(filled, start, new)
    assert lines[-1] == "newly initialised: image/connector/bias, image/connector/kernel"
    left = next((line for line in lines if line.startswith("  left out: ")), "")
    wanted = {"siglip": "vision_model.head.probe", "clip": "visual_projection.weight", "dinov2": "mask_token",
              "siglip_vision_model": "vision_model.head.mlp.fc1.weight"}  # fmt: skip
    assert wanted[image] in left and "encoder.layers.0.self_attn" not in left.replace("text_model.encoder", ""), left


def test_a_larger_vocabulary(folders):
    """The folder's rows come first, the others stay as they were initialised, and it is told."""
    start, filled, lines = initialised(run_of(folders, "llama", vocab=40))
    theirs = tiny.flat(tiny.imported("llama").params)
    table, head = "text/embed/table", "head/kernel"
    np.testing.assert_array_equal(filled[table], np.concatenate([theirs[table], start[table][32:]]))
    np.testing.assert_array_equal(filled[head], np.concatenate([theirs[head], start[head][:, 32:]], axis=1))
    assert np.ptp(filled[table][32:]) > 0
    assert f"  {table}: 32 rows; the folder has 32, this model 40" in lines
    equal(filled, theirs, theirs.keys() - {table, head})


def test_a_smaller_vocabulary_is_refused(folders):
    with pytest.raises(config.InputError, match="model.vocab may be larger than the folder's, not smaller"):
        initialised(run_of(folders, "llama", vocab=30))
    assert parts.vocab(run_of(folders, "llama", vocab=30)) == 32


@pytest.mark.parametrize("context", [24, 64])
def test_another_number_of_learned_positions(folders, context):
    start, filled, lines = initialised(run_of(folders, "gpt2", context=context))
    path, theirs = "text/position/table", tiny.flat(tiny.imported("gpt2").params)
    expected = start[path].copy()
    expected[:48] = theirs[path][:context]
    np.testing.assert_array_equal(filled[path], expected)
    assert any(line.startswith(f"  {path}: {min(context, 48)} rows") for line in lines)


@pytest.mark.parametrize("changed, named", [
    ({"backbone__rope_theta": 900.0}, "backbone: the folder has rope_theta=500.0, this config 900.0"),
    ({"backbone__norm_eps": 1e-3}, "backbone: the folder has norm_eps=1e-05, this config 0.001"),
    ({"backbone__depth": 3}, "the folder has depth=2, this config 3"),
    ({"backbone__width": 32}, "the folder has width=16, this config 32"),
    ({"tied": True}, "the folder has tied=False, this config True"),
    ({"position": "none"}, "the folder has position='rope'"),
    ({"embed_scale": 2.0}, "the folder has embed_scale=1.0"),
    ({"vocab": 24}, "text/embed/table has shape (32, 16) in the folder and (24, 16) in this config"),
])  # fmt: skip
def test_another_backbone_is_refused(folders, changed, named):
    with pytest.raises(config.InputError) as error:
        initialised(run_of(folders, "llama", **changed))
    assert named in str(error.value) and f"init_from.backbone={folders}/llama" in str(error.value)


def test_what_only_training_knows_may_differ(folders):
    initialised(run_of(folders, "llama", "siglip", backbone__dropout=0.1, init_std=0.3, image__encoder__dropout=0.1))


@pytest.mark.parametrize("changed, named", [
    ({"image__size": 16}, "the folder has size=8, this config 16"),
    ({"image__patch": 2}, "the folder has patch=4, this config 2"),
    ({"image__mean": (0.5, 0.5, 0.4)}, "the folder has mean="),
    ({"image__encoder__norm_eps": 1e-3}, "image.encoder: the folder has norm_eps=1e-06, this config 0.001"),
    ({"image__encoder": None}, "model.image.encoder is None"),
    ({"image__pool_norm": True}, "the folder has pool_norm=False, this config True"),
])  # fmt: skip
def test_another_image_encoder_is_refused(folders, changed, named):
    with pytest.raises(config.InputError) as error:
        initialised(run_of(folders, "", "siglip", **changed))
    assert named in str(error.value) and f"init_from.image={folders}/siglip" in str(error.value)


@pytest.mark.parametrize("part, folder, named", [
    ("image", "llama", "a llama has no image encoder"), ("backbone", "siglip", "a siglip is no language model"),
    ("backbone", "absent here", "absent here is no folder"),
])  # fmt: skip
def test_a_folder_without_the_part_is_refused(folders, part, folder, named):
    run = run_of(folders, "llama", "siglip")
    run = dataclasses.replace(run, init_from=config.InitFrom(**{part: str(folders / folder)}))
    with pytest.raises(config.InputError, match=named):
        initialised(run)


# ---- packed pictures


@pytest.mark.parametrize("model_type", ["clip_vision_model", "dinov2", "vit", "siglip_vision_model"])
def test_packed_pictures_are_each_alone(model_type):
    """Two pictures and padding in a row: what the encoder says of each is what the tower says of it alone, so that
    neither patches nor class tokens mix. The connector is the identity here."""
    tower = tiny.imported(model_type)
    image = dataclasses.replace(tower.config, pool="none", classes=0)
    width, n = image.encoder.width, image.grid**2
    rng = np.random.default_rng(0)
    patches = rng.integers(0, 256, (3, n, image.patch**2 * 3), np.uint8)
    index = np.zeros((n, 3), np.int32)
    index[:, 1:] = np.indices((image.grid, image.grid)).reshape(2, -1).T
    params = {name: tower.params[name] for name in ("image", "pre_norm", "encoder") if name in tower.params}
    alone = ImageTower(image).apply({"params": params}, patches, np.broadcast_to(index, (3, n, 3)))
    alone = np.asarray(alone)[:, image.class_token :]

    # Row 0: pictures 0 and 1, and a hole; row 1: picture 2 behind a hole.
    blank, ones = np.zeros_like(patches[0]), np.ones(n, np.int32)
    media = batch_lib.Media(
        patch=np.stack([np.concatenate([patches[0], patches[1], blank]), np.concatenate([patches[2], blank, blank])]),
        index=np.tile(index, (2, 3, 1)), item=np.stack([np.repeat([1, 2, 0], n), np.repeat([1, 0, 0], n)]),
        at=np.array([[1, 9, -1], [0, -1, -1]], np.int32), size=np.zeros((2, 3, 3), np.int32),
    )  # fmt: skip
    document = step = np.tile(ones, (2, 6))[:, :20]
    params |= {"connector": {"kernel": jnp.eye(width), "bias": jnp.zeros(width)}}
    model = config.Model(vocab=32, backbone=config.Backbone(width=width), image=image)
    layout = batch_lib.layout(model, config.Data(image=config.Budget(3)))
    segment = ImageEmbed(model, layout).apply({"params": params}, media, document, step)
    packed = np.concatenate([segment.x[0, : 2 * n], segment.x[1, :n]])
    np.testing.assert_allclose(packed, alone.reshape(-1, width), atol=1e-4)
    assert np.abs(alone[0] - alone[1]).max() > 0.1
    assert segment.x.shape == (2, 3 * n, width) and np.isfinite(segment.x).all()


def test_settings_are_the_folder_s(folders):
    values = config.default()
    values.model.update(parts.settings(folders / "llama"))
    theirs = dataclasses.replace(tiny.imported("llama").config, context=config.Model().context)  # which is the run's
    assert config.parse(values.to_dict()).model == theirs
    values.model.image.update(parts.settings(folders / "clip"))
    image = dataclasses.replace(tiny.imported("clip").config.image, pool="none", classes=0)
    assert config.parse(values.to_dict()).model.image == image
    assert hf.load(folders / "clip").config.image.pool == "class"


def test_settings_know_a_head_of_its_own(tmp_path):
    """A config that ties beside a file whose head differs: settings and init_from say the same."""
    untied = tiny.imported("llama")
    tiny.folder(tmp_path / "llama")
    path = tmp_path / "llama/config.json"
    path.write_text(path.read_text().replace('"tie_word_embeddings": false', '"tie_word_embeddings": true'))
    assert not untied.config.tied and not parts.settings(tmp_path / "llama").tied


def test_settings_need_no_weights(folders, tmp_path):
    (tmp_path / "config.json").write_bytes((folders / "llama/config.json").read_bytes())
    assert parts.settings(tmp_path).to_dict() == parts.settings(folders / "llama").to_dict()
