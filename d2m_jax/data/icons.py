"""The embedded task: captioned scenes of coloured pictograms, each a pure function of its index.

Captions come in GenEval's six categories: `red anchor` (single, and colours), `red anchor and
blue earth` (two, and attribution), `two red anchor` (counting), `red anchor left of blue earth`
(position), on 32 × 32 pixels. Task `single` has the first form alone, on 16 × 16.
"""

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import grain
import numpy as np
from absl import flags
from jaxtyping import Float, Int, UInt8

from d2m_jax.config import IconsConfig, check
from d2m_jax.data.pictograms import CELL, COLOURS, Lexicon, lexicon
from d2m_jax.data.protocol import Canvas, Split, Tokenizer

CATEGORIES = ("single", "two", "counting", "colours", "position", "attribution")
RELATIONS = ("left of", "right of", "above", "below")
NUMBERS = ("two", "three")
WORDS = ("and", "of", *NUMBERS, "left", "right", "above", "below", *COLOURS)  # before the names
LONGEST = 6  # words of a caption
SIDES = {"single": CELL, "scenes": 2 * CELL}  # task → pixels of its canvas, either way


def vocabulary(config: IconsConfig) -> tuple[str, ...]:
    """Every word that captions use, the pictograms' names last."""
    return WORDS + lexicon(config.pictograms).names


@dataclass(frozen=True)
class Object:
    """A coloured pictogram; its place is in cells, in fractions where an oracle found it."""

    name: str
    colour: str
    row: float
    column: float


@dataclass(frozen=True)
class Scene:
    """A caption, the objects that it asks for in its order, and their relation if it has one."""

    category: str
    caption: str
    objects: tuple[Object, ...]
    relation: str = ""


def render(
    scenes: Sequence[Scene], lexicon: Lexicon, grid: int = 2
) -> UInt8[np.ndarray, "n h w 3"]:
    """The true images of scenes on a canvas of `grid` × `grid` cells."""
    canvas = np.full((len(scenes), grid * grid), -1)
    colours = list(COLOURS)
    for i, scene in enumerate(scenes):
        for o in scene.objects:
            tile = lexicon.index[o.name] * len(colours) + colours.index(o.colour)
            canvas[i, int(o.row) * grid + int(o.column)] = tile
    return _paint(canvas, lexicon)


def prompts(config: IconsConfig, image: Canvas, count: int, held_out: bool = False) -> list[Scene]:
    """`count` scenes to evaluate on, the categories in turn; held_out of pairs never trained."""
    known, grid = lexicon(config.pictograms), _grid(config, image)
    key = _key(config.seed, "prompts", held_out)
    drawn = _scenes(config, known, key, np.arange(count), held_out)
    captions, colours = _captions(drawn, known), list(COLOURS)
    scenes = []
    for i in range(count):
        objects = tuple(
            Object(
                known.names[pair // len(colours)],
                colours[pair % len(colours)],
                *map(float, divmod(place, grid)),
            )
            for pair, place in zip(drawn.objects[i], drawn.places[i], strict=True)
            if pair >= 0
        )
        category = CATEGORIES[drawn.category[i]]
        relation = RELATIONS[drawn.relation[i]] if category == "position" else ""
        scenes.append(Scene(category, captions[i], objects, relation))
    return scenes


class Icons:
    """The task on one canvas, as data/protocol.py, Data, wants it."""

    def __init__(self, config: IconsConfig, image: Canvas):
        self.config, self.image = config, image
        self.lexicon = lexicon(config.pictograms)
        _grid(config, image)  # tells where the canvas is not the task's

    encoded = False
    tells_padding = True

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """That of the canvas."""
        return ((self.image.height, self.image.width),)

    def fingerprint(self) -> str:
        """None: what it draws follows from its config."""
        return ""

    def vocabulary(self) -> tuple[str, ...]:
        """Every word of its captions."""
        return vocabulary(self.config)

    def batches(
        self,
        tokenizer: Tokenizer,
        size: int,
        seed: int = 0,
        split: Split = "train",
        rows: slice = slice(None),
    ) -> grain.DatasetIterator:
        """Endless batches of `size`, of which `rows` are drawn."""
        return batches(self.config, tokenizer, self.image, size, seed, split, rows)

    def prompts(self, count: int, held_out: bool = False) -> list[Scene]:
        """Scenes to evaluate on, the categories in turn."""
        return prompts(self.config, self.image, count, held_out)


def batches(
    config: IconsConfig,
    tokenizer: Tokenizer,
    image: Canvas,
    batch_size: int,
    seed: int = 0,
    split: Split = "train",
    rows: slice = slice(None),
    threads: int = 2,
) -> grain.DatasetIterator:
    """Endless batches {"image": uint8 [b, h, w, 3], "text": what the tokenizer makes of captions}.

    `train` and `validation` are different draws of the training pairs, `held_out` draws the others.
    Of every batch only `rows` are drawn: what a process of many needs. The iterator's get_state and
    set_state resume exactly.
    """
    source = Batches(config, tokenizer, image, batch_size, seed, split, rows)
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=8)
    dataset = grain.MapDataset.source(source).repeat().to_iter_dataset(options)
    if config.workers:
        flags.FLAGS.mark_as_parsed()  # grain's worker processes ask for absl's flags
        dataset = dataset.mp_prefetch(grain.MultiprocessingOptions(num_workers=config.workers))
    return iter(dataset)


