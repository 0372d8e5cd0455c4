"""The benchmark of whole models, with a painter of true images in the place of a model."""

import io

import numpy as np
import pytest
from rich.console import Console

from d2m_jax.config import ConfigError, IconsConfig, ModelConfig, PixelsConfig, WordsConfig
from d2m_jax.data import icons
from d2m_jax.data.source import open_data
from d2m_jax.evaluate import benchmark, oracle
from d2m_jax.evaluate import scores as tables
from d2m_jax.sampling.pipeline import Pipeline

TASK = IconsConfig(pictograms=48)
IMAGE = PixelsConfig(32, 32, 4)
DATA = open_data(TASK, ModelConfig(image=IMAGE))
CONFIG = ModelConfig(text=WordsConfig(vocabulary=icons.vocabulary(TASK)), image=IMAGE)


class Painter(Pipeline):
    """Paints the true image of a prompt it knows, and nothing for every third."""

    def __init__(self, fails: int = 3):
        self.config, self.fails, self.calls = CONFIG, fails, []

    def __call__(self, captions, **options):
        self.calls.append(options)
        for held_out in (False, True):
            scenes = icons.prompts(TASK, IMAGE, len(captions), held_out=held_out)
            if [scene.caption for scene in scenes] == captions:
                images = icons.render(scenes, DATA.lexicon) / np.float32(255)
                # one in `fails` of every category, which take turns
                images[np.arange(len(images)) // len(icons.CATEGORIES) % self.fails == 0] = 0
                return images
        raise AssertionError("expected the prompts of the task")


def test_scores_of_seen_and_held_out_combinations():
    painter = Painter()
    scores = benchmark.scores_of(painter, DATA, 36, seed=5, steps=7, top_k=1)
    assert painter.calls == [{"steps": 7, "seed": 5, "top_k": 1}] * 2
    assert list(scores) == ["seen", "held_out"]
    for score in scores.values():
        assert score.overall.mean == pytest.approx(2 / 3)
        assert score.chance.mean < 0.1
    assert scores["seen"].prompts != scores["held_out"].prompts


def test_json_and_table_hold_scores_with_their_chance():
    scores = benchmark.scores_of(Painter(), DATA, 36)
    value = tables.to_json(scores)["seen"]
    assert (value["prompts"], value["overall"]) == (36, 66.7)
    assert list(value["categories"]) == list(icons.CATEGORIES)
    assert value["categories"]["position"]["score"] == 66.7
    assert value["categories"]["position"]["chance"] < 10
    better = benchmark.scores_of(Painter(fails=2**30), DATA, 36)
    said = io.StringIO()
    Console(file=said, width=120).print(tables.table("a [model]", better, scores))
    assert "a [model], 36 prompts" in said.getvalue()
    (row,) = [line for line in said.getvalue().splitlines() if "points above" in line]
    assert "16.7" in row


@pytest.mark.parametrize("task, length", [("single", 2), ("scenes", 6)])
def test_the_task_is_told_by_the_model(task, length):
    data = IconsConfig(task=task, pictograms=40)
    words = WordsConfig(vocabulary=icons.vocabulary(data), length=length)
    image = PixelsConfig(icons.SIDES[task], icons.SIDES[task], 4)
    assert oracle.task_of(ModelConfig(text=words, image=image)) == data


def test_a_model_of_another_task_is_refused():
    words = WordsConfig(vocabulary=("a", "photo", *CONFIG.text.vocabulary))
    with pytest.raises(ConfigError, match="vocabulary of 65 words"):
        oracle.task_of(ModelConfig(text=words, image=IMAGE))
