"""What a user asks of a pipeline, checked before any work: numbers, lists of prompts, files."""

import math
from collections.abc import Iterable
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import numpy as np

from d2m_jax.config import MOST_SEED, ConfigError, WordsConfig, check, suggestion
from d2m_jax.texts import half_letter, lines_of, text_of

# The least and the most that any model takes, both included.
WHOLE = {
    "height": (1, 16_384),  # pixels
    "width": (1, 16_384),
    "steps": (1, 1000),  # as many as diffusers' schedulers have times
    "seed": (0, MOST_SEED),
    "reuse": (1, None),
    "max_sequence_length": (1, 512),  # tokens of T5: FLUX.1 saw no more, and diffusers takes none
    "batch_size": (1, None),
    "tile": (4, None),  # latents
}
REAL = {"guidance": (0, None), "true_cfg": (0, None)}
# What diffusers' pipelines call it, and what is ours.
DIFFUSERS = {
    "prompt": "prompts",
    "num_inference_steps": "steps",
    "guidance_scale": "guidance",
    "true_cfg_scale": "true_cfg",
    "negative_prompt": "negative_prompts",
    "generator": "seed",
    "num_images_per_prompt": "prompts, a list that repeats it",
    "output_type": "images.pil of what comes back",
}
EXAMPLES = ("red anchor left of blue earth", "red anchor")
NEEDED = ("seed", "reuse", "true_cfg")  # the others are the model's own where they are None


def check_options(**options: Any) -> None:
    """Raise ConfigError for options of Pipeline that no model takes: another type, NaN, a number
    out of bounds. None passes where it is a default."""
    for name, value in options.items():
        if value is None and name not in NEEDED:
            continue
        if name == "top_k":
            for k in several(value):
                if k is not None:
                    _check_number(name, k, (0, None), Integral)
        elif name in WHOLE:
            _check_number(name, value, WHOLE[name], Integral)
        else:
            _check_number(name, value, REAL[name], Real)
    top_k, steps = several(options.get("top_k")), options.get("steps")
    check(len(top_k) > 0, "top_k: found no number, expected at least one")
    check(
        steps is None or len(top_k) <= int(steps),
        f"top_k: found {len(top_k)} numbers, expected one per step at most, and steps = {steps}",
    )


def refuse_unknown(names: Iterable[str], known: Iterable[str]) -> None:
    """Raise ConfigError for names of options that Pipeline does not have."""
    for name in names:
        ours = DIFFUSERS.get(name)
        hint = suggestion(name, known) if ours is None else f", here it is {ours}"
        raise ConfigError(f"{name}: unknown option{hint}")


def several(value: Any) -> tuple:
    """One number, or those of a sequence, as a tuple."""
    if isinstance(value, np.ndarray):
        value = value.tolist()
    one = isinstance(value, str | bytes) or not isinstance(value, Iterable)
    return (value,) if one else tuple(value)


def _check_number(name: str, value: Any, bounds: tuple, kind: type) -> None:
    low, high = bounds
    what = "a whole number" if kind is Integral else "a number"
    expected = (
        f"expected {what} {f'of at least {low}' if high is None else f'from {low} to {high}'}"
    )
    # To Python a truth value is a whole number.
    right = isinstance(value, kind) and not isinstance(value, bool)
    check(right, f"{name} = {value!r}: found {type(value).__name__}, {expected}")
    # NaN is neither finite nor within bounds.
    within = math.isfinite(value) and low <= value and (high is None or value <= high)
    check(bool(within), f"{name} = {value}: {expected}")


def captions_of(prompts: Any, name: str = "prompts") -> list[str]:
    """One prompt, or those of any iterable, as a list. ConfigError names what is no text."""
    if isinstance(prompts, np.ndarray):
        prompts = prompts.tolist()
    if isinstance(prompts, str):
        prompts = [prompts]
    found = type(prompts).__name__
    check(
        isinstance(prompts, Iterable) and not isinstance(prompts, bytes | dict),
        f"{name}: found {found}, expected a string or a list of strings",
    )
    captions = list(prompts)
    check(len(captions) > 0, f"{name}: found none, expected at least one")
    for i, caption in enumerate(captions):
        found = type(caption).__name__
        check(isinstance(caption, str), f"{name}[{i}]: found {found}, expected a string")
        damaged = half_letter(str(caption))
        check(not damaged, f"{name}[{i}] = {caption!r}: expected text, found a byte that is none")
    return [str(caption) for caption in captions]


def read_prompts(file: Path) -> list[str]:
    """The prompts of a text file, one a line; what is blank is no prompt. ConfigError as `text_of`
    has it."""
    # Files that were joined have marks within.
    lines = [
        line.replace("\ufeff", "").strip()
        for line in lines_of(text_of(file, "expected one prompt a line"))
    ]
    return [line for line in lines if line]


def example(text: WordsConfig) -> str:
    """For the embedded task, a whole caption that this model reads."""
    for caption in EXAMPLES:
        words = caption.split()
        if len(words) <= text.length and set(words) <= set(text.vocabulary):
            return f"; a whole caption is {caption!r}"
    return ""