class Batches:
    """A grain source whose element is a whole batch: a scene is cheaper to draw than to pass on."""

    def __init__(
        self,
        config: IconsConfig,
        tokenizer: Tokenizer,
        image: Canvas,
        batch_size: int,
        seed: int,
        split: Split,
        rows: slice = slice(None),
    ):
        check(
            batch_size <= config.train_size,
            f"IconsConfig.train_size = {config.train_size}: expected at least the batch size,"
            f" {batch_size}",
        )
        self.config, self.batch_size, self.held_out = config, batch_size, split == "held_out"
        self.rows = rows
        self.lexicon = lexicon(config.pictograms)
        self.grid = _grid(config, image)
        self.key = _key(config.seed, seed, split)
        self.tokenizer = tokenizer
        # Unknown words and captions that are too long are told here, not by a worker.
        names = self.lexicon.names
        tokenizer.ids([*WORDS, *names])
        if config.task == "scenes":
            tokenizer.ids([f"red {names[0]} left of blue {names[1]}"])

    def __len__(self) -> int:
        return self.config.train_size // self.batch_size

    def __getitem__(self, index: int) -> dict[str, Any]:
        mine = np.arange(index * self.batch_size, (index + 1) * self.batch_size)[self.rows]
        drawn = _scenes(self.config, self.lexicon, self.key, mine, self.held_out)
        canvas = np.full((len(mine), self.grid**2), -1)
        for k in reversed(range(drawn.objects.shape[1])):
            canvas[np.arange(len(mine)), drawn.places[:, k]] = drawn.objects[:, k]
        text = self.tokenizer.ids(_captions(drawn, self.lexicon))
        return {"image": _paint(canvas, self.lexicon), "text": text}


@dataclass(frozen=True)
class _Scenes:
    """Scenes as arrays; -1 stands where there is nothing."""

    category: Int[np.ndarray, " n"]  # in CATEGORIES
    objects: Int[np.ndarray, "n k"]  # tile of each object, in the caption's order
    places: Int[np.ndarray, "n k"]  # its cell, row-major
    relation: Int[np.ndarray, " n"]  # in RELATIONS, used by position alone
    words: Int[np.ndarray, "n l"]  # in WORDS followed by the lexicon's names


def _captions(drawn: _Scenes, known: Lexicon) -> list[str]:
    words = np.array([*WORDS, *known.names, ""])  # at -1 nothing
    return [" ".join(row).rstrip() for row in words[drawn.words].tolist()]


