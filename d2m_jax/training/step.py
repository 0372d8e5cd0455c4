"""One step of a stage as a compiled program on pure trees, and the state that it carries."""

from collections.abc import Callable
from functools import cached_property, partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from d2m_jax.config import StageConfig
from d2m_jax.distillation.fixed_times import TIMES, FixedTimes
from d2m_jax.distillation.objective import Means, Objective, remembered
from d2m_jax.named_arrays import names, restructure
from d2m_jax.sharding import in_parts, parameter_shardings, replicated
from d2m_jax.training.optimizer import make_optimizer, make_schedule, merge, select, split

Tree = TypeVar("Tree")


class Step:
    """The programs of a stage, for parameters and constants that may be abstract.

    Each takes three trees: the state (what trains, and what the optimizer keeps of it), `frozen`
    (parameters that do not train) and the constants (what the loss needs besides: a teacher). What
    a student has in common with its teacher is one and the same array, and is given once: among the
    constants. `frozen` leaves it out, and `whole` puts it back.
    """

    def __init__(
        self, stage: StageConfig, loss: Objective, params: dict, constants: Any, mesh: Mesh
    ):
        self.stage, self.mesh = stage, mesh
        trainable, frozen = split(params, stage.train, stage.freeze)
        # The arrays themselves are not kept, or the state's copy would not be the only one.
        self._trainable = jax.eval_shape(lambda tree: tree, trainable)
        self.optimizer = make_optimizer(stage.optimizer, stage.steps, trainable)
        place = {id(leaf): i for i, leaf in enumerate(jax.tree.leaves(constants))}
        self._at = {name: place[id(a)] for name, a in names(frozen).items() if id(a) in place}
        self._shared, self.frozen = select(frozen, self._at)
        self._loss = loss

    @cached_property
    def state(self) -> dict:
        """The state, abstract: its shapes, types and places."""
        state = jax.eval_shape(self._fresh, self._trainable)
        return jax.tree.map(
            lambda a, sharding: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding),
            state,
            parameter_shardings(self.mesh, state),
        )

    def _shardings(self) -> dict:
        return jax.tree.map(lambda a: a.sharding, self.state)

    def start(self, params: dict) -> dict:
        """The state before the first step: a copy, because steps donate it."""
        trainable, _ = select(params, names(self._trainable))
        return jax.jit(self._fresh, out_shardings=self._shardings())(trainable)

    def _fresh(self, trainable: dict) -> dict:
        # What trains is float32, whatever it was stored in.
        trainable = jax.tree.map(
            lambda a: a.astype(jnp.float32) if jnp.issubdtype(a.dtype, jnp.floating) else a,
            trainable,
        )
        state = {
            "trainable": trainable,
            "optimizer": self.optimizer.init(trainable),
            "step": jnp.int32(0),
            "means": self._loss.start,  # of earlier steps, by which the loss weighs
        }
        if self.stage.optimizer.ema:
            state["ema"] = trainable
        return jax.tree.map(jnp.copy, state)

    def whole(self, trainable: dict, frozen: dict, constants: Any) -> dict:
        """All parameters again."""
        leaves = jax.tree.leaves(constants)
        shared = {name: leaves[i] for name, i in self._at.items()}
        return merge(trainable, merge(frozen, restructure(self._shared, shared)))

    def _in_parts(self, function: Callable[[dict], Tree], batch: dict, like: Tree) -> Tree:
        """The mean of what a function gives for the micro-batches of a drawn batch: a tree like
        `like`."""
        parts = self.stage.optimizer.accumulate
        if parts == 1:
            return function(batch)

        def add(total: Tree, part: dict):
            return jax.tree.map(jnp.add, total, function(part)), None

        total, _ = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, like), in_parts(batch, parts))
        return jax.tree.map(lambda a: a / parts, total)

    def train(self) -> Callable:
        """The jitted step(state, frozen, constants, batch, key, signals) → next state, metrics.

        `signals`, one number per device, may tell of a process that was asked to stop (see
        hosts.flags): the metric `signal` is the largest.
        """
        schedule = make_schedule(self.stage.optimizer, self.stage.steps)

        def step(
            state: dict,
            frozen: dict,
            constants: Any,
            batch: dict,
            key: Array,
            signals: Int[Array, " devices"],
        ):
            def loss(trainable: dict, part: dict):
                with jax.named_scope("loss"):  # scopes are what a profile shows
                    params = self.whole(trainable, frozen, constants)
                    means = self._loss.means(params, constants, part)
                    return self._loss.value(means, state["means"])[0], means

            drawn = self._loss.draw(batch, jax.random.fold_in(key, state["step"]))
            gradient = partial(jax.grad(loss, has_aux=True), state["trainable"])
            like = state["trainable"], state["means"]
            gradients, means = self._in_parts(gradient, drawn, like)
            value, metrics = self._loss.value(means, means)

            with jax.named_scope("optimizer"):
                new = self._updated(state, gradients, means)
            metrics = metrics | {
                "loss": value,
                "gradient_norm": optax.tree.norm(gradients),
                "learning_rate": schedule(state["step"]),
                "signal": signals.max(),
            }
            return new, metrics

        out = self._shardings(), replicated(self.mesh)
        return jax.jit(step, donate_argnums=0, out_shardings=out)

    def _updated(self, state: dict, gradients: dict, means: Means) -> dict:
        updates, optimizer_state = self.optimizer.update(
            gradients, state["optimizer"], state["trainable"]
        )
        new = {
            "trainable": optax.apply_updates(state["trainable"], updates),
            "optimizer": optimizer_state,
            "step": state["step"] + 1,
            "means": remembered(state["means"], means, state["step"]),
        }
        if "ema" in state:
            # The average forgets its start faster at first, or a short stage would keep much of it.
            n = new["step"].astype(jnp.float32)
            decay = jnp.minimum(self.stage.optimizer.ema, (1 + n) / (10 + n))
            new["ema"] = jax.tree.map(
                lambda e, p: e + (1 - decay) * (p - e), state["ema"], new["trainable"]
            )
        return new

    def evaluate(self) -> Callable:
        """The jitted evaluation (trainable, frozen, constants, batch, key) → scalars."""

        def one(trainable: dict, frozen: dict, constants: Any, batch: dict, key: Array):
            params = self.whole(trainable, frozen, constants)
            means = partial(self._loss.means, params, constants)
            found = self._in_parts(means, self._loss.draw(batch, key), self._loss.start)
            value, metrics = self._loss.value(found, found)
            scalars = {f"validation_{n}": v for n, v in metrics.items() if jnp.ndim(v) == 0}
            return {"validation": value} | scalars

        return jax.jit(one, out_shardings=replicated(self.mesh))

    def at_fixed_times(self, fixed: FixedTimes) -> Callable:
        """The jitted (trainable, frozen, constants, batch, key, first, offset) → sums of errors by
        time (distillation/fixed_times.py)."""
        like = {name: np.zeros(TIMES, np.float32) for name in (*fixed.kinds, "count")}

        def one(
            trainable: dict,
            frozen: dict,
            constants: Any,
            batch: dict,
            key: Array,
            first: Int[Array, ""],
            offset: Float[Array, ""],
        ):
            sums = partial(fixed.sums, self.whole(trainable, frozen, constants), constants)
            return self._in_parts(sums, fixed.draw(batch, key, first, offset), like)

        return jax.jit(one, out_shardings=replicated(self.mesh))


def trained(state: dict) -> dict:
    """The parameters that a stage is judged by and hands on."""
    return state.get("ema", state["trainable"])
