import jax
import numpy as np
import pytest

from d2m_jax.config import ConfigError, WordsConfig
from d2m_jax.models.words import Words

VOCABULARY = ("and", "red", "blue", "anchor", "earth")


@pytest.fixture
def words():
    return Words(WordsConfig(dim=128, length=6, vocabulary=VOCABULARY))


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
    captions = [f"{a} anchor and {b} earth" for a in ("red", "blue") for b in ("red", "blue")]
    txt, y = jax.jit(words)(words.ids(captions))
    assert txt.shape == (4, 6, 128) and y.shape == (4, 128)
    assert np.all(txt[:, 5] == 0)
    np.testing.assert_allclose(np.mean(txt[:, 1:4] ** 2), 1, atol=0.1)
    np.testing.assert_allclose(np.mean(y**2), 1, atol=0.3)


def test_a_token_carries_its_neighbours_rotated(words):
    txt, _ = words(words.ids(["red", "red anchor", "blue anchor", "anchor red"]))
    red, blue = words.vectors[2], words.vectors[3]
    np.testing.assert_allclose(txt[0, 0], red / 1.5**0.5, rtol=1e-6)
    # only the neighbour differs, so what is left is its vector, as long as before and turned
    turned = (txt[1, 1] - txt[2, 1]) * 1.5**0.5 / 0.5
    np.testing.assert_allclose(np.linalg.norm(turned), np.linalg.norm(red - blue), rtol=1e-5)
    assert abs(np.corrcoef(turned, red - blue)[0, 1]) < 0.3
    # before and after turn differently
    after = (txt[3, 0] - words.vectors[4] / 1.5**0.5) * 1.5**0.5 / 0.5
    before = (txt[1, 1] - words.vectors[4] / 1.5**0.5) * 1.5**0.5 / 0.5
    np.testing.assert_allclose(np.linalg.norm(after), np.linalg.norm(red), rtol=1e-5)
    assert abs(np.corrcoef(after, before)[0, 1]) < 0.3


def test_vectors_are_those_that_shipped_models_know(words):
    """A change here makes every trained model of the embedded task useless."""
    txt, _ = words(words.ids(["red anchor and blue earth"]))
    signs = (np.asarray(txt[0, 1, :16]) * 1.5**0.5 / 0.5).round().astype(int)
    assert signs.tolist() == [2, 2, -2, 0, 2, 2, 4, -4, 2, -4, 4, 0, 4, 2, 2, 4]


def test_a_vector_depends_on_its_word_and_the_seed_alone(words):
    other = Words(WordsConfig(dim=128, vocabulary=VOCABULARY[::-1]))
    np.testing.assert_array_equal(words.vectors[2], other.vectors[4])  # red
    seeded = Words(WordsConfig(dim=128, seed=1, vocabulary=VOCABULARY))
    assert not np.array_equal(words.vectors[2], seeded.vectors[2])


def test_captions_of_different_lengths_do_not_disturb_each_other(words):
    alone = words(words.ids(["red anchor"]))
    beside = words(words.ids(["red anchor", "blue earth and red anchor"]))
    np.testing.assert_allclose(alone[0][0], beside[0][0], atol=1e-5)
    np.testing.assert_allclose(alone[1][0], beside[1][0], atol=1e-5)
