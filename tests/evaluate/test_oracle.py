from dataclasses import replace

import numpy as np
import pytest
from scipy import ndimage

from d2m_jax.config import ConfigError, IconsConfig, PixelsConfig
from d2m_jax.data.icons import CATEGORIES, Object, Scene, prompts, render
from d2m_jax.data.pictograms import lexicon
from d2m_jax.evaluate.oracle import UNKNOWN, correct, read, score
from d2m_jax.evaluate.scores import paired_difference

CONFIG, CANVAS = IconsConfig(), PixelsConfig(32, 32)
LEXICON = lexicon(CONFIG.pictograms)
PROMPTS = prompts(CONFIG, CANVAS, 600)
TRUTH = render(PROMPTS, LEXICON).astype(np.float32) / 255


def objects(*texts):
    """Objects from `colour name row column`."""
    split = (text.split() for text in texts)
    return tuple(Object(g, c, float(row), float(column)) for c, g, row, column in split)


# ------------------------------------------------------------------------------------ the oracle


def test_the_oracle_is_right_on_true_images_and_near_zero_by_chance():
    result = score(TRUTH, PROMPTS, LEXICON)
    assert set(result.categories) == set(CATEGORIES)
    assert min(result.categories.values()) >= 0.99
    assert result.chance.mean <= 0.02


@pytest.mark.parametrize("held_out", [False, True])
def test_the_oracle_is_right_on_the_quick_task(held_out):
    config, canvas = IconsConfig(task="single"), PixelsConfig(16, 16)
    asked = prompts(config, canvas, 200, held_out)
    result = score(render(asked, LEXICON, grid=1) / 255, asked, LEXICON)
    assert set(result.categories) == {"single", "colours"} and result.overall.mean >= 0.99


def test_the_oracle_bears_noise_and_blur():
    noise = np.random.default_rng(0).normal(size=TRUTH.shape) * 0.1
    blurred = ndimage.gaussian_filter(TRUTH, (0, 0.5, 0.5, 0)) + noise
    for images in (TRUTH + 1.5 * noise, blurred):
        result = score(np.clip(images, 0, 1), PROMPTS, LEXICON)
        assert min(result.categories.values()) >= 0.99


def test_read_finds_name_colour_and_place():
    scene = Scene("", "", objects("red anchor 0 1", "cyan umbrella 1 0"))
    found = read(render([scene], LEXICON)[0] / 255, LEXICON)
    assert [(o.name, o.colour) for o in found] == [("anchor", "red"), ("umbrella", "cyan")]
    np.testing.assert_allclose([(o.row, o.column) for o in found], [(0, 1), (1, 0)], atol=0.1)


def test_read_bears_specks_breaks_and_a_shift():
    image = render([Scene("", "", objects("red umbrella 0 0"))], LEXICON)[0] / 255
    image[8] = 0  # breaks the pictogram in two
    image[26, 26:29] = 1  # three white pixels
    image = np.roll(image, (2, 1), axis=(0, 1))
    assert [(o.name, o.colour) for o in read(image, LEXICON)] == [("umbrella", "red")]


def test_read_gives_no_name_to_what_is_no_pictogram():
    image = np.zeros((32, 32, 3))
    assert read(image, LEXICON) == []
    image[18:30, 18:30, 0] = np.random.default_rng(0).random((12, 12)) < 0.5
    image[1:31, 3:6] = 1
    assert {o.name for o in read(image, LEXICON)} == {UNKNOWN}
    assert read(np.full((32, 32, 3), np.nan), LEXICON) == []


# ------------------------------------------------------------------------------------ judging

ANCHOR, EARTH = "red anchor 0 0", "blue earth 0 1"


