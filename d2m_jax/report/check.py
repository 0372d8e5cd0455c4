"""What the report of a run will need, asked before anything trains."""

from d2m_jax import hosts
from d2m_jax.config import ModelConfig, RunConfig
from d2m_jax.data.protocol import Data
from d2m_jax.encoders import Encoders
from d2m_jax.evaluate.benchmark import judge_of
from d2m_jax.evaluate.noisy import examples
from d2m_jax.report.measure import draws, mesh_of, prompt_counts, splits
from d2m_jax.sharding import batch_shards


def check_report(
    config: RunConfig, model: ModelConfig, data: Data, validation: Data, encoders: Encoders
) -> None:
    """Raise ConfigError for what a report could not do, before anything trains: examples or prompts
    that the data do not have, and what Encoders.check finds. `model` is the teacher."""
    size = examples(model, validation, batch_shards(mesh_of(config, [model.transformer])))
    judged = judge_of(data) is not None
    for split in splits(judged).values():
        validation.batches(encoders.tokenizer, size, config.seed, split)
    counts = prompt_counts(config, judged).items()
    asked = [data.prompts(count, pairs == "held_out") for pairs, count in counts]
    if draws(model):
        encoders.check([prompt.caption for prompts in asked for prompt in prompts])
        return
    lacks = model.encoders or "text encoders and autoencoder"
    hosts.say(f"the report will have no samples: {lacks} not found")
