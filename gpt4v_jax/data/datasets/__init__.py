"""Our own TFDS builders, and `prepare`, which builds a data set once and finds it again after that."""

import contextlib
import functools
import importlib
import io
import time

import absl.logging

from gpt4v_jax.config import InputError, nearest

# Ours are not registered with TFDS (skip_registration): some have names of its own catalogue.
# Name -> where its builder class is; imported when asked for, so that one data set does not need another's libraries.
DATASETS = {
    "digits_world": "gpt4v_jax.data.datasets.digits_world:DigitsWorld",
    "easyvqa": "gpt4v_jax.data.datasets.easyvqa:EasyVQA",
    "emoji": "gpt4v_jax.data.datasets.emoji:Emoji",
    "fsdd": "gpt4v_jax.data.datasets.fsdd:FSDD",
    "mnist": "gpt4v_jax.data.datasets.mnist:MNIST",
    "moving_digits": "gpt4v_jax.data.datasets.moving_digits:MovingDigits",
    "multi30k": "gpt4v_jax.data.datasets.multi30k:Multi30k",
    "poetry": "gpt4v_jax.data.datasets.poetry:Poetry",
    "sentence_polarity": "gpt4v_jax.data.datasets.sentence_polarity:SentencePolarity",
    "tiny_shakespeare": "gpt4v_jax.data.datasets.tiny_shakespeare:TinyShakespeare",
}


TEXTS = ("poetry", "tiny_shakespeare", "digits_world/plain")  # plain texts; the others are conversations


def is_text(name: str) -> bool:
    return name in TEXTS or name.partition("/")[0] in TEXTS


def builder_class(name: str) -> type:
    """-> the tfds.core.GeneratorBasedBuilder of that name."""
    if name not in DATASETS:
        raise InputError(f"data.name={name!r} is none of {', '.join(DATASETS)}{nearest(name, DATASETS)}")
    module, _, cls = DATASETS[name].partition(":")
    return getattr(importlib.import_module(module), cls)


@contextlib.contextmanager
def quiet():
    """TFDS announces a build in several bold lines, and warns that what it has yet to make is not there."""
    verbosity = absl.logging.get_verbosity()
    absl.logging.set_verbosity(absl.logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        absl.logging.set_verbosity(verbosity)


def _ours(name: str, cache: str):
    """-> a function that makes the builder of one of ours."""
    name, _, config = name.partition("/")
    cls = builder_class(name)
    if config and config not in cls.builder_configs:
        raise InputError(f"data.name: {name!r} has no config {config!r}{nearest(config, cls.builder_configs)}; it has: "
                         f"{', '.join(cls.builder_configs) or 'none'}")
    # Without TensorFlow array_record is the format that TFDS can write; its default, tfrecord, is not.
    return functools.partial(cls, data_dir=cache, config=config or None, file_format="array_record")


def adapted(records, features):
    """public.adapted, imported when it is asked for."""
    from gpt4v_jax.data.datasets import public

    return public.adapted(records, features)


def prepare(name: str, cache: str, raw_dir: str = ""):
    """-> the tfds builder of `name`, such as "digits_world" or, with a config, "digits_world/small", or of TFDS's
    catalogue, "tfds:mnist", its records on disk below `cache`. Records that are there are used again; else they are
    made, from files in `raw_dir` if it needs any, and one line is printed. TFDS writes beside the place and renames at
    the end: an interrupted call leaves nothing that looks done, and two calls at once do no harm."""
    import tensorflow_datasets as tfds

    if name.startswith("tfds:"):
        from gpt4v_jax.data.datasets import public

        make, explained = functools.partial(public.opened, name, cache), public.explained(name)
    else:
        make, explained = _ours(name, cache), contextlib.nullcontext()
        name = name.partition("/")[0]
    builder = make()
    with quiet():
        if builder.is_prepared():
            return builder
    print(f"{name}: building into {builder.data_dir} ...", end=" ", flush=True)
    start = time.perf_counter()
    tfds.disable_progress_bar()
    try:
        with explained, quiet():
            download = tfds.download.DownloadConfig(manual_dir=raw_dir or None)
            builder.download_and_prepare(download_config=download, file_format="array_record")
    except FileExistsError:  # another process was faster, with equal records
        builder = make()
    except BaseException:
        print("failed", flush=True)
        raise
    if not builder.is_prepared():
        raise InputError(f"{builder.data_dir} is in the way: it holds no complete data set. Remove it and start again")
    sizes = ", ".join(f"{split} {info.num_examples:,}" for split, info in builder.info.splits.items())
    print(f"{time.perf_counter() - start:.1f} s (records: {sizes})", flush=True)
    return builder