@pytest.mark.parametrize(
    "category, asked, found, right",
    [
        ("single", [ANCHOR], ["blue anchor 1 1"], True),
        ("single", [ANCHOR], [ANCHOR, EARTH], False),
        ("single", [ANCHOR], [], False),
        ("colours", [ANCHOR], ["red anchor 1 0"], True),
        ("colours", [ANCHOR], ["blue anchor 0 0"], False),
        ("two", [ANCHOR, EARTH], ["red earth 1 1", "red anchor 0 1"], True),
        ("two", [ANCHOR, EARTH], [ANCHOR, "red anchor 0 1"], False),
        ("counting", [ANCHOR, "red anchor 1 1"], [ANCHOR, "red anchor 0 1"], True),
        ("counting", [ANCHOR, "red anchor 1 1"], [ANCHOR], False),
        ("counting", [ANCHOR, "red anchor 1 1"], [ANCHOR, "red anchor 0 1", EARTH], False),
        ("attribution", [ANCHOR, EARTH], ["blue earth 1 0", "red anchor 1 1"], True),
        ("attribution", [ANCHOR, EARTH], ["red earth 0 1", "blue anchor 0 0"], False),
        ("position", [ANCHOR, EARTH], ["red anchor 1 0.1", "blue earth 1 0.9"], True),
        ("position", [ANCHOR, EARTH], ["red anchor 1 0.3", "blue earth 1 0.7"], False),
        ("position", [ANCHOR, EARTH], ["red anchor 0 1", "blue earth 0 0"], False),
        ("position", [ANCHOR, EARTH], ["red anchor 0 0", "blue earth 1 0"], False),
    ],
)
def test_a_prompt_is_judged_by_its_category(category, asked, found, right):
    relation = "left of" if category == "position" else ""
    assert correct(objects(*found), Scene(category, "", objects(*asked), relation)) is right


@pytest.mark.parametrize(
    "relation, row, column",
    [("left of", 0, 1), ("right of", 0, -1), ("above", 1, 0), ("below", -1, 0)],
)
def test_each_relation_looks_its_own_way(relation, row, column):
    found = objects("red anchor 0 0", f"blue earth {row} {column}")
    asked = Scene("position", "", found, relation)
    assert correct(found, asked)
    others = {"left of", "right of", "above", "below"} - {relation}
    assert not any(correct(found, replace(asked, relation=other)) for other in others)


# ------------------------------------------------------------------------------------ statistics


def test_overall_is_the_mean_of_categories_with_its_interval():
    images = TRUTH.copy()
    images[::12] = 0  # every other single prompt
    result = score(images, PROMPTS, LEXICON)
    assert result.categories["single"] == pytest.approx(0.5)
    assert result.overall.mean == pytest.approx(5.5 / 6)
    assert result.overall.standard_error == pytest.approx((0.25 / 99) ** 0.5 / 6)
    assert result.overall.high - result.overall.mean == pytest.approx((0.25 / 99) ** 0.5 / 6 * 1.96)


def test_a_paired_difference_has_less_spread_than_two_scores():
    worse, worst = TRUTH.copy(), TRUTH.copy()
    worse[::4], worst[::4], worst[3::24] = 0, 0, 0
    a, b = score(worse, PROMPTS, LEXICON), score(worst, PROMPTS, LEXICON)
    difference = paired_difference(a, b)
    assert difference.mean == pytest.approx(a.overall.mean - b.overall.mean) and difference.mean > 0
    assert 0 < difference.standard_error < a.overall.standard_error
    assert paired_difference(b, a).mean == -difference.mean


def test_scores_of_other_prompts_cannot_be_compared():
    a, b = score(TRUTH[:60], PROMPTS[:60], LEXICON), score(TRUTH[60:120], PROMPTS[60:120], LEXICON)
    with pytest.raises(ConfigError, match="same prompts"):
        paired_difference(a, b)
    with pytest.raises(ConfigError, match="59 images for 60 prompts"):
        score(TRUTH[:59], PROMPTS[:60], LEXICON)
    with pytest.raises(ConfigError, match="one prompt of single"):
        score(TRUTH[:1], PROMPTS[:1], LEXICON)
