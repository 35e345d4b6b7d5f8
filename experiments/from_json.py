"""A config file of any run, for what dotted flags cannot say: --config experiments/from_json.py:FILE.json"""

import json
from pathlib import Path

from gpt4v_jax import config as config_lib


def get_config(path: str):
    return config_lib.sections(json.loads(Path(path).read_text()))
