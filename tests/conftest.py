"""JAX for tests: on the CPU, with compiled programs kept in .cache/jax; no network, no files from elsewhere."""

import os
from pathlib import Path

CACHE = Path(__file__).parent.parent / ".cache" / "jax"

# In the environment, before JAX starts, so that the processes that tests start have them, too.
os.environ.update({
    "JAX_PLATFORMS": "cpu",
    "JAX_COMPILATION_CACHE_DIR": str(CACHE),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    "TF_CPP_MIN_LOG_LEVEL": "3",
    "TFDS_DISABLE_GCS": "1",
})  # fmt: skip
os.environ.pop("GPT4V_DATA_DIR", None)
os.environ.pop("GPT4V_CACHE_DIR", None)

import jax  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402

from gpt4v_jax import config  # noqa: E402


@pytest.fixture(autouse=True)
def no_mesh():
    """A run leaves its mesh set: each test starts without one."""
    yield
    jax.set_mesh(jax.sharding.Mesh(np.empty((), object), ()))


@pytest.fixture(scope="session")
def digits_world(tmp_path_factory) -> config.Data:
    """digits_world/small, prepared once for the session."""
    from gpt4v_jax.data import datasets

    data = config.Data(name="digits_world/small", cache=str(tmp_path_factory.mktemp("datasets")), vocab=300, threads=0)
    datasets.prepare(data.name, data.cache)
    return data
