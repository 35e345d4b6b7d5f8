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
from gpt4v_jax.training import objectives


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


def init_params(model: GPT4V, seed: int):
    """Parameters from (seed, path of the parameter). The stream's length changes none: a short one traces quickly."""
    short = dataclasses.replace(model.layout, context=2, source=min(model.layout.source, 2))
    return model.init(jax.random.key(seed), batch_lib.empty(short, 1))["params"]


def abstract_params(model: GPT4V, seed: int = 0):
    return jax.eval_shape(lambda: init_params(model, seed))


def init_state(model: GPT4V, tx, seed: int, mesh: jax.sharding.Mesh, keep_ema: bool = False) -> State:
    """-> a State that is born sharded: no device ever holds the whole."""

    def init():
        params = init_params(model, seed)
        watch = Watch(jnp.float32(0), jnp.int32(0), jnp.int32(0), jnp.int32(0))
        # A copy in name only would be given to the first step twice.
        ema = jax.tree.map(jnp.copy, params) if keep_ema else None
        return State(jnp.int32(0), params, tx.init(params), watch, ema)

    return jax.jit(init, out_shardings=state_sharding(jax.eval_shape(init), mesh))()


def state_sharding(state, mesh: jax.sharding.Mesh):
    return sharding.params_sharding(state, mesh)


def forward(model: GPT4V, params, batch: batch_lib.Batch, key=None):
    """-> logits [B,T,V] float32."""
    hidden, _, _ = model.apply({"params": params}, batch, key=key)
    return model.apply({"params": params}, hidden, method="logits")


def make_train_step(model: GPT4V, tx: optax.GradientTransformation, run: config.Config):
    """-> train_step(state, batch) -> (state, metrics: scalars)."""

    def train_step(state: State, batch: batch_lib.Batch):
        key = None
        if run.model.backbone.dropout:  # from (seed, step): a resumed run draws what the unbroken one draws
            key = jax.random.fold_in(jax.random.key(run.seed), state.step)

        def loss_fn(params):
            sums = objectives.next_token(forward(model, params, batch, key), batch)
            return sums["loss"][0] / sums["loss"][1], sums

        (loss, sums), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = {
            "loss": loss,
            "accuracy": sums["accuracy"][0] / sums["accuracy"][1],
            "grad_norm": optax.global_norm(grads),
            "trained_tokens": sums["loss"][1],
        }
        return State(state.step + 1, params, opt_state), metrics

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

    def eval_step(params, batch: batch_lib.Batch):
        logits = forward(model, params, batch)
        return objectives.token_nats(logits, batch.target), jnp.argmax(logits, axis=-1) == batch.target

    return eval_step
