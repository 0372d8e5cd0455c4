"""A model watched while it draws: choices that are known, sums over groups, files."""

import json
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest

from d2m_jax import weights
from d2m_jax.config import (
    ConfigError,
    IconsConfig,
    ModelConfig,
    MoEConfig,
    PixelsConfig,
    StackConfig,
    WordsConfig,
)
from d2m_jax.data import icons
from d2m_jax.evaluate import watch as watching
from d2m_jax.evaluate import watch_run
from d2m_jax.evaluate.arguments import Routing
from d2m_jax.models.flux import initialise
from d2m_jax.sampling.pipeline import Pipeline
from tests.evaluate.test_routing import with_gates
from tests.models import toy

MODEL = ModelConfig(
    transformer=replace(
        toy.DENSE,
        in_channels=48,
        context_in_dim=16,
        vec_in_dim=16,
        double=(StackConfig(1, ffn="moe"), StackConfig(1)),
        single=(StackConfig(1, 2, 1, ffn="moe"), StackConfig(1, 3, 1), StackConfig(1, ffn="moe")),
        moe=MoEConfig(experts=4, top_k=2),
    ),
    text=WordsConfig(dim=16, length=3, vocabulary=("red", "blue", "anchor", "earth")),
    image=PixelsConfig(16, 24, 4),
    sample_steps=4,
)
PROMPTS = [("red anchor", "a"), ("blue earth", "b"), ("blue anchor", "a")]


@pytest.fixture(scope="module")
def params():
    return toy.random_like(initialise(MODEL.transformer, 0))


def test_names():
    names = watching.names_of(MODEL, ["a", "b"])
    assert names.layers == [
        *("double 0 image", "double 0 text", "single 0", "single 1", "single 5"),
    ]
    assert names.maps == ["double 0 image", "single 0", "single 1", "single 5"]
    assert names.mixtures == ["single 0 to 1", "single 2 to 4"] and names.sizes == [2, 3]
    assert names.blocks == ["double 0", "double 1", *(f"single {i}" for i in range(6))]
    assert watching.names_of(MODEL, ["a"], top_k=0).layers == []


def test_the_way_is_the_sampler_s(params, monkeypatch):
    """What is watched ends where a pipeline's denoising ends."""
    pipe, ends = Pipeline(MODEL, params), []
    step = watching._step

    def kept(*arguments):
        x, seen = step(*arguments)
        ends.append(np.asarray(x))
        return x, seen

    monkeypatch.setattr(watching, "_step", kept)
    watching.watch(pipe, PROMPTS, seed=3, batch_size=4)
    expected = pipe([p for p, _ in PROMPTS], seed=3)
    assert len(ends) == 4
    images = pipe.encoders.images(jnp.asarray(ends[-1]), 16, 24)[:3]
    np.testing.assert_allclose(images, expected, atol=1e-4)


def test_sums_add_up(params):
    """Whatever is counted by group and time is counted once; batches and processes change none."""
    pipe = Pipeline(MODEL, params)
    sums, names = watching.watch(pipe, PROMPTS, bins=2, places=3, batch_size=2)
    assert names.groups == ["a", "b"]
    assert sums["samples"].tolist() == [[4, 2], [4, 2]]  # two steps in a bin
    assert sums["maps"].shape == (4, 2, 2, 3, 3, 4)
    # The first double block's image FFN sees 4 × 6 tokens, each with two choices.
    assert sums["maps"][0].sum((-3, -2, -1)).tolist() == [[192, 96], [192, 96]]
    cells = sums["maps"][0].sum((0, 1, 4)) / 12 / 2  # of a sample: rows of 2, 1 and 1, columns of 2
    assert np.allclose(cells, [[4, 4, 4], [2, 2, 2], [2, 2, 2]])
    share = sums["maps"][0].sum((2, 3)) / 48
    assert np.allclose(share, sums["load"][0], atol=1e-4)
    assert np.allclose(sums["used"].sum(-1), sums["samples"])  # one block of each mixture
    ran = [names.blocks.index(f"single {i}") for i in range(2)]
    assert np.allclose(np.moveaxis(sums["block_ran"][ran], 0, -1), sums["used"][0, ..., :2])
    assert np.allclose(sums["load_dealt"].sum(1), sums["load"].sum((1, 2)), atol=1e-4)
    assert (sums["change"][sums["block_ran"] > 0] > 0).all()
    other, _ = watching.watch(pipe, PROMPTS, bins=2, places=3, batch_size=1)
    for name, values in sums.items():
        assert np.allclose(values, other[name], atol=1e-3), name


