"""Examples of the embedded task, as benchmarks read them."""

from itertools import islice

from d2m_jax.config import ModelConfig
from d2m_jax.data import icons
from d2m_jax.data.protocol import Split
from d2m_jax.encoders import Encoders
from d2m_jax.evaluate.oracle import task_of

SIZE = 64  # of a batch


def batches(model: ModelConfig, count: int, seed: int = 0, split: Split = "train") -> list[dict]:
    """So many batches that this model reads, encoded."""
    encoders = Encoders(model)
    drawn = icons.batches(task_of(model), encoders.tokenizer, model.image, SIZE, seed, split)
    return [encoders.encode(batch) for batch in islice(drawn, count)]
