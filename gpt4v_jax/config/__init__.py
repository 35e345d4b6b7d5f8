"""What describes a run: frozen dataclasses, and the one place where ConfigDict and JSON become them.

A config file returns `default()` with some values changed. `parse` turns it into a frozen `Config`: from there on a
run is described by plain, hashable dataclasses, and a typing error is an `InputError` at the door, not a silent
default.
"""

from gpt4v_jax.config.backbone import ACTIVATIONS, BIASES, READS, Backbone, RopeScaling
from gpt4v_jax.config.check import InputError, at_least, nearest, one_of
from gpt4v_jax.config.media import Audio, Image, Video
from gpt4v_jax.config.model import CONNECTORS, FUSIONS, RESAMPLED, Fusion, Model, Towers
from gpt4v_jax.config.parse import (
    arguments,
    default,
    differences,
    from_flag,
    from_json,
    parse,
    section,
    sections,
    to_json,
)
from gpt4v_jax.config.run import (
    OBJECTIVES,
    Budget,
    Compute,
    Config,
    Data,
    Eval,
    Guard,
    InitFrom,
    LoRA,
    Mesh,
    Objective,
    Optim,
)

__all__ = [
    "ACTIVATIONS", "Audio", "BIASES", "Backbone", "Budget", "CONNECTORS", "Compute", "Config", "Data", "Eval",
    "FUSIONS", "Fusion", "Guard", "Image", "InitFrom", "InputError", "LoRA", "Mesh", "Model", "OBJECTIVES",
    "Objective", "Optim", "READS", "RESAMPLED", "RopeScaling", "Towers", "Video", "arguments", "at_least",
    "default", "differences", "from_flag", "from_json", "nearest", "one_of", "parse", "section", "sections",
    "to_json",
]  # fmt: skip