def _scenes(
    config: IconsConfig, known: Lexicon, key: int, index: Int[np.ndarray, " n"], held_out: bool
) -> _Scenes:
    """The scenes with these indices; scene i depends on the key and i alone."""
    colours = len(COLOURS)
    pairs = _pairs(known, held_out)

    def choose(
        name: str, among: int, index: Int[np.ndarray, " n"] = index
    ) -> Int[np.ndarray, " n"]:
        return (_uniform(key, name, index) * among).astype(np.int64)

    first = pairs[choose("first", len(pairs))]
    if config.task == "single":
        names = np.array([CATEGORIES.index("single"), CATEGORIES.index("colours")])
        words = np.full((len(index), LONGEST), -1)
        words[:, 0], words[:, 1] = _pair_words(first)
        nothing = np.zeros((len(index), 1), np.int64)
        return _Scenes(names[index % 2], first[:, None], nothing, nothing[:, 0], words)

    category = index % len(CATEGORIES)
    kind = {name: category == i for i, name in enumerate(CATEGORIES)}
    second = pairs[choose("second", len(pairs))]
    attempt = 0
    while True:
        same_name = first // colours == second // colours
        same_colour = first % colours == second % colours
        bad = np.flatnonzero(same_name | (kind["attribution"] & same_colour))
        if not len(bad):
            break
        attempt += 1
        second[bad] = pairs[choose(f"second {attempt}", len(pairs), index[bad])]

    three = kind["counting"] & (choose("number", 2) == 1)
    pair_of = kind["two"] | kind["position"] | kind["attribution"]
    objects = np.stack(
        [
            first,
            np.where(kind["counting"], first, np.where(pair_of, second, -1)),
            np.where(three, first, -1),
        ],
        axis=1,
    )
    order = np.stack([_uniform(key, f"cell {i}", index) for i in range(4)], axis=1)
    places = np.argsort(order, axis=1)[:, :3]
    relation, line = choose("relation", len(RELATIONS)), choose("line", 2)
    # in the order of RELATIONS: the first object's and the second's cell, for either line
    lines = np.array(
        [
            [[0, 1], [2, 3]],
            [[1, 0], [3, 2]],
            [[0, 2], [1, 3]],
            [[2, 0], [3, 1]],
        ]
    )
    places[:, :2] = np.where(kind["position"][:, None], lines[relation, line], places[:, :2])

    words = np.full((len(index), LONGEST), -1)
    (colour1, name1), (colour2, name2) = _pair_words(first), _pair_words(second)
    words[:, 0], words[:, 1] = colour1, name1
    joined = kind["two"] | kind["attribution"]
    words[joined, 2] = WORDS.index("and")
    words[joined, 3], words[joined, 4] = colour2[joined], name2[joined]
    counted = kind["counting"]
    words[counted, 0] = WORDS.index("two") + three[counted]
    words[counted, 1], words[counted, 2] = colour1[counted], name1[counted]
    related = kind["position"]
    words[related, 2] = WORDS.index("left") + relation[related]
    for of, at in ((relation < 2, 4), (relation >= 2, 3)):  # left of, right of; above, below
        rows = related & of
        words[rows, 3] = WORDS.index("of")
        words[rows, at], words[rows, at + 1] = colour2[rows], name2[rows]
    return _Scenes(category, objects, places, relation, words)


def _pair_words(tile: Int[np.ndarray, " n"]) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " n"]]:
    """The words of a tile's colour and name, as indices into WORDS and the names after it."""
    colours = len(COLOURS)
    return len(WORDS) - colours + tile % colours, len(WORDS) + tile // colours


@functools.lru_cache
def _pairs(known: Lexicon, held_out: bool) -> Int[np.ndarray, " p"]:
    """Tiles of the pairs of pictogram and colour that never train, one in twenty, or the others."""
    pairs = [f"{colour} {name}" for name in known.names for colour in COLOURS]
    chosen = np.flatnonzero([(_key(pair) % 20 == 0) == held_out for pair in pairs])
    names, colours = {t // len(COLOURS) for t in chosen}, {t % len(COLOURS) for t in chosen}
    check(
        len(names) >= 3 and len(colours) >= 3,  # enough that a second object is always found
        f"IconsConfig.pictograms = {len(known.names)}: too few to combine"
        f" {'held-out' if held_out else 'training'} pairs of pictogram and colour, expected 32 or"
        " more",
    )
    return chosen


def _grid(config: IconsConfig, image: Canvas) -> int:
    """Cells per side of the canvas."""
    side = SIDES[config.task]
    check(
        image.height == image.width == side,
        f"PixelsConfig: {image.height} × {image.width} pixels, expected {side} × {side} for"
        f" IconsConfig.task = {config.task!r}, whose pictograms stand in cells of {CELL}",
    )
    return side // CELL


def _paint(canvas: Int[np.ndarray, "n g"], known: Lexicon) -> UInt8[np.ndarray, "n h w 3"]:
    """Images from the tile of each cell."""
    grid = round(canvas.shape[1] ** 0.5)
    cells = known.tiles[canvas].reshape(-1, grid, grid, CELL, CELL, 3)
    return cells.transpose(0, 1, 3, 2, 4, 5).reshape(-1, grid * CELL, grid * CELL, 3)


# ------------------------------------------------------------------------------------------- draws


def _key(*parts: object) -> int:
    """64 bits that depend on the parts alone, the same in every process."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little")


def _uniform(key: int, name: str, index: Int[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """Numbers in [0, 1), each a function of (key, name, index)."""
    # SplitMix64, as a Generator per scene would cost more than the scene
    golden = np.uint64(0x9E3779B97F4A7C15)
    z = (index.astype(np.uint64) + np.uint64(1)) * golden + np.uint64(_key(key, name))
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((z ^ (z >> np.uint64(31))) >> np.uint64(11)).astype(np.float64) / 2**53