def test_processes_share_the_prompts(params, monkeypatch):
    pipe = Pipeline(MODEL, params)
    whole, _ = watching.watch(pipe, PROMPTS, bins=2)
    monkeypatch.setattr(watching.jax, "process_count", lambda: 2)
    parts = []
    for process in range(2):
        monkeypatch.setattr(watching.jax, "process_index", lambda process=process: process)
        parts.append(watching.watch(pipe, PROMPTS, bins=2)[0])
    assert parts[0]["samples"].sum() == 8 and parts[1]["samples"].sum() == 4
    for name, values in whole.items():
        assert np.allclose(values, parts[0][name] + parts[1][name], atol=1e-3), name


def test_known_choices(params):
    def change(names, leaf):
        if names[-2:] == ["gate", "bias"]:
            leaf[..., [1, 3]] = 1e4  # experts 1 and 3, always
        if "router" in names and names[-2:] == ["features", "bias"]:
            leaf[..., 1] = 1e4  # the second block, always
        return leaf

    pipe = Pipeline(MODEL, with_gates(params, change))
    sums, names = watching.watch(pipe, PROMPTS)
    ran = sums["ran"][..., None]
    assert np.allclose(sums["load"], ran * [0, 0.5, 0, 0.5])
    assert not sums["ran"][names.layers.index("single 0")].any()
    assert np.allclose(sums["used"][:, :, :, 1], sums["samples"])
    found = watch_run.summary(sums, names)
    experts, blocks = found["experts"], found["blocks"]
    for key in ("time", "prompts", "place"):
        assert experts[key] == pytest.approx(0, abs=1e-6)
    assert experts["entropy"][0] == pytest.approx(0.5)  # two of four, evenly
    assert blocks["time"] == pytest.approx(0, abs=1e-9)
    assert found["change"]["single 0"]["image"] is None and found["change"]["double 0"]["text"] > 0


def test_information_is_a_share_of_what_there_is_to_tell():
    assert watching.information(np.eye(4)) == pytest.approx(np.log(4))
    assert watching.information(np.outer([1.0, 5.0], [3.0, 1.0])) == pytest.approx(0, abs=1e-12)
    # Two kinds of k of which each tells which half of n it is.
    halves = np.array([[1.0, 1, 0, 0], [0, 0, 1, 1]])
    assert watching.information(halves) == pytest.approx(np.log(2))


@pytest.fixture
def without_cores(monkeypatch):
    monkeypatch.setattr(watch_run, "use_cores", lambda: None)  # JAX has its devices already


def test_files_of_a_model_and_a_file_of_prompts(params, tmp_path, without_cores):
    weights.save(tmp_path / "model", MODEL, params)
    rows = [json.dumps({"prompt": p, "tag": g}) for p, g in [*PROMPTS, *PROMPTS]]
    (tmp_path / "prompts.jsonl").write_text("\n".join(rows))
    asked = Routing(
        model=str(tmp_path / "model"),
        output=tmp_path / "out",
        prompts=tmp_path / "prompts.jsonl",
        group="tag",
        count=4,
        bins=2,
    )
    found = watch_run.run(asked)
    assert found["prompts"] == {"a": 2, "b": 2}
    drawn = ("blocks", "contributions", "experts", "groups", "loads", "places")
    files = sorted(file.name for file in asked.output.iterdir())
    assert files == sorted([*(f"{name}.png" for name in drawn), "routing.npz", "summary.json"])
    with np.load(asked.output / "routing.npz") as arrays:
        assert arrays["names_groups"].tolist() == ["a", "b"]
        assert arrays["samples"].tolist() == [[4, 4], [4, 4]]
    assert json.loads((asked.output / "summary.json").read_text()) == found
    told = "\n".join(watch_run.lines(found))
    assert "place in the image" in told and "group of prompts" in told
    with pytest.raises(ConfigError, match="found 'prompt', 'tag', expected 'kind'"):
        watch_run.run(replace(asked, group="kind"))
    with pytest.raises(ConfigError, match="--prompts: missing"):
        watch_run.run(replace(asked, prompts=None, model=str(tmp_path)))


def test_the_embedded_task_needs_no_file(tmp_path, without_cores):
    """A dense model: of what it has, how much its blocks change."""
    task, image = IconsConfig(task="single", pictograms=8), PixelsConfig(16, 16, 8)
    words = WordsConfig(dim=16, vocabulary=icons.vocabulary(task), length=2)
    transformer = replace(toy.DENSE, in_channels=192, context_in_dim=16, vec_in_dim=16)
    config = ModelConfig(transformer=transformer, text=words, image=image, sample_steps=2)
    weights.save(tmp_path / "model", config, toy.random_like(initialise(transformer, 0)))
    found = watch_run.run(Routing(model=str(tmp_path / "model"), output=tmp_path / "out", count=3))
    assert "experts" not in found and "blocks" not in found
    assert list(found["change"]) == ["double 0", "single 0", "single 1"]
    files = sorted(file.name for file in (tmp_path / "out").iterdir())
    assert files == ["contributions.png", "routing.npz", "summary.json"]
