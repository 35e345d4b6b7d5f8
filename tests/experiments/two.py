"""Do two tiny variants go on where they were?   python -m tests.experiments.two --workdir runs/two"""

from experiments import sweep

VARIANTS = {"causal": {}, "prefix_lm": {"model.fusion.kind": "prefix_lm"}}
COMMON = {"steps": 6, "save_every": 2, "eval.every": 3, "keep_last": 5}

if __name__ == "__main__":
    sweep.main(__doc__, {"toy": sweep.Sweep("configs/tiny.py", VARIANTS, COMMON, seeds=2, match="steps")})
