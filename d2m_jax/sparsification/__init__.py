"""How a student is cut from a dense teacher, before any training."""

from d2m_jax.sparsification.groups import align, regroup, shapes
from d2m_jax.sparsification.student import make_student

__all__ = ["align", "make_student", "regroup", "shapes"]
