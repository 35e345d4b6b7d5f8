"""Who is timed by train_step.py: our step, PyTorch's, and a matrix product; each in a process of its own."""

import dataclasses
import resource
import time

import numpy as np

THREADS = 2
BATCHES = 4  # different ones, in turn
LR, BETAS, DECAY, CLIP = 1e-3, (0.9, 0.99), 0.1, 1.0
SGEMM = 2048  # side of the square matrices whose product gives the peak
OURS, EAGER, COMPILED, PEAK = "gpt4v_jax", "torch eager", "torch compiled", "sgemm"


@dataclasses.dataclass(frozen=True)
class Case:
    width: int
    context: int
    depth: int
    heads: int
    gelu: str  # tanh | exact
    steps: int  # a round
    rows: int = 12
    vocab: int = 65

    @property
    def name(self) -> str:
        return f"width {self.width} x context {self.context}, {self.gelu} GELU"

    @property
    def tokens(self) -> int:
        return self.rows * self.context


CASES = [
    Case(width, context, depth, heads, gelu, steps)
    for width, context, depth, heads, steps in ((128, 64, 4, 4, 30), (384, 256, 6, 6, 2))
    for gelu in ("tanh", "exact")
]


def token_batches(case: Case) -> list[tuple[np.ndarray, np.ndarray]]:
    """-> BATCHES x (tokens, targets), [B,T] int32: the same for every contestant."""
    stream = np.random.default_rng(0).integers(0, case.vocab, (BATCHES, case.rows, case.context + 1), dtype=np.int32)
    return [(rows[:, :-1], rows[:, 1:]) for rows in stream]


# ---- contestants: (case) -> (facts to check, step(i) -> nothing, wait() -> last loss)


def ours(case: Case):
    import jax

    from gpt4v_jax import batch as batch_lib
    from gpt4v_jax import sharding
    from gpt4v_jax.model import flops
    from gpt4v_jax.model.gpt4v import GPT4V
    from gpt4v_jax.training import optim
    from gpt4v_jax.training import step as step_lib

    run = our_config(case)
    mesh = sharding.make_mesh(run.mesh)
    jax.set_mesh(mesh)
    layout = batch_lib.layout(run.model, run.data)
    model = GPT4V(run.model, layout)
    tx = optim.make(run.optim, run.steps, step_lib.abstract_params(model))
    state = step_lib.init_state(model, tx, run.seed, mesh)
    train_step = step_lib.compile_train_step(model, tx, run, state, mesh)
    empty = batch_lib.empty(layout, case.rows)
    position = np.broadcast_to(np.arange(case.context, dtype=np.int32)[:, None], empty.position.shape)
    document, weight = np.ones_like(empty.document), np.ones_like(empty.weight)
    batches = [
        empty.replace(tokens=tokens, target=target, position=position, document=document, weight=weight)
        for tokens, target in token_batches(case)
    ]
    values = None

    def step(i):
        nonlocal state, values
        state, values = train_step(state, sharding.put_batch(batches[i % BATCHES], mesh))

    return {"parameters": sum(flops.parameters(state.params).values())}, step, lambda: float(values["loss"])


def our_config(case: Case):
    from gpt4v_jax import config

    backbone = config.Backbone(
        depth=case.depth, width=case.width, heads=case.heads, norm="layer", norm_eps=1e-5, bias=config.BIASES,
        activation={"tanh": "gelu_tanh", "exact": "gelu"}[case.gelu],
    )  # fmt: skip
    model = config.Model(vocab=case.vocab, context=case.context, position="learned", backbone=backbone)
    optimizer = config.Optim(
        lr=LR, schedule="constant", warmup=0, b1=BETAS[0], b2=BETAS[1], weight_decay=DECAY, clip=CLIP
    )
    return config.Config(batch=case.rows, model=model, optim=optimizer, mesh=config.Mesh(data=1))


def torch_gpt2(case: Case, compiled: bool = False):
    import torch
    import transformers

    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=case.vocab, n_positions=case.context, n_embd=case.width, n_layer=case.depth, n_head=case.heads,
        activation_function={"tanh": "gelu_pytorch_tanh", "exact": "gelu"}[case.gelu], use_cache=False,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
    )).train()  # fmt: skip
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": DECAY},
        {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=BETAS, fused=True)
    facts = {
        "parameters": sum(p.numel() for p in parameters),
        "attention": model.config._attn_implementation,
    }
    run = torch.compile(model) if compiled else model
    batches = token_batches(case)
    loss = None

    def step(i):
        nonlocal loss
        tokens, target = (torch.from_numpy(x).long() for x in batches[i % BATCHES])
        # shift_labels: the targets are shifted already, so that every position is trained, as in ours
        loss = run(input_ids=tokens, labels=target, shift_labels=target).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return facts, step, lambda: loss.item()


def sgemm(case: Case):
    """The peak: a product of square float32 matrices by torch (oneMKL), the fastest one at hand."""
    import torch

    torch.set_num_threads(THREADS)
    a, b = torch.randn(SGEMM, SGEMM), torch.randn(SGEMM, SGEMM)
    out = torch.empty(SGEMM, SGEMM)
    return {}, lambda i: torch.mm(a, b, out=out), lambda: 0.0


CONTESTANTS = {
    OURS: ours,
    EAGER: torch_gpt2,
    COMPILED: lambda case: torch_gpt2(case, compiled=True),
    PEAK: sgemm,
}


# ---- a contestant's process


def work(pipe, name: str, case: Case) -> None:
    """Makes the contestant, warms it up and then runs a round whenever asked: n steps -> (wall, CPU) seconds a step."""
    try:
        facts, step, wait = CONTESTANTS[name](case)
        step(0)
        facts["first_loss"] = wait()
        for i in range(1, 4):
            step(i)
        wait()
        pipe.send(facts)
    except Exception as error:  # such as no C++ compiler for torch.compile: reported, and the others go on
        text = " ".join(f"{type(error).__name__}: {error}".split())
        pipe.send({"error": text[:300]})
        return
    while steps := pipe.recv():
        before, cpu = time.perf_counter(), _cpu_seconds()
        for i in range(steps):
            step(i)
        wait()
        pipe.send(((time.perf_counter() - before) / steps, (_cpu_seconds() - cpu) / steps))


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime
