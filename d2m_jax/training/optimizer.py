"""AdamW with a schedule and rates by name; the split of parameters into trainable and frozen."""

import re
from collections.abc import Container, Sequence
from fnmatch import fnmatchcase

import jax
import jax.numpy as jnp
import optax

from d2m_jax.config import ConfigError, OptimizerConfig, suggestion
from d2m_jax.named_arrays import names, restructure


def make_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Learning rate of step 0, 1, …: linear warm-up over `warmup` steps, then the schedule."""
    peak, decay = config.learning_rate, max(steps - config.warmup, 1)
    warm = optax.linear_schedule(peak / max(config.warmup, 1), peak, config.warmup - 1)
    after = {
        "constant": optax.constant_schedule(peak),
        "linear": optax.linear_schedule(peak, peak * config.final_rate, decay),
        "cosine": optax.cosine_decay_schedule(peak, decay, config.final_rate),
    }
    return optax.join_schedules([warm, after[config.schedule]], [config.warmup])


def make_optimizer(
    config: OptimizerConfig, steps: int, params: dict
) -> optax.GradientTransformation:
    """Clipping by global norm, Adam, weight decay on matrices, schedule, `rates`' factors by name.

    Where several patterns of `rates` match a name their factors multiply. Raises ConfigError for a
    pattern that matches nothing. Accumulation and the running average are the loop's.
    """
    known = list(names(params))
    # A stack's biases have leading axes too, so matrices are told by name, not by rank.
    matrices = restructure(params, {name: name.endswith("kernel") for name in known})
    factors = dict.fromkeys(known, 1.0)
    for pattern, factor in config.rates.items():
        for name in match(pattern, known, "OptimizerConfig.rates"):
            factors[name] *= factor
    factors = restructure(params, factors)
    parts = [optax.scale_by_adam(config.b1, config.b2)]
    if config.clip:
        parts.insert(0, optax.clip_by_global_norm(config.clip))
    if config.weight_decay:
        parts.append(optax.add_decayed_weights(config.weight_decay, mask=matrices))
    parts.append(optax.scale_by_learning_rate(make_schedule(config, steps)))
    if config.rates:
        parts.append(
            optax.stateless(lambda updates, _: jax.tree.map(jnp.multiply, updates, factors))
        )
    return optax.chain(*parts)


def match(pattern: str, known: Sequence[str], field: str) -> list[str]:
    """The names that an fnmatch pattern matches. Raises ConfigError with a near word if none do."""
    found = [name for name in known if fnmatchcase(name, pattern)]
    if not found:
        words = {word for name in known for word in name.split(".")}
        strange = [word for word in re.split(r"[.*?\[\]]+", pattern) if word and word not in words]
        hints = [suggestion(word, words) for word in strange] + [suggestion(pattern, known)]
        hint = next(filter(None, hints), "")
        raise ConfigError(
            f"{field}: {pattern!r} matches no parameter{hint} (a name looks like {known[-1]})"
            if known
            else f"{field}: {pattern!r} matches no parameter, for there are none"
        )
    return found


def split(params: dict, train: Sequence[str], freeze: Sequence[str] = ()) -> tuple[dict, dict]:
    """(trainable, frozen): two nested dicts that `merge` joins again; train's names less freeze's.

    Raises ConfigError for a pattern that matches nothing and for an empty selection.
    """
    known = list(names(params))
    chosen = {name for pattern in train for name in match(pattern, known, "StageConfig.train")}
    for pattern in freeze:
        chosen.difference_update(match(pattern, known, "StageConfig.freeze"))
    if not chosen:
        raise ConfigError(
            f"StageConfig.train: expected at least one parameter to train, found none in train ="
            f" {list(train)} without freeze = {list(freeze)}"
        )

    return select(params, chosen)


def select(params: dict, chosen: Container[str]) -> tuple[dict, dict]:
    """The leaves of these names, and the others: two nested dicts that `merge` joins again."""

    def those(tree: dict, prefix: str, wanted: bool):
        kept = {}
        for key, value in tree.items():
            name = f"{prefix}{key}"
            if isinstance(value, dict):
                if inner := those(value, name + ".", wanted):
                    kept[key] = inner
            elif (name in chosen) == wanted:
                kept[key] = value
        return kept

    return those(params, "", True), those(params, "", False)


def merge(trainable: dict, frozen: dict) -> dict:
    """The whole tree of `split`'s or `select`'s two."""
    merged = dict(frozen)
    for key, value in trainable.items():
        both = key in merged and isinstance(value, dict)
        merged[key] = merge(value, merged[key]) if both else value
    return merged
