"""Training: the loop of a stage, its optimizer, checkpoints and metrics."""

from d2m_jax import environment  # noqa: F401 (before what it looks for)

# isort: split
from d2m_jax.training.checkpoint import open_run
from d2m_jax.training.loop import Batches, train_stage
from d2m_jax.training.optimizer import make_optimizer, merge, split

__all__ = ["Batches", "make_optimizer", "merge", "open_run", "split", "train_stage"]
