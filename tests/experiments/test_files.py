"""Every experiment file: its variants parse in every size, and with --smoke every variant runs (make soak)."""

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from experiments import fusion_frozen, results, sweep
from experiments.variants import ROOT
from gpt4v_jax.batch import layout
from gpt4v_jax.model.gpt4v import GPT4V
from gpt4v_jax.plan import with_vocabulary
from gpt4v_jax.sharding import path_name
from gpt4v_jax.training import step

SHARED = Path(__file__).parents[3] / "shared/data"
FILES = Path(sweep.__file__).parent.glob("*.py")
NAMES = sorted(path.stem for path in FILES if "sweep.main(__doc__" in path.read_text())


@pytest.mark.parametrize("name", NAMES)
def test_every_size_parses(name):
    module = importlib.import_module(f"experiments.{name}")
    assert module.__doc__.partition("\n")[0].endswith("?") and f"python -m experiments.{name} " in module.__doc__
    for size, one in module.SIZES.items():
        for smoke in (False, True):
            made = sweep.configs(one, smoke)
            assert len(set(made.values())) == len(made) > 1, f"{size}: variants that are the same"
        assert one.first in made and results.question(one.metric, one.split, one.baselines)


def test_what_is_frozen_is_what_was_trained_before():
    """Of every kind: what it adds to the blocks of the language model moves, also under names of the backbone."""
    one = fusion_frozen.SIZES["toy"]
    for name, (before, last) in sweep.configs(one, smoke=True).items():
        there, here = (
            jax.tree_util.tree_leaves_with_path(step.abstract_params(GPT4V(run.model, layout(run.model, run.data))))
            for run in (with_vocabulary(before)[0], with_vocabulary(last)[0])
        )
        frozen = {p for p in (path_name(path) for path, _ in here) if re.search(last.optim.frozen or "$.", p)}
        assert frozen == ({path_name(path) for path, _ in there} if "trained" not in name else set()), name


@pytest.mark.soak
@pytest.mark.parametrize("name", NAMES)
def test_every_variant_runs(name, tmp_path, shown):
    module = importlib.import_module(f"experiments.{name}")
    env = os.environ | {"GPT4V_CACHE_DIR": str(tmp_path / "cache")}
    if name == "fusion_easyvqa":
        if not SHARED.is_dir():
            pytest.skip("its files are not here")
        env |= {"GPT4V_DATA_DIR": str(SHARED)}
    for size in [size for size, one in module.SIZES.items() if not one.plan_only]:
        line = [sys.executable, "-m", f"experiments.{name}", f"--size={size}", f"--workdir={tmp_path / size}"]
        ran = subprocess.run([*line, "--smoke", "--jobs=2"], cwd=ROOT, env=env, capture_output=True, text=True)
        assert ran.returncode == 0, ran.stderr
        found = json.loads((tmp_path / size / "result.json").read_text())
        assert found["runs_done"] == found["runs"] == len(module.SIZES[size].variants)
    shown(f"variants of experiments/{name}.py that do not run two steps", 0, "0")


def test_there_are_experiments():
    assert {"mask_and_loss", "visual_tokens"} <= set(NAMES)
