"""Plots and pictures of a page."""

import re

import numpy as np

from gpt4v_jax import plots


def test_heat_is_bright_where_the_weight_is():
    weights = np.array([[0.0, 0.0], [0.3, 0.1]])
    heat = plots.heat(np.full((24, 24, 3), 255, np.uint8), weights).astype(int).sum(-1)
    cells = heat.reshape(2, 36, 2, 36).mean((1, 3))
    assert heat.shape == (72, 72) and cells[1, 0] > cells[1, 1] > cells[0, 0] == cells[0, 1]


def test_bars_lie_beside_one_another_and_the_first_says_its_numbers():
    series = [("model", [(0.75, 0.6, 0.85), (0.5, 0.4, 0.6)], plots.A), ("blind", [(0.25, 0.2, 0.3)] * 2, plots.B)]
    text = plots.bars("test", ["what", "all"], series)
    assert re.findall(r">(0\.\d\d)<", text) == ["0.75", "0.50"]
    assert {"what", "all", "model", "blind"} <= set(re.findall(r">([^<>]+)</text>", text))
