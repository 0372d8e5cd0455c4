"""Prompts to pixels: images per second, and the share of each part.

    python benchmarks/sampling.py --output sampling.json
    python benchmarks/sampling.py --model models/flux_dev --prompt "a red fox in the snow"

`text` and `image` are the encoders and the way back to pixels, timed alone; `denoising` is the rest
of a whole call. --top_k adds rows for a sparse model with other numbers of experts, each a comma
separated schedule over the steps.
"""

import jax
import jax.numpy as jnp
from timing import finish, limits, measure, parser, table

from d2m_jax.sampling.pipeline import load_pipeline


def compare(options):
    """One row per batch and number of experts."""
    pipe = load_pipeline(options.model)
    config, encoders = pipe.config, pipe.encoders
    rows, columns = config.grid()
    size = config.image.height, config.image.width
    schedules = {"": None} | {
        schedule: [int(k) for k in schedule.split(",")] for schedule in options.top_k
    }
    for batch in options.batches:
        prompts = [options.prompt] * batch
        ids = encoders.tokenizer.ids(prompts)
        latents = jnp.zeros((batch, rows * columns, config.transformer.in_channels))
        calls = {
            (batch, "text"): lambda ids=ids: encoders.text(ids),
            (batch, "image"): lambda x=latents: encoders.images(x, *size),
        }
        for name, top_k in schedules.items():
            calls[batch, "top_k", name] = lambda p=prompts, k=top_k: pipe(
                p, steps=options.steps, top_k=k, batch_size=len(p)
            )
        times = measure(calls, options.rounds)
        for name in schedules:
            whole = times[batch, "top_k", name]
            text, image = times[batch, "text"].median, times[batch, "image"].median
            yield {
                "batch": batch,
                "top-k": name,
                "ms": 1e3 * whole.median,
                "low": 1e3 * whole.low,
                "high": 1e3 * whole.high,
                "images/s": batch / whole.median,
                "text, %": 100 * text / whole.median,
                "denoising, %": 100 * (1 - (text + image) / whole.median),
                "image, %": 100 * image / whole.median,
                "ms per step": 1e3 * (whole.median - text - image) / options.steps,
            }


def main() -> None:
    options = parser(__doc__, rounds=7)
    options.add_argument("--model", default="teachers/pictograms", help="as load_pipeline takes it")
    options.add_argument("--prompt", default="red anchor left of blue earth")
    options.add_argument("--steps", type=int, default=28)
    options.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4])
    options.add_argument("--top_k", nargs="*", default=[], metavar="K,K,…")
    options = options.parse_args()
    columns = {"batch": "5d", "top-k": "<8", "ms": "9.1f", "low": "9.1f", "high": "9.1f"}
    columns |= {"images/s": "8.2f", "text, %": "7.1f", "denoising, %": "12.1f"}
    columns |= {"image, %": "8.1f", "ms per step": "11.2f"}
    found = table(columns, compare(options))
    finish(options, found, limits=limits(), devices=jax.device_count())


if __name__ == "__main__":
    main()
