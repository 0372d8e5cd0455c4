"""examples/emoji: what is drawn of packages as npm gives them, and that it is data to train on."""

import io
import itertools
import json
import tarfile
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from d2m_jax import encoders
from d2m_jax.config import (
    CacheConfig,
    ConfigError,
    PixelsConfig,
    RunConfig,
    SparsifyConfig,
    StageConfig,
    WordsConfig,
)
from d2m_jax.data import cache
from d2m_jax.data.images import Images
from d2m_jax.data.source import open_data
from d2m_jax.models.words import Words
from d2m_jax.training import run
from d2m_jax.weights import convert, load_config
from tests.sampling.flux_oracle import tiny_pipeline

pytest.importorskip("resvg_py")
from examples.emoji import render, student, teacher

BALL = '<circle cx="16" cy="16" r="16" fill="#ff0000"/>'
NAMES = [f"thing-{i}" for i in range(60)]


def package(path, prefix, license, icons, width=32):
    """A package of Iconify's, as `npm pack` leaves it."""
    content = {
        "icons": {"prefix": prefix, "width": width, "height": width, "icons": icons},
        "info": {"prefix": prefix, "license": {"spdx": license}},
    }
    with tarfile.open(path, "w:gz") as tar:
        for name, value in content.items():
            data = json.dumps(value).encode()
            member = tarfile.TarInfo(f"package/{name}.json")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


@pytest.fixture(scope="module")
def packages(tmp_path_factory):
    place = tmp_path_factory.mktemp("npm")
    icons = {name: {"body": BALL} for name in NAMES}
    return [
        package(place / "fluent.tgz", "fluent-emoji-flat", "MIT", icons),
        package(place / "noto.tgz", "noto", "Apache-2.0", icons | {"seal": {"body": BALL}}),
    ]


@pytest.fixture(scope="module")
def drawn(packages, tmp_path_factory):
    folder = tmp_path_factory.mktemp("emoji")
    draw(packages, folder)
    return folder


def draw(packages, folder):
    sizes = ["--sizes", "16", "32", "--variants", "3"]
    render.main([*map(str, packages), "--output", str(folder), *sizes])


def captions(folder):
    found = []
    for file in sorted(folder.glob("*.tar")):
        with tarfile.open(file) as tar:
            found += [tar.extractfile(m).read().decode() for m in tar if m.name.endswith(".txt")]
    return found


def test_neither_skin_tones_nor_what_is_hidden(tmp_path):
    names = ["skier", "skier-dark", "skier-medium-dark", "ear-dark-skin-tone-bald", "kiss-tone3"]
    icons = {name: {"body": BALL} for name in [*names, "police-car-light", "tall"]}
    icons |= {"old": {"body": BALL, "hidden": True}}
    icons["tall"]["height"] = 40
    found = render.read(package(tmp_path / "a.tgz", "noto", "Apache-2.0", icons))
    assert [d.caption for d in found] == ["noto police car light", "noto skier", "noto tall"]
    assert [d.height for d in found] == [32, 32, 40] and found[0].license == "Apache-2.0"


def test_other_files_are_told(tmp_path):
    other = package(tmp_path / "a.tgz", "twemoji", "CC-BY-4.0", {})
    with pytest.raises(ConfigError, match="found the set twemoji, expected one of"):
        render.read(other)
    (tmp_path / "b.tgz").write_bytes(b"nothing")
    with pytest.raises(ConfigError, match=r"b\.tgz: no package of an Iconify set"):
        render.read(tmp_path / "b.tgz")


def test_pairs_are_held_out_whose_parts_are_seen(drawn):
    seen, held = captions(drawn / "32"), captions(drawn / "held_out" / "32")
    assert len(seen) + len(held) == 3 * (2 * len(NAMES) + 1) and "noto seal" in seen
    assert set(held) and set(held).isdisjoint(seen)
    other = {"fluent": "noto", "noto": "fluent"}
    for pair in set(held):
        style, name = pair.split(" ", 1)
        assert f"{other[style]} {name}" in seen
    assert len(set(held)) < len(NAMES) / 4


