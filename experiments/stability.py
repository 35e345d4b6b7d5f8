"""Do norms of queries and keys, and a z-loss, keep training stable at a high learning rate?

python -m experiments.stability --workdir runs/stability [--size toy|small] [--jobs 2] [--plan]

Chameleon (Chameleon team 2024, arXiv 2405.09818, section 2.3): a model of mixed modalities diverges without norms of
queries and keys and a z-loss, and does not where it need not make pictures. Wortsman et al. 2023 (arXiv 2309.14322)
see such instabilities in small models at high learning rates. Here AdamW's learning rate is twenty times the config's
default, the guard stops no run for a loss that jumps, and the last checkpoint is scored, not the best one, so that a
run that diverges shows it: in its accuracy, and in the curves of the training loss.
"""

from experiments import sizes, sweep

QK_NORM, Z_LOSS = {"model.backbone.qk_norm": True}, {"objective.z_loss": 1e-4}
VARIANTS = {"neither": {}, "qk_norm": QK_NORM, "z_loss": Z_LOSS, "both": QK_NORM | Z_LOSS}
COMMON = {"optim.name": "adamw", "optim.lr": 2e-2, "guard.spike": 0.0, "guard.limit": 10**6, "eval.best": ""}
SIZES = {
    "toy": sweep.Sweep(sizes.BASE, VARIANTS, sizes.TOY | COMMON, smoke=sizes.SMOKE),
    "small": sweep.Sweep(sizes.BASE, VARIANTS, sizes.SMALL | COMMON, smoke=sizes.SMOKE),
}

if __name__ == "__main__":
    sweep.main(__doc__, SIZES)
