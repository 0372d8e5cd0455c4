import jax
import numpy as np
import pytest

from d2m_jax.config import ConfigError, WordsConfig
from d2m_jax.models.words import Words

VOCABULARY = ("and", "red", "blue", "anchor", "earth")


@pytest.fixture
def words():
    return Words(WordsConfig(dim=512, length=6, vocabulary=VOCABULARY))


def test_ids_are_places_in_the_vocabulary(words):
    ids = words.ids(["red anchor", "Blue earth and red anchor", ""])
    assert ids.dtype == np.int32
    assert ids.tolist() == [[2, 4, 0, 0, 0, 0], [3, 5, 1, 2, 4, 0], [0] * 6]


def test_every_unknown_word_is_named_with_its_near_name(words):
    with pytest.raises(ConfigError) as error:
        words.ids(["red ancor", "blu earth"])
    message = str(error.value)
    assert "'ancor', did you mean anchor?" in message and "'blu', did you mean blue?" in message
    assert "\n" not in message


def test_a_long_caption_is_refused(words):
    with pytest.raises(ConfigError, match="7 words, expected at most 6"):
        words.ids(["red anchor and blue earth and red"])


def test_vectors_have_unit_variance_and_padding_is_zero(words):
    txt, y = jax.jit(words)(words.ids(["blue earth and red anchor"]))
    assert txt.shape == (1, 6, 512) and y.shape == (1, 512)
    assert np.all(txt[0, 5] == 0)
    np.testing.assert_allclose(np.std(txt[0, 1:4], axis=-1), 1, atol=0.15)
    np.testing.assert_allclose(np.std(y), 1, atol=0.25)


def test_a_token_carries_its_neighbours_by_rotations(words):
    txt, _ = words(words.ids(["red anchor", "blue anchor", "anchor red"]))
    red_anchor, blue_anchor, anchor_red = txt[0, 1], txt[1, 1], txt[2, 0]
    red, blue = words.vectors[2], words.vectors[3]
    np.testing.assert_allclose(
        red_anchor - blue_anchor, 0.5 * (red - blue) @ words.before / 1.5**0.5, atol=1e-4
    )
    assert np.abs(red_anchor - anchor_red).max() > 0.5  # before and after are told apart
    np.testing.assert_allclose(words.before @ words.before.T, np.eye(512), atol=1e-4)


def test_a_vector_depends_on_its_word_and_the_seed_alone(words):
    other = Words(WordsConfig(dim=512, vocabulary=VOCABULARY[::-1]))
    np.testing.assert_array_equal(words.vectors[2], other.vectors[4])  # red
    seeded = Words(WordsConfig(dim=512, seed=1, vocabulary=VOCABULARY))
    assert not np.array_equal(words.vectors[2], seeded.vectors[2])


def test_captions_of_different_lengths_do_not_disturb_each_other(words):
    alone = words(words.ids(["red anchor"]))
    beside = words(words.ids(["red anchor", "blue earth and red anchor"]))
    np.testing.assert_allclose(alone[0][0], beside[0][0], atol=1e-5)
    np.testing.assert_allclose(alone[1][0], beside[1][0], atol=1e-5)