@pytest.mark.parametrize("side", [16, 32])
def test_drawings_are_whole_and_on_a_background(side):
    ball = render.Drawing("noto", "ball", BALL, 32, 32, "", "")
    places = set()
    for variant in range(8):
        image = Image.open(io.BytesIO(render.render(ball, side, variant))).convert("RGB")
        pixels = np.asarray(image).astype(int)
        assert pixels.shape == (side, side, 3)
        background = "#" + bytes(pixels[0, 0].tolist()).hex()
        assert background in render.BACKGROUNDS
        red = (np.abs(pixels - [255, 0, 0]).max(-1) < 40).sum() / side**2
        smallest = 1.0 if variant == 0 else render.SMALLEST
        assert np.pi / 4 * smallest**2 * 0.8 < red < np.pi / 4 * 1.1  # edges are mixed
        places.add((background, tuple(np.argwhere(pixels[..., 1] < 128).mean(0).round(1))))
    assert len(places) > 4
    first = np.asarray(Image.open(io.BytesIO(render.render(ball, side, 0))).convert("RGB"))
    assert (first[0, 0] == 255).all() and (first[side // 2, 0] != 255).any()


def test_the_same_bytes_again_and_data_to_train_on(packages, drawn, tmp_path):
    draw(packages, tmp_path)
    files = {f.relative_to(tmp_path): f.read_bytes() for f in tmp_path.rglob("*.tar")}
    assert {str(name) for name in files} == {
        f"{part}{side}/00000.tar" for part in ("", "held_out/") for side in (16, 32)
    }
    assert all((drawn / name).read_bytes() == content for name, content in files.items())

    config = replace(
        teacher.emoji(),
        sources={str(drawn / "16"): 1.0, str(drawn / "32"): 0.5},
        resolutions=(16, 32),
        validation=20,
    )
    data = Images(config, PixelsConfig(16, 16, 8))
    assert set(data.sizes) == {(16, 16), (32, 32)}
    assert set(data.vocabulary()) == {"fluent", "noto", "thing", "seal", *map(str, range(60))}
    words = Words(WordsConfig(dim=8, length=3, vocabulary=data.vocabulary()))
    batches = list(itertools.islice(data.batches(words, 8), 12))
    assert {batch["image"].shape for batch in batches} == {(8, 16, 16, 3), (8, 32, 32, 3)}
    assert all((batch["text"][:, 0] > 0).all() for batch in batches)
    assert {p.caption for p in data.prompts(2)} == {"fluent penguin", "noto penguin"}


def test_configs_fit_what_render_writes():
    dense, cut = teacher.get_config(), student.get_config()
    assert cut.teacher == f"runs/{dense.name}/model" and cut.data.sources == dense.data.sources
    assert dense.model.transformer.in_channels == 3 * dense.model.image.patch**2


@pytest.mark.slow
def test_through_autoencoder_t5_and_clip_into_a_cache(drawn, tmp_path, monkeypatch):
    """The whole way of a FLUX.1 model: tars, buckets, a cache, a student that trains on it without
    its encoders."""
    pytest.importorskip("diffusers")
    tiny_pipeline().save_pretrained(tmp_path / "torch")
    convert.convert(tmp_path / "torch", tmp_path / "model")
    config = RunConfig(
        name="emoji",
        teacher=str(tmp_path / "model"),
        data=replace(
            teacher.emoji(),
            sources={str(drawn / "16"): 1.0, str(drawn / "32"): 0.5},
            resolutions=(16, 32),
        ),
        sparsify=SparsifyConfig(batches=1, batch_size=4, tokens=64),
        stages={"moe": StageConfig(steps=2, batch_size=4, log_every=1, evaluate_every=2)},
        held_out_batches=1,
    )
    counts = cache.cache(config, tmp_path / "cache")
    assert sum(counts.values()) == len(captions(drawn / "16")) + len(captions(drawn / "32"))
    cached = CacheConfig(path=str(tmp_path / "cache"), validation=8)
    assert set(open_data(cached, load_config(tmp_path / "model")).sizes) == {(16, 16), (32, 32)}

    def no_encoder(*arguments):
        raise AssertionError("an encoder was loaded")

    monkeypatch.setattr(encoders, "load_encoder", no_encoder)
    run.run(replace(config, data=cached), tmp_path / "run")
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    losses = [line["loss"] for line in map(json.loads, lines)]
    assert len(losses) == 3 and np.isfinite(losses).all()
