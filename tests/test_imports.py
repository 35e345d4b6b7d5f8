"""The arrows of CONTRIBUTING.md, read from the source: imports point left only."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ARROWS = [
    {"config"}, {"batch", "sharding", "command"}, {"model", "data"}, {"training"}, {"interop"}, {"generate"},
    {"interpret", "plots"}, {"eval", "serve"}, {"train", "evaluate", "report", "plan"},
    {"configs", "experiments", "benchmarks"},
]  # fmt: skip
LEVEL = {unit: level for level, units in enumerate(ARROWS) for unit in units}
OUTSIDE = ("configs", "experiments", "benchmarks")
FILES = sorted(path for folder in ("gpt4v_jax", *OUTSIDE) for path in (ROOT / folder).rglob("*.py"))


def unit_of(path: Path) -> str:
    """gpt4v_jax/model/text.py -> model; configs/digits_world.py -> configs; gpt4v_jax/__init__.py -> ""."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[0] if parts[0] in OUTSIDE else parts[1].removeprefix("__init__")


def imported_units(tree: ast.AST):
    """-> (unit, line) of each import of our own code, wherever in the file it stands."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative imports hide where they point"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            first, *rest = name.split(".")
            if first == "gpt4v_jax" and rest or first in (*OUTSIDE, "tests"):
                yield rest[0] if first == "gpt4v_jax" else first, node.lineno


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_left(path):
    unit, tree = unit_of(path), ast.parse(path.read_text())
    assert not unit or unit in LEVEL, f"{unit} has no place among the arrows: give it one"
    for other, line in imported_units(tree):
        assert other in LEVEL, f"{path}:{line} imports {other}"
        assert unit and (LEVEL[other] < LEVEL[unit] or other == unit), f"{path}:{line}: {unit} must not import {other}"


def test_the_arrows_are_those_of_the_page():
    """The test above finds what it should: files, and imports in them."""
    assert {unit_of(path) for path in FILES} >= {"config", "batch", "sharding", "model", "data", "training", "train"}
    tree = ast.parse((ROOT / "gpt4v_jax/train.py").read_text())
    assert {"config", "sharding", "eval", "data", "model", "training"} <= {unit for unit, _ in imported_units(tree)}


@pytest.mark.parametrize("owner, name, home", [
    ("self", "param", "model/layers.py"), ("nn", "scan", "model/backbone.py"), ("nn", "remat", "model/backbone.py"),
])  # fmt: skip
def test_where_parameters_and_lifted_transforms_live(owner, name, home):
    for path in FILES:
        uses = [
            node.lineno for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Attribute) and node.attr == name
            and isinstance(node.value, ast.Name) and node.value.id == owner
        ]  # fmt: skip
        assert not uses or path == ROOT / "gpt4v_jax" / home, f"{path}:{uses[0]} uses {owner}.{name}"
    if name == "param":
        assert "self.param(" in (ROOT / "gpt4v_jax" / home).read_text()


def test_optional_libraries_are_imported_where_they_are_used():
    """At the top of a file everyone would have to install them, and to wait for them."""
    optional = {"torch", "transformers", "tensorflow", "matplotlib", "sklearn"}
    for path in sorted((ROOT / "gpt4v_jax").rglob("*.py")):
        for node in ast.parse(path.read_text()).body:
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            assert not optional & {name.split(".")[0] for name in names}, f"{path}:{node.lineno}"


def test_import_is_light():
    code = (
        "import sys, gpt4v_jax; light = set(sys.modules); import gpt4v_jax.train; "
        "print([m for m in ('jax', 'flax', 'torch', 'matplotlib', 'tensorflow') if m in light], "
        "[m for m in ('matplotlib', 'tensorflow') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.stdout.strip() == "[] []", result.stderr
