"""Options that make denoising cheaper, and what each costs in quality on the icons benchmark.

    python benchmarks/cheaper.py runs/demo/rivals/moe/models/moe --output cheaper.json

Every option paints the same prompts from the same noises as the model does without it. `score` is
the overall one over combinations seen and held out, in percent; `difference` to the plain model is
paired prompt by prompt, each prompt's mean over the seeds, with 95 % confidence. `change` is the
root mean square difference of the pixels. `time` is that of the denoising of a batch over the
plain model's; the options take turns.
"""

from dataclasses import replace
from functools import partial

import numpy as np
from timing import finish, measure, parser, table

from d2m_jax.data import icons
from d2m_jax.data.pictograms import lexicon
from d2m_jax.evaluate.oracle import score, task_of
from d2m_jax.evaluate.scores import paired_difference
from d2m_jax.sampling.pipeline import Pipeline, load_pipeline

PLAIN = "plain"
OPTIONS = {
    PLAIN: {},
    "top-k 1": {"top_k": (1,)},
    "top-k 2, then 1": {"top_k": (2, 1)},
    "top-k 1, then 2": {"top_k": (1, 2)},
    "top-k 2, 0 in the last quarter": {"top_k": (2, 2, 2, 0)},
    "reuse 2": {"reuse": 2},
    "reuse 4": {"reuse": 4},
    "int8": {"quantize": "int8"},
    "fp8": {"quantize": "fp8"},
    "int8, reuse 2": {"quantize": "int8", "reuse": 2},
}


def compare(options):
    """One row per option."""
    pipes: dict[str | None, Pipeline] = {
        kind: load_pipeline(options.model, quantize=kind) for kind in (None, "int8", "fp8")
    }
    config = pipes[None].config
    task = task_of(config)
    known = lexicon(task.pictograms)
    scenes = [
        scene
        for held_out in (False, True)
        for scene in icons.prompts(task, config.image, options.prompts, held_out=held_out)
    ]
    captions = [scene.caption for scene in scenes]

    def paint(captions, quantize=None, **asked):
        return pipes[quantize](captions, batch_size=options.batch, **asked)

    first = captions[: options.batch]
    calls = {(name,): partial(paint, first, seed=0, **asked) for name, asked in OPTIONS.items()}
    times = measure(calls, options.rounds)
    plain = None
    for name, asked in OPTIONS.items():
        images = [paint(captions, seed=seed, **asked) for seed in range(options.seeds)]
        scores = [score(mine, scenes, known) for mine in images]
        # Of every prompt the share of noises from which it comes out right.
        mean = replace(scores[0], correct=np.mean([mine.correct for mine in scores], axis=0))
        plain = plain or (mean, images)
        difference = paired_difference(mean, plain[0])
        moved = np.square(np.subtract(images, plain[1])).mean() ** 0.5
        yield {
            "option": name,
            "score": 100 * mean.overall.mean,
            "difference": 100 * difference.mean,
            "±": 196 * difference.standard_error,
            "change": moved,
            "ms per image": 1e3 * times[name,].median / len(first),
            "time": times[name,].median / times[PLAIN,].median,
            "cores": times[name,].cores / times[PLAIN,].cores,
        }


def main() -> None:
    options = parser(__doc__, rounds=5)
    options.add_argument("model", help="a model directory of the embedded task with MoE layers")
    options.add_argument("--prompts", type=int, default=600, help="seen, and as many held out")
    options.add_argument("--seeds", type=int, default=3, help="of the noise")
    options.add_argument("--batch", type=int, default=50)
    options = options.parse_args()
    columns = {"option": "<30", "score": "6.1f", "difference": "10.1f", "±": "5.1f"}
    columns |= {"change": "7.3f", "ms per image": "12.1f", "time": "6.2f", "cores": "6.2f"}
    finish(options, table(columns, compare(options)))


if __name__ == "__main__":
    main()
