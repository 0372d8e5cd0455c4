"""What LoRA files hold, one class per kind: each gives what is added to one tensor of a model.

Arrays are in torch's layout, [outputs, inputs]; sums and products are float32. `factor` is the
strength that the user asked for, times alpha / rank where the kind has one.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float


@runtime_checkable
class Difference(Protocol):
    """A change of one tensor."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the tensor that it changes."""
        ...

    def array(self, weight: Callable[[], np.ndarray]) -> Float[np.ndarray, "..."]:
        """What is added, float32; `weight` gives the tensor as the model has it."""
        ...


@dataclass(frozen=True)
class LowRank:
    """LoRA: factor · up · down."""

    up: Any
    down: Any
    factor: float

    @property
    def shape(self) -> tuple[int, ...]:
        return self.up.shape[0], self.down.shape[1]

    def array(self, weight: Callable[[], np.ndarray]) -> Float[np.ndarray, "o i"]:
        return np.float32(self.factor) * _product(self.up, self.down)


@dataclass(frozen=True)
class Hadamard:
    """LoHa (LyCORIS, modules/loha.py): factor · (a₁ b₁) ⊙ (a₂ b₂)."""

    first: tuple[Any, Any]
    second: tuple[Any, Any]
    factor: float

    @property
    def shape(self) -> tuple[int, ...]:
        return self.first[0].shape[0], self.first[1].shape[1]

    def array(self, weight: Callable[[], np.ndarray]) -> Float[np.ndarray, "o i"]:
        return np.float32(self.factor) * _product(*self.first) * _product(*self.second)


@dataclass(frozen=True)
class Kronecker:
    """LoKr (LyCORIS, modules/lokr.py): factor · w₁ ⊗ w₂, each a matrix or a pair to multiply."""

    first: tuple[Any, ...]
    second: tuple[Any, ...]
    factor: float

    @property
    def shape(self) -> tuple[int, ...]:
        (a, b), (c, d) = ((w[0].shape[0], w[-1].shape[1]) for w in (self.first, self.second))
        return a * c, b * d

    def array(self, weight: Callable[[], np.ndarray]) -> Float[np.ndarray, "o i"]:
        return np.float32(self.factor) * np.kron(_product(*self.first), _product(*self.second))


@dataclass(frozen=True)
class Whole:
    """A difference that is stored as it is: factor · difference."""

    difference: Any
    factor: float

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.difference.shape)

    def array(self, weight: Callable[[], np.ndarray]) -> Float[np.ndarray, "..."]:
        return np.float32(self.factor) * _float32(self.difference)


@dataclass(frozen=True)
class Replacement:
    """A tensor that stands in the place of the model's: factor · (tensor − weight)."""

    tensor: Any
    factor: float

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    def array(self, weight: Callable[[], np.ndarray]) -> Float[np.ndarray, "..."]:
        return np.float32(self.factor) * (_float32(self.tensor) - weight())


@dataclass(frozen=True)
class Decomposed:
    """DoRA: m · (W + Δ) / ‖W + Δ‖ − W, norms per output for m of [outputs] or [outputs, 1] (PEFT,
    tuners/lora/dora.py), per input for [1, inputs] (LyCORIS with wd_on_out off)."""

    direction: Difference
    magnitude: Any

    @property
    def shape(self) -> tuple[int, ...]:
        return self.direction.shape

    @property
    def fits(self) -> bool:
        """Whether the magnitude has one number per output or per input."""
        outputs, inputs = self.shape
        return tuple(self.magnitude.shape) in ((outputs,), (outputs, 1), (1, inputs))

    def array(self, weight: Callable[[], np.ndarray]) -> Float[np.ndarray, "o i"]:
        old, magnitude = weight(), _float32(self.magnitude)
        new = old + self.direction.array(lambda: old)
        per_input = magnitude.shape == (1, new.shape[1]) and magnitude.shape[1] > 1
        norm = np.linalg.norm(new, axis=0 if per_input else 1, keepdims=True)
        norm[norm == 0] = 1  # what is 0 has no direction and stays 0, as in LyCORIS
        return magnitude.reshape(norm.shape) * new / norm - old


def _float32(x: Any) -> np.ndarray:
    return np.asarray(x).astype(np.float32)


def _product(*factors: Any) -> np.ndarray:
    first, *rest = map(_float32, factors)
    return first @ rest[0] if rest else first
