"""JAX for tests: on the CPU, with compiled programs kept in .cache/jax; no network, no files from elsewhere."""

import gc
import json
import os
import sys
from pathlib import Path

# Shared by the workers of pytest-xdist: who meets a file that another still writes is warned by JAX, and compiles.
CACHE = Path(__file__).parent.parent / ".cache" / "jax"

# In the environment, before JAX starts, so that the processes that tests start have them, too.
os.environ.update({
    "JAX_PLATFORMS": "cpu",
    "JAX_COMPILATION_CACHE_DIR": str(CACHE),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    "JAX_PERSISTENT_CACHE_ENABLE_XLA_CACHES": "none",  # else a program's key holds the folder's name
    "TF_CPP_MIN_LOG_LEVEL": "3",
    "TFDS_DISABLE_GCS": "1",
})  # fmt: skip
# A quarter of the compile time; make soak has the programs as they are trained. Workers of xdist, whose argv says
# nothing, have the environment of the process that starts them.
if "--soak" not in sys.argv and "PYTEST_XDIST_WORKER" not in os.environ:
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_use_fusion_emitters=false".strip()
os.environ.pop("GPT4V_DATA_DIR", None)
os.environ.pop("GPT4V_CACHE_DIR", None)

import jax  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402

from gpt4v_jax import config  # noqa: E402
from gpt4v_jax.training import workdir  # noqa: E402


def pytest_addoption(parser):
    parser.addoption("--soak", action="store_true", help="the slow tests, too: make soak")


def pytest_configure(config):
    config.addinivalue_line("markers", "soak: minutes long; run by make soak alone")


def pytest_collection_modifyitems(config, items):
    """Slow tests only with --soak; and what has noted its values in the file SHOWN is not run again."""
    soak = config.getoption("--soak")
    done = {line["test"] for line in _shown()} if soak else set()
    left = [x for x in items if (soak or not x.get_closest_marker("soak")) and x.nodeid not in done]
    config.hook.pytest_deselected(items=[x for x in items if x not in left])
    items[:] = left


def _shown() -> list[dict]:
    path = Path(os.environ.get("SHOWN", ""))
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


@pytest.fixture
def shown(request):
    """shown(what, value, bar): a line of docs/results/exactness.md, noted when the test has passed.

    Nothing without the environment's SHOWN, the file of these lines.
    """
    lines = []
    yield lambda what, value, bar: lines.append({"what": what, "value": value, "bar": bar})
    if os.environ.get("SHOWN") and getattr(request.node, "passed", False):
        where = {"test": request.node.nodeid, "minutes": request.node.seconds / 60}
        where["commit"] = workdir.environment()["commit"]
        with open(os.environ["SHOWN"], "a") as file:
            file.writelines(json.dumps(where | line) + "\n" for line in lines)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    item.seconds = getattr(item, "seconds", 0.0) + report.duration  # what it waited for fixtures of a module, too
    if report.when == "call":
        item.passed = report.passed
    return report


@pytest.fixture(autouse=True)
def no_mesh():
    """A run leaves its mesh set: each test starts without one."""
    yield
    jax.set_mesh(jax.sharding.Mesh(np.empty((), object), ()))


@pytest.fixture(scope="module", autouse=True)
def mappings():
    """A compiled program takes several of the 65,530 memory mappings that Linux gives a process, and one without any
    left dies: a worker forgets its programs long before. They are read from .cache/jax where they are needed again."""
    yield
    maps = Path("/proc/self/maps")
    if maps.is_file() and maps.read_bytes().count(b"\n") > 20_000:
        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope="session")
def digits_world(tmp_path_factory) -> config.Data:
    """digits_world/small, prepared once for the session."""
    from gpt4v_jax.data import datasets

    data = config.Data(name="digits_world/small", cache=str(tmp_path_factory.mktemp("datasets")), vocab=300, threads=0)
    datasets.prepare(data.name, data.cache)
    return data
