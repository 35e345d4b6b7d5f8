"""Our own TFDS builders, and `prepare`, which builds a data set once and finds it again after that."""

import contextlib
import importlib
import io
import time

import absl.logging

from gpt4v_jax.config import InputError, nearest

# Name -> where its builder class is; imported when asked for, so that one data set does not need another's libraries.
DATASETS = {
    "digits_world": "gpt4v_jax.data.datasets.digits_world:DigitsWorld",
    "tiny_shakespeare": "gpt4v_jax.data.datasets.tiny_shakespeare:TinyShakespeare",
}


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


def prepare(name: str, cache: str, raw_dir: str = ""):
    """-> the tfds builder of `name`, such as "digits_world" or, with a config, "digits_world/small", its records on
    disk below `cache`. Records that are there are used again; else they are made, from files in `raw_dir` if it needs
    any, and one line is printed. TFDS writes beside the place and renames at the end: an interrupted call leaves
    nothing that looks done, and two calls at once do no harm."""
    import tensorflow_datasets as tfds

    name, _, config = name.partition("/")
    cls = builder_class(name)
    if config and config not in cls.builder_configs:
        raise InputError(f"data.name: {name!r} has no config {config!r}{nearest(config, cls.builder_configs)}; it has: "
                         f"{', '.join(cls.builder_configs) or 'none'}")
    # Without TensorFlow array_record is the format that TFDS can write; its default, tfrecord, is not.
    builder = cls(data_dir=cache, config=config or None, file_format="array_record")
    with quiet():
        if builder.is_prepared():
            return builder
    print(f"{name}: building into {builder.data_dir} ...", end=" ", flush=True)
    start = time.perf_counter()
    tfds.disable_progress_bar()
    try:
        with quiet():
            download = tfds.download.DownloadConfig(manual_dir=raw_dir or None)
            builder.download_and_prepare(download_config=download, file_format="array_record")
    except FileExistsError:  # another process was faster, with equal records
        builder = cls(data_dir=cache, config=config or None, file_format="array_record")
    except BaseException:
        print("failed", flush=True)
        raise
    if not builder.is_prepared():
        raise InputError(f"{builder.data_dir} is in the way: it holds no complete data set. Remove it and start again")
    sizes = ", ".join(f"{split} {info.num_examples:,}" for split, info in builder.info.splits.items())
    print(f"{time.perf_counter() - start:.1f} s (records: {sizes})", flush=True)
    return builder
