"""One step of a stage as a compiled program on pure trees, and the state that it carries."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from d2m_jax.config import StageConfig
from d2m_jax.sharding import parameter_shardings, replicated
from d2m_jax.training.optimizer import make_optimizer, make_schedule, merge, select, split
from d2m_jax.weights.named_arrays import names, restructure

# loss(params, constants, batch, key) → the batch's mean, and metrics: scalars or one per layer.
Loss = Callable[[dict, Any, dict, Array], tuple[Float[Array, ""], dict[str, Array]]]


class Step:
    """The programs of a stage, for parameters and constants that may be abstract.

    They are given a state, `frozen` and the constants. A frozen array that is among the constants
    too (the same object: a teacher's) is given once, so `frozen` lacks it; `whole` has it again.
    """

    def __init__(self, stage: StageConfig, loss: Loss, params: dict, constants: Any, mesh: Mesh):
        self.stage, self.mesh = stage, mesh
        trainable, frozen = split(params, stage.train, stage.freeze)
        # The arrays themselves are not kept, or the state's copy would not be the only one.
        self._trainable = jax.eval_shape(lambda tree: tree, trainable)
        self.optimizer = make_optimizer(stage.optimizer, stage.steps, trainable)
        place = {id(leaf): i for i, leaf in enumerate(jax.tree.leaves(constants))}
        self._at = {name: place[id(a)] for name, a in names(frozen).items() if id(a) in place}
        self._shared, self.frozen = select(frozen, self._at)
        self._loss = loss

    def state(self) -> dict:
        """The state, abstract: its shapes, types and places."""
        state = jax.eval_shape(self._fresh, self._trainable)
        return jax.tree.map(
            lambda a, sharding: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding),
            state,
            parameter_shardings(self.mesh, state),
        )

    def _shardings(self) -> dict:
        return jax.tree.map(lambda a: a.sharding, self.state())

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
        }
        if self.stage.optimizer.ema:
            state["ema"] = trainable
        return jax.tree.map(jnp.copy, state)

    def whole(self, trainable: dict, frozen: dict, constants: Any) -> dict:
        """All parameters again."""
        leaves = jax.tree.leaves(constants)
        shared = {name: leaves[i] for name, i in self._at.items()}
        return merge(trainable, merge(frozen, restructure(self._shared, shared)))

    def loss(self, trainable: dict, frozen: dict, constants: Any, batch: dict, key: Array):
        """The stage's loss of what the programs are given."""
        with jax.named_scope("loss"):  # scopes are what a profile shows
            return self._loss(self.whole(trainable, frozen, constants), constants, batch, key)

    def train(self) -> Callable:
        """The jitted step(state, frozen, constants, batch, key, signals) → next state, metrics.

        `signals`, one number per device, may tell of a process that was asked to stop (see
        hosts.flags): the metric `signal` is the largest.
        """
        schedule = make_schedule(self.stage.optimizer, self.stage.steps)
        parts = self.stage.optimizer.accumulate
        gradient = jax.value_and_grad(self.loss, has_aux=True)

        def step(
            state: dict,
            frozen: dict,
            constants: Any,
            batch: dict,
            key: Array,
            signals: Int[Array, " devices"],
        ):
            trainable = state["trainable"]
            key = jax.random.fold_in(key, state["step"])

            def micro(total: dict, part: tuple):
                result, gradients = gradient(trainable, frozen, constants, *part)
                return jax.tree.map(jnp.add, total, gradients), result

            if parts == 1:
                (value, metrics), gradients = gradient(trainable, frozen, constants, batch, key)
            else:
                # Rows i, i + parts, … form a micro-batch, so that every device keeps its own rows.
                micro_batches = jax.tree.map(
                    lambda a: a.reshape(-1, parts, *a.shape[1:]).swapaxes(0, 1), batch
                )
                zeros = jax.tree.map(jnp.zeros_like, trainable)
                gradients, (values, metrics) = jax.lax.scan(
                    micro, zeros, (micro_batches, jax.random.split(key, parts))
                )
                gradients = jax.tree.map(lambda g: g / parts, gradients)
                value, metrics = jax.tree.map(lambda a: a.mean(0), (values, metrics))

            with jax.named_scope("optimizer"):
                new = self._updated(state, gradients)
            metrics = metrics | {
                "loss": value,
                "gradient_norm": optax.tree.norm(gradients),
                "learning_rate": schedule(state["step"]),
                "signal": signals.max(),
            }
            return new, metrics

        out = self._shardings(), replicated(self.mesh)
        return jax.jit(step, donate_argnums=0, out_shardings=out)

    def _updated(self, state: dict, gradients: dict) -> dict:
        updates, optimizer_state = self.optimizer.update(
            gradients, state["optimizer"], state["trainable"]
        )
        new = {
            "trainable": optax.apply_updates(state["trainable"], updates),
            "optimizer": optimizer_state,
            "step": state["step"] + 1,
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
            value, metrics = self.loss(trainable, frozen, constants, batch, key)
            scalars = {f"validation_{n}": v for n, v in metrics.items() if jnp.ndim(v) == 0}
            return {"validation": value} | scalars

        return jax.jit(one, out_shardings=replicated(self.mesh))


def trained(state: dict) -> dict:
    """The parameters that a stage is judged by and hands on."""
    return state.get("ema", state["trainable"])
