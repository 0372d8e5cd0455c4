"""The benchmark of the embedded task: an oracle reads the pixels and judges as GenEval does."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Array, Bool, Float, Int
from scipy import ndimage

from d2m_jax.config import ConfigError, IconsConfig, ModelConfig, WordsConfig, check
from d2m_jax.data.icons import LONGEST, SIDES, WORDS, Object, Scene, render, vocabulary
from d2m_jax.data.pictograms import CELL, COLOURS, SIZE, Lexicon
from d2m_jax.evaluate.scores import Score, strata

SPECK = 4  # pixels; a smaller component is no object
# intersection over union from which an object is a pictogram; no two exceed 0.75
KNOWN = 0.6
UNKNOWN = ""  # the name of an object that is like none
NEIGHBOURS = np.stack([np.zeros((3, 3)), np.ones((3, 3)), np.zeros((3, 3))])  # never across images


def read(image: Float[Array | np.ndarray, "h w 3"], lexicon: Lexicon) -> list[Object]:
    """The objects in one image with values in [0, 1], in reading order."""
    return read_all(image[None], lexicon)[0]


def read_all(images: Float[Array | np.ndarray, "n h w 3"], lexicon: Lexicon) -> list[list[Object]]:
    """The objects in each image: nearest palette colour, components, best template by overlap.

    Components (8-connected) whose centres share a cell are one object, so a pictogram may be in
    pieces; its colour is the majority's. An object that no pictogram overlaps by KNOWN has the name
    UNKNOWN, and still counts.
    """
    count, height, width, _ = images.shape
    lit = np.asarray(images) > 0.5  # the palette is the corners of the colour cube
    labelled: Any = ndimage.label(lit.any(axis=3), NEIGHBOURS)  # scipy says no types
    label, found = labelled
    sizes = np.bincount(label.ravel(), minlength=found + 1)
    kept = np.flatnonzero(sizes[1:] >= SPECK) + 1
    if not len(kept):
        return [[] for _ in range(count)]

    centres = np.array(ndimage.center_of_mass(label > 0, label, kept))
    places = np.column_stack([centres[:, 0], centres[:, 1:] // CELL]).astype(int)
    places, owner = np.unique(places, axis=0, return_inverse=True)
    objects_of = np.full(found + 1, -1)
    objects_of[kept] = owner.ravel()
    image, row, column = np.nonzero(lit.any(axis=3))
    owner = objects_of[label[image, row, column]]
    image, row, column, owner = (values[owner >= 0] for values in (image, row, column, owner))

    objects = len(places)
    pixels = np.bincount(owner, minlength=objects)
    low, high = (np.full((objects, 2), fill) for fill in (max(height, width), -1))
    np.minimum.at(low, owner, np.column_stack([row, column]))
    np.maximum.at(high, owner, np.column_stack([row, column]))

    # crops around the middle of each object, larger than a pictogram by what the shifts need
    side = SIZE + 4
    start = (low + high + 1) // 2 - side // 2
    y, x = (np.column_stack([row, column]) - start[owner]).T
    inside = (y >= 0) & (y < side) & (x >= 0) & (x < side)
    crops = np.zeros((objects, side, side), np.float32)
    crops[owner[inside], y[inside], x[inside]] = 1
    names = _match(crops, pixels, lexicon)

    corners = lit[image, row, column] @ np.array([4, 2, 1])
    votes = np.zeros((objects, 8), int)
    np.add.at(votes, (owner, corners), 1)
    colours = {
        int(np.array(rgb) // 255 @ np.array([4, 2, 1])): name for name, rgb in COLOURS.items()
    }
    middle = (low + high + 1) / 2 / CELL - 0.5

    read: list[list[Object]] = [[] for _ in range(count)]
    for i in range(objects):
        colour = colours[int(votes[i].argmax())]
        read[places[i, 0]].append(
            Object(names[i], colour, float(middle[i, 0]), float(middle[i, 1]))
        )
    return read


def _match(
    crops: Float[np.ndarray, "m a a"], pixels: Int[np.ndarray, " m"], lexicon: Lexicon
) -> list[str]:
    """The pictogram that overlaps each crop best at any shift by up to 2 pixels, or UNKNOWN."""
    templates = lexicon.masks.reshape(len(lexicon.names), -1).astype(np.float32)
    areas = pixels[:, None] + templates.sum(axis=1)
    best = np.zeros(areas.shape, np.float32)
    for y in range(5):
        for x in range(5):
            window = crops[:, y : y + SIZE, x : x + SIZE].reshape(len(crops), -1)
            np.maximum(best, window @ templates.T, out=best)
    overlap = best / (areas - best)
    chosen = overlap.argmax(axis=1)
    return [lexicon.names[g] if overlap[i, g] >= KNOWN else UNKNOWN for i, g in enumerate(chosen)]


def correct(found: Sequence[Object], prompt: Scene) -> bool:
    """Whether the objects found are what the prompt asks for.

    Every category wants exactly the objects asked for, none beside them, and their names right.
    On top, colours and attribution want each in its own colour, and position wants the first to lie
    at least half a cell on its side of the second. As in GenEval, single, two, counting and
    position do not judge colours.
    """
    coloured = prompt.category in ("colours", "attribution")

    def looks(objects: Sequence[Object]) -> list[tuple[str, str]]:
        return sorted((o.name, o.colour if coloured else "") for o in objects)

    if looks(found) != looks(prompt.objects):
        return False
    if prompt.category != "position":
        return True
    place = {o.name: o for o in found}
    first, second = (place[o.name] for o in prompt.objects)
    right, down = first.column - second.column, first.row - second.row
    away = {"left of": -right, "right of": right, "above": -down, "below": down}
    return away[prompt.relation] >= 0.5


def score(
    images: Float[Array | np.ndarray, "n h w 3"], prompts: Sequence[Scene], lexicon: Lexicon
) -> Score:
    """Judge one image in [0, 1] per prompt."""
    check(
        len(images) == len(prompts) > 0,
        f"score: found {len(images)} images for {len(prompts)} prompts, expected one for each",
    )
    alone = [name for name, rows in strata(prompts).items() if len(rows) < 2]
    check(not alone, f"score: found one prompt of {', '.join(alone)}, expected two or more of each")
    truth = render(prompts, lexicon, images.shape[1] // CELL)
    other = np.empty(len(prompts), int)  # the next prompt of the same category
    for rows in strata(prompts).values():
        other[rows] = np.roll(rows, -1)
    return Score(
        tuple(prompts),
        _judge(images, prompts, lexicon),
        _judge(truth / 255, [prompts[i] for i in other], lexicon),
    )


def _judge(
    images: Float[Array | np.ndarray, "n h w 3"], prompts: Sequence[Scene], lexicon: Lexicon
) -> Bool[np.ndarray, " n"]:
    found = read_all(images, lexicon)
    return np.array([correct(f, prompt) for f, prompt in zip(found, prompts, strict=True)])


def task_of(config: ModelConfig) -> IconsConfig:
    """The task that a model was made for, which its vocabulary, canvas and caption length tell."""
    if not isinstance(config.text, WordsConfig):
        raise ConfigError(
            "its prompts go through T5 and CLIP, expected a model of the embedded task's words"
        )
    words, image = config.text.vocabulary, config.image
    pictograms = len(words) - len(WORDS)
    for task in ("scenes", "single"):
        fits = image.height == image.width == SIDES[task]
        long_enough = task == "single" or config.text.length >= LONGEST
        if pictograms > 0 and fits and long_enough:
            candidate = IconsConfig(task=task, pictograms=pictograms)
            if vocabulary(candidate) == words:
                return candidate
    raise ConfigError(
        f"its vocabulary of {len(words)} words is not that of a task of data/icons.py on"
        f" {image.height} × {image.width} pixels"
    )
