import hashlib

import numpy as np
import pytest

from d2m_jax.config import ConfigError
from d2m_jax.data.icons import WORDS
from d2m_jax.data.pictograms import CELL, COLOURS, SIZE, lexicon
from d2m_jax.evaluate.oracle import read_all

KNOWN = lexicon(2048)


def test_pictograms_are_unlike_each_other():
    assert KNOWN.masks.shape == (2048, SIZE, SIZE) and len(set(KNOWN.names)) == 2048
    padded = np.pad(KNOWN.masks, ((0, 0), (1, 1), (1, 1))).astype(np.float32)
    flat = KNOWN.masks.reshape(2048, -1).astype(np.float32)
    area = flat.sum(axis=1)
    for y in range(3):
        for x in range(3):
            both = padded[:, y : y + SIZE, x : x + SIZE].reshape(2048, -1) @ flat.T
            overlap = both / (area[:, None] + area - both)
            np.fill_diagonal(overlap, 0)
            assert overlap.max() <= 0.75


def test_pictograms_fill_their_cells():
    area = KNOWN.masks.mean(axis=(1, 2))
    assert area.min() > 0.1 and area.max() < 0.85
    for axis in (1, 2):
        lit = KNOWN.masks.any(axis=axis)
        first, last = lit.argmax(axis=1), SIZE - 1 - lit[:, ::-1].argmax(axis=1)
        assert (np.abs(first - (SIZE - 1 - last)) <= 1).all(), "off the centre"
        assert (last - first).min() >= 5


def test_the_oracle_reads_every_pictogram():
    tiles = KNOWN.tiles[6:-1:7] / 255
    found = [[o.name for o in objects] for objects in read_all(tiles, KNOWN)]
    assert found == [[name] for name in KNOWN.names]


def test_tiles_are_masks_in_colour():
    assert KNOWN.tiles.shape == (2048 * len(COLOURS) + 1, CELL, CELL, 3)
    yellow = KNOWN.tiles[5 * len(COLOURS) + list(COLOURS).index("yellow")]
    np.testing.assert_array_equal(yellow[1:-1, 1:-1, 0] == 255, KNOWN.masks[5])
    np.testing.assert_array_equal(yellow[..., 0], yellow[..., 1])
    assert not yellow[..., 2].any() and not KNOWN.tiles[-1].any()


def test_a_small_lexicon_begins_a_large_one():
    small = lexicon(256)
    assert small.names == KNOWN.names[:256]
    np.testing.assert_array_equal(small.masks, KNOWN.masks[:256])


def test_names_are_single_words_apart_from_the_other_words():
    assert all(name == name.lower() and name.isascii() and " " not in name for name in KNOWN.names)
    assert not set(KNOWN.names) & set(WORDS)
    assert {"bicycle", "umbrella", "kettle", "wind-turbine"} <= set(KNOWN.names)


def test_the_lexicon_is_the_one_that_shipped_models_know():
    """Another choice or drawing must not rename pictograms under a trained model."""
    digest = hashlib.sha256(" ".join(KNOWN.names).encode() + KNOWN.masks.tobytes()).hexdigest()
    assert digest[:16] == "64495d014c7a675e"


def test_too_many_are_refused_with_the_number_there_is():
    with pytest.raises(
        ConfigError, match=r"IconsConfig.pictograms = 5000: expected at most \d{4}, "
    ):
        lexicon(5000)
