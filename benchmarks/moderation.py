"""What configs/polarity.py refuses as a moderation filter, by threshold, in docs/moderation.md's words.

python -m benchmarks.moderation --workdir runs/polarity
"""

import json
import tempfile
import time
from pathlib import Path

import numpy as np
from absl import flags

from gpt4v_jax import command
from gpt4v_jax.data import sources
from gpt4v_jax.serve import moderation
from gpt4v_jax.training import workdir

FLAGS = flags.FLAGS
flags.DEFINE_string("workdir", None, "A trained run of configs/polarity.py.")


def loaded(folder: Path, lower: bool) -> moderation.Moderation:
    head = {"category": "negative", "workdir": str(folder.resolve()), "labels": ["negative", "positive"],
            "refuse": ["negative"], "lower": lower}  # fmt: skip
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump({"classifiers": [head]}, file)
        file.flush()
        return moderation.load(file.name)


def main() -> None:
    folder = Path(FLAGS.workdir)
    filters = {lower: loaded(folder, lower) for lower in (False, True)}
    records = sources.open_split(workdir.load_config(folder).data, "test")
    asked = [question for record in records for question in sources.asked(record)]
    texts, negative = [text for _, text, _ in asked], np.array([answer == "negative" for _, _, answer in asked])

    def scores(texts, lower=True):
        return np.array([filters[lower].scores(text)["negative"] for text in texts])

    scores([texts[0], " ".join(texts)[:1000]])  # compiles
    start = time.perf_counter()
    found = scores(texts)
    print(f"{len(texts):,} sentences, {1e3 * (time.perf_counter() - start) / len(texts):.0f} ms each")
    for threshold in (0.5, 0.9, 0.95, 0.99):
        refused = found >= threshold
        print(f"at {threshold}: right {np.mean(refused == negative):.3f}, refused: of negative "
              f"{refused[negative].mean():.3f}, of positive {refused[~negative].mean():.3f}")  # fmt: skip
    for lower in (False, True):
        refused = scores([text.upper() for text in texts], lower) >= 0.5
        print(f"in capitals, lower={lower}: right at 0.5 {np.mean(refused == negative):.3f}")
    text = " ".join(texts)[:40_000]
    start = time.perf_counter()
    scores([text])
    print(f"{len(text):,} characters: {time.perf_counter() - start:.1f} s")


if __name__ == "__main__":
    command.run(main, required=("workdir",))
