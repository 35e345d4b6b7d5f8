"""The state and the train and eval steps as pure functions: what train runs and what a plan would compile."""

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from gpt4v_jax import batch as batch_lib
from gpt4v_jax import config, sharding
from gpt4v_jax.model.gpt4v import GPT4V
from gpt4v_jax.training import contrastive, objectives, optim
from gpt4v_jax.training import lora as lora_lib

PLAIN = config.Objective()

NO_LORA = config.LoRA()


@flax.struct.dataclass
class Watch:
    """What the guard remembers; scalars."""

    mean: jax.Array  # float32: running average of the accepted losses, not yet divided by 1 - decay^seen
    seen: jax.Array  # int32: accepted steps
    skipped: jax.Array  # int32: skipped steps
    in_row: jax.Array  # int32: skipped steps since the last accepted one


@flax.struct.dataclass
class State:
    """All that a run carries from step to step. Random numbers need nothing here: they come from (seed, step, ...)."""

    step: jax.Array  # [] int32: steps done, and so the data position
    params: Any
    opt_state: Any
    watch: Watch | None = None
    ema: Any = None  # a moving average of params, where config.optim.ema keeps one


def init_params(model: GPT4V, seed: int, lora: config.LoRA = NO_LORA):
    """Parameters from (seed, path of the parameter). The stream's length changes none: a short one traces quickly."""
    short = dataclasses.replace(model.layout, context=2, source=min(model.layout.source, 2))
    return lora_lib.added(model.init(jax.random.key(seed), batch_lib.empty(short, 1))["params"], lora, seed)


def abstract_params(model: GPT4V, seed: int = 0, lora: config.LoRA = NO_LORA):
    return jax.eval_shape(lambda: init_params(model, seed, lora))


def init_state(model: GPT4V, tx, seed: int, mesh: jax.sharding.Mesh, keep_ema: bool = False,
               lora: config.LoRA = NO_LORA) -> State:  # fmt: skip
    """-> a State that is born sharded: no device ever holds the whole."""

    def init():
        params = init_params(model, seed, lora)
        watch = Watch(jnp.float32(0), jnp.int32(0), jnp.int32(0), jnp.int32(0))
        # A copy in name only would be given to the first step twice.
        ema = jax.tree.map(jnp.copy, params) if keep_ema else None
        return State(jnp.int32(0), params, tx.init(params), watch, ema)

    return jax.jit(init, out_shardings=state_sharding(jax.eval_shape(init), mesh))()


def state_sharding(state: State, mesh: jax.sharding.Mesh):
    """Where every leaf of a state lies: what has the path and the shape of a parameter lies where the parameter lies,
    what has only its path (Adafactor's sums over rows and columns) is small and replicated."""
    shapes = {sharding.path_name(path): x.shape for path, x in jax.tree_util.tree_leaves_with_path(state.params)}

    def one(path, x):
        name = sharding.path_name(path)
        ends = [name.split("/", i)[-1] for i in range(name.count("/") + 1)]
        parameter = next((end for end in ends if end in shapes), None)
        return sharding.param_sharding(name, x.shape if x.shape == shapes.get(parameter, x.shape) else (), mesh)

    return jax.tree_util.tree_map_with_path(one, state)


def forward(model: GPT4V, params, batch: batch_lib.Batch, keys=None):
    """-> logits [B,T,V] float32, whole. keys [B]: of the rows, for dropout."""
    hidden, _, _ = model.apply({"params": params}, batch, keys=keys)
    return model.apply({"params": params}, hidden, method="logits")


# ---- the train step


def cast(params, dtype: str):
    """What matrix products read, in `dtype`; norms, biases and other vectors stay as they are."""

    def one(path, x):
        return x.astype(dtype) if sharding.path_name(path).endswith(("kernel", "table")) else x

    return params if dtype == "float32" else jax.tree_util.tree_map_with_path(one, params)


