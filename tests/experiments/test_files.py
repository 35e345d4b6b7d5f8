"""Every experiment file: its variants parse in every size, and with --smoke every variant runs (make soak)."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from experiments import results, sweep, variants
from experiments.variants import ROOT

FILES = Path(sweep.__file__).parent.glob("*.py")
NAMES = sorted(path.stem for path in FILES if "sweep.main(__doc__" in path.read_text())


@pytest.mark.parametrize("name", NAMES)
def test_every_size_parses(name):
    module = importlib.import_module(f"experiments.{name}")
    assert module.__doc__.partition("\n")[0].endswith("?") and f"python -m experiments.{name} " in module.__doc__
    for size, one in module.SIZES.items():
        for last in ({}, sweep.SMOKE | dict(one.smoke)):
            made = variants.configs(one.base, one.variants, one.common, last)
            assert len(set(made.values())) == len(made) > 1, f"{size}: variants that are the same"
        assert one.first in made and results.question(one.metric, one.split, one.baselines)


@pytest.mark.soak
@pytest.mark.parametrize("name", NAMES)
def test_every_variant_runs(name, tmp_path, shown):
    module = importlib.import_module(f"experiments.{name}")
    env = os.environ | {"GPT4V_CACHE_DIR": str(tmp_path / "cache")}
    for size in [size for size, one in module.SIZES.items() if not one.plan_only]:
        line = [sys.executable, "-m", f"experiments.{name}", f"--size={size}", f"--workdir={tmp_path / size}"]
        ran = subprocess.run([*line, "--smoke", "--jobs=2"], cwd=ROOT, env=env, capture_output=True, text=True)
        assert ran.returncode == 0, ran.stderr
        found = json.loads((tmp_path / size / "result.json").read_text())
        assert found["runs_done"] == found["runs"] == len(module.SIZES[size].variants)
    shown(f"variants of experiments/{name}.py that do not run two steps", 0, "0")


def test_there_are_experiments():
    assert {"mask_and_loss", "visual_tokens"} <= set(NAMES)
