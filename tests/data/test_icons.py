import itertools
from dataclasses import replace

import numpy as np
import pytest

from d2m_jax.config import ConfigError, IconsConfig, PixelsConfig, WordsConfig
from d2m_jax.data.icons import CATEGORIES, Batches, batches, prompts, render, vocabulary
from d2m_jax.data.pictograms import COLOURS, lexicon
from d2m_jax.models.words import Words

SCENES, CANVAS = IconsConfig(pictograms=512), PixelsConfig(32, 32)
SINGLE, SMALL = IconsConfig(task="single", pictograms=512), PixelsConfig(16, 16)
KNOWN = lexicon(512)
TEXT = Words(WordsConfig(vocabulary=vocabulary(SCENES)))
SHORT = Words(WordsConfig(length=4, vocabulary=vocabulary(SCENES)))


def caption(row):
    return " ".join(TEXT.config.vocabulary[i - 1] for i in row if i)


def pair(words):
    """Pairs of colour and name of a caption, as written."""
    names = [w for w in words.split() if w not in ("and", "of")]
    return {(c, g) for c, g in itertools.pairwise(names) if c in COLOURS and g not in COLOURS}


# ------------------------------------------------------------------------------------ batches


def test_a_scene_depends_on_its_index_alone():
    large = Batches(SCENES, TEXT, CANVAS, 64, 0, "train")
    small = Batches(SCENES, TEXT, CANVAS, 16, 0, "train")
    for key in ("image", "text"):
        rows = np.concatenate([small[step][key] for step in range(4)])
        np.testing.assert_array_equal(large[0][key], rows)
        assert not np.array_equal(large[0][key], large[1][key])
    assert large[0]["image"].dtype == np.uint8 and large[0]["text"].dtype == np.int32


def test_splits_and_seeds_are_other_draws():
    def words(config=SCENES, seed=0, split="train"):
        return Batches(config, TEXT, CANVAS, 64, seed, split)[0]["text"].tolist()

    draws = [words(), words(seed=1), words(split="validation"), words(replace(SCENES, seed=1))]
    assert all(a != b for i, a in enumerate(draws) for b in draws[:i])


def test_captions_have_the_six_forms_in_equal_shares():
    words = [caption(row) for row in Batches(SCENES, TEXT, CANVAS, 600, 0, "train")[3]["text"]]
    assert len({words[i].split()[0] for i in range(0, 600, 6)} & set(COLOURS)) == len(COLOURS)
    forms = [sum(f" {word} " in text for text in words) for word in ("and", "left", "below")]
    assert forms[0] == 200 and 10 < forms[1] < 45 and 10 < forms[2] < 45
    assert sum(text.startswith(("two ", "three ")) for text in words) == 100
    assert sum(len(text.split()) == 2 for text in words) == 200


def test_held_out_pairs_never_train():
    def pairs(split):
        source = Batches(SCENES, TEXT, CANVAS, 6000, 0, split)
        return set().union(*(pair(caption(row)) for row in source[0]["text"]))

    train, held_out = pairs("train"), pairs("held_out")
    assert len(train) > 2500 and 100 < len(held_out) < 250
    assert not train & held_out
    assert not train & set().union(
        *(pair(p.caption) for p in prompts(SCENES, CANVAS, 60, held_out=True))
    )


def test_the_iterator_resumes_exactly():
    first = batches(SCENES, TEXT, CANVAS, 8)
    for _ in range(3):
        next(first)
    state = first.get_state()
    second = batches(SCENES, TEXT, CANVAS, 8)
    second.set_state(state)
    for _ in range(2):
        a, b = next(first), next(second)
        np.testing.assert_array_equal(a["image"], b["image"])
        np.testing.assert_array_equal(a["text"], b["text"])


def test_the_data_repeats_after_train_size():
    small = replace(SCENES, train_size=16)
    iterator = batches(small, TEXT, CANVAS, 8)
    a, _, b = (next(iterator)["text"] for _ in range(3))
    np.testing.assert_array_equal(a, b)


def test_single_is_one_centred_pictogram():
    words = Words(WordsConfig(length=2, vocabulary=TEXT.config.vocabulary))
    rows = Batches(SINGLE, words, SMALL, 32, 0, "train")[0]
    assert rows["image"].shape == (32, 16, 16, 3) and rows["text"].shape == (32, 2)
    for image, row in zip(rows["image"], rows["text"], strict=True):
        colour, name = caption(row).split()
        mask = np.pad(KNOWN.masks[KNOWN.index[name]], 1)
        np.testing.assert_array_equal(image, mask[..., None] * np.array(COLOURS[colour]))


@pytest.mark.parametrize(
    "config, text, image, message",
    [
        (SCENES, TEXT, PixelsConfig(32, 48), "32 × 48 pixels, expected 32 × 32 for .*'scenes'"),
        (SINGLE, TEXT, CANVAS, "32 × 32 pixels, expected 16 × 16 for .*'single'"),
        (SCENES, SHORT, CANVAS, "6 words, expected at most 4"),
        (SCENES, Words(WordsConfig(vocabulary=("red",))), CANVAS, "unknown word 'and'"),
        (replace(SCENES, train_size=4), TEXT, CANVAS, "train_size = 4"),
    ],
)
def test_what_cannot_work_is_refused(config, text, image, message):
    with pytest.raises(ConfigError, match=message):
        Batches(config, text, image, 8, 0, "train")


# ------------------------------------------------------------------------------------ prompts


def test_prompts_agree_with_their_captions_and_places():
    scenes = prompts(SCENES, CANVAS, 300)
    assert [s.category for s in scenes[:6]] == list(CATEGORIES)
    assert scenes[:30] == prompts(SCENES, CANVAS, 30)
    for scene in scenes:
        texts = [f"{o.colour} {o.name}" for o in scene.objects]
        first, *others = scene.objects
        assert len({(o.row, o.column) for o in scene.objects}) == len(scene.objects)
        if scene.category in ("single", "colours"):
            assert scene.caption == texts[0] and not others
        elif scene.category == "counting":
            assert len(set(texts)) == 1
            assert scene.caption == f"{ {2: 'two', 3: 'three'}[len(texts)] } {texts[0]}"
        else:
            (second,) = others
            assert first.name != second.name
            assert scene.caption == f" {scene.relation or 'and'} ".join(texts)
        if scene.category == "attribution":
            assert first.colour != second.colour
        if scene.category == "position":
            step = {"left of": (0, 1), "right of": (0, -1), "above": (1, 0), "below": (-1, 0)}
            moved = second.row - first.row, second.column - first.column
            assert moved == step[scene.relation]


def test_render_draws_each_object_in_its_cell():
    scenes = prompts(SCENES, CANVAS, 12)
    for scene, image in zip(scenes, render(scenes, KNOWN), strict=True):
        expected = np.zeros((32, 32, 3), np.uint8)
        for o in scene.objects:
            mask = np.pad(KNOWN.masks[KNOWN.index[o.name]], 1)[..., None]
            rows, columns = (slice(at, at + 16) for at in (int(o.row) * 16, int(o.column) * 16))
            expected[rows, columns] = mask * np.array(COLOURS[o.colour])
        np.testing.assert_array_equal(image, expected)