def token_scores(model: GPT4V, params, batch: batch_lib.Batch, keys=None) -> objectives.Scores:
    """Computed as model.compute says."""
    variables = {"params": cast(params, model.compute.dtype)}
    hidden, _, _ = model.apply(variables, batch, keys=keys)
    x, head = model.apply(variables, hidden, method="before_head")
    scores = objectives.scores(x, head, batch.target, model.compute.vocab_chunks)
    if batch.pair is None:
        return scores
    return scores._replace(embedded=model.apply(variables, hidden, batch.pair, method="embeddings"))


def row_keys(seed: int, step, rows: int):
    """-> keys [B]: all random numbers of a row come from (seed, step, number of the row in the batch) and a name."""
    key = jax.random.fold_in(jax.random.key(seed), step)
    return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(rows))


def gradients(model: GPT4V, params, batch: batch_lib.Batch, keys=None, objective: config.Objective = PLAIN,
              lora: config.LoRA = NO_LORA):  # fmt: skip
    """-> ({name: sum / weight}, trained tokens, the gradient of "loss"), over compute.accumulate micro-batches.

    Each micro-batch's sum is divided by the weight of the whole batch, so that the gradients just add up. Pairs see the
    whole batch: what each micro-batch's embeddings are to change is found before (`of_pairs`).
    """
    micro = model.compute.accumulate
    weight = batch.weight.sum()
    pairs = objective.contrastive > 0

    def loss_fn(params, batch, keys, pull=None):
        """pull: the gradient of the loss by this micro-batch's embeddings, where they are not the whole batch's."""
        params = lora_lib.merged(params, lora)
        scores = token_scores(model, params, batch, keys)
        sums = objectives.tokens(scores, batch, objective.z_loss > 0)
        values = {name: total / jnp.where(weight > 0, weight, 1) for name, (total, _) in sums.items()}
        if pairs and pull is None:
            values["contrastive"] = pair_loss(model, params, scores.embedded, batch.pair.id, objective)
        loss = objectives.total(values, objective)["loss"]
        if pull is not None:
            loss += sum(jax.tree.leaves(jax.tree.map(jnp.vdot, pull, scores.embedded)))
        return loss, values

    grad_fn = jax.grad(loss_fn, has_aux=True)
    if micro == 1:
        grads, values = grad_fn(params, batch, keys)
        return objectives.total(values, objective), weight, grads

    def split(x):  # every micro-th row: the rows of a device stay on it
        x = jnp.swapaxes(x.reshape(x.shape[0] // micro, micro, *x.shape[1:]), 0, 1)
        return sharding.shard(x, None, "batch")

    def add(total, part):
        return jax.tree.map(jnp.add, total, grad_fn(params, *part)), None

    parts = jax.tree.map(split, (batch, keys))
    if pairs:
        (of_batch, of_whole), pull = of_pairs(model, params, parts, objective, lora)
        parts = (*parts, pull)
    shapes = jax.eval_shape(grad_fn, params, *jax.tree.map(lambda x: x[0], parts))
    start = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    (grads, values), _ = jax.lax.scan(add, start, parts)
    if pairs:
        values["contrastive"], grads = of_batch, jax.tree.map(jnp.add, grads, of_whole)
    return objectives.total(values, objective), weight, grads


def pair_loss(model: GPT4V, params, embedded, id, objective: config.Objective):
    return contrastive.loss(embedded, id, model.apply({"params": params}, method="learned"), objective.contrastive_loss)


def of_pairs(model: GPT4V, params, parts, objective: config.Objective, lora: config.LoRA):
    """The first of two passes (GradCache, Gao et al. 2021): all micro-batches' embeddings, and what the loss is to
    change in them -> ((the loss on pairs, coefficient x its gradient by what only it reads of the parameters),
    coefficient x its gradient by the embeddings, micro-batch by micro-batch).

    parts: (batch, keys), whose leaves have the micro-batches in front.
    """
    whole = lora_lib.merged(params, lora)
    _, embedded = jax.lax.scan(lambda _, part: (None, token_scores(model, whole, *part).embedded), None, parts)

    def loss_fn(params, embedded):
        value = pair_loss(model, lora_lib.merged(params, lora), embedded, parts[0].pair.id, objective)
        return objective.contrastive * value, value

    (of_params, of_embedded), value = jax.grad(loss_fn, (0, 1), has_aux=True)(params, embedded)
    return (value, of_params), of_embedded


def make_train_step(model: GPT4V, tx: optax.GradientTransformation, run: config.Config):
    """-> train_step(state, batch) -> (state, metrics: scalars)."""
    schedule = optim.schedule(run.optim, run.steps)

    def train_step(state: State, batch: batch_lib.Batch):
        keys = row_keys(run.seed, state.step, batch.tokens.shape[0]) if run.model.drops else None
        values, weight, grads = gradients(model, state.params, batch, keys, run.objective, run.lora)
        frozen = optim.frozen(run.optim, run.lora, grads)
        if frozen:  # they count nowhere, and need not be computed
            grads = jax.tree.map(lambda x, left: jnp.zeros_like(x) if left else x, grads, frozen)
        grad_norm = optax.tree.norm(grads)
        lr = schedule(state.watch.seen)  # an optimizer counts the steps that it takes
        accepted = jnp.isfinite(values["loss"]) & jnp.isfinite(grad_norm) & jnp.isfinite(lr)
        accepted &= ~spikes(values["loss"], state.watch, run.guard.spike)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema = state.ema
        if ema is not None:
            ema = jax.tree.map(lambda old, new: run.optim.ema * old + (1 - run.optim.ema) * new, ema, params)
            if frozen:  # to the bit, where a sum of shares would be rounded
                ema = jax.tree.map(lambda x, p, left: p if left else x, ema, params, frozen)
        after, before = (params, opt_state, ema), (state.params, state.opt_state, state.ema)
        params, opt_state, ema = jax.tree.map(lambda new, old: jnp.where(accepted, new, old), after, before)
        watch = watched(state.watch, values["loss"], accepted)
        metrics = values | {
            "grad_norm": grad_norm, "trained_tokens": weight, "learning_rate": lr, "skipped": watch.skipped,
            "skipped_in_row": watch.in_row,
        }  # fmt: skip
        return State(state.step + 1, params, opt_state, watch, ema), metrics

    return train_step


def compile_train_step(model, tx, run: config.Config, state: State, mesh: jax.sharding.Mesh):
    """jit with shardings (pjit is jax.jit today); the old state's memory is given to the new one."""
    return jax.jit(
        make_train_step(model, tx, run),
        in_shardings=(state_sharding(state, mesh), sharding.batch_sharding(mesh)),
        out_shardings=(state_sharding(state, mesh), None),
        donate_argnums=0,
    )


def make_eval_step(model: GPT4V):
    """-> eval_step(params, batch) -> per position (nats of the target [B,T], was the target the argmax [B,T])."""
    return lambda params, batch: token_scores(model, params, batch)[:2]


def make_embed_step(model: GPT4V):
    """-> embed_step(params, batch) -> unit vectors [B,P,E] of the media of Batch.pair, and of its texts."""
    return lambda params, batch: token_scores(model, params, batch).embedded


# ---- the guard

WATCH_DECAY, WATCH_START = 0.95, 20  # of the running average of losses; accepted steps before it is trusted


def spikes(loss, watch: Watch, factor: float):
    """Is the loss beyond `factor` times the running average of the accepted ones? Never with factor 0."""
    if not factor:
        return jnp.bool_(False)
    mean = watch.mean / (1 - WATCH_DECAY ** jnp.maximum(watch.seen, 1))
    return (watch.seen >= WATCH_START) & (loss > factor * mean)


def watched(watch: Watch, loss, accepted) -> Watch:
    mean = WATCH_DECAY * watch.mean + (1 - WATCH_DECAY) * loss
    return Watch(
        mean=jnp.where(accepted, mean, watch.mean),
        seen=watch.seen + accepted,
        skipped=watch.skipped + ~accepted,
        in_row=jnp.where(accepted, 0, watch.in_row + 1),
    )
