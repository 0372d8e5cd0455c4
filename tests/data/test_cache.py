"""A cache gives what the encoders give, ends with the same bytes however often it was killed, and
is refused where it does not fit."""

import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from d2m_jax.config import (
    CacheConfig,
    ConfigError,
    ImagesConfig,
    ModelConfig,
    PixelsConfig,
    RunConfig,
    StageConfig,
    WordsConfig,
)
from d2m_jax.data import cache, making, records
from d2m_jax.data.cached import packed
from d2m_jax.data.records import BFLOAT16, Record
from d2m_jax.data.source import open_data
from d2m_jax.encoders import Encoders
from d2m_jax.models.words import Words
from d2m_jax.weights import convert, load_config
from tests.models import toy

ROOT = Path(__file__).parents[2]
NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "many")
MODEL = ModelConfig(
    transformer=replace(toy.DENSE, in_channels=48, context_in_dim=16, vec_in_dim=16),
    text=WordsConfig(dim=16, length=3, vocabulary=("red", *NUMBERS)),
    image=PixelsConfig(32, 32, 4),
)


TOKENIZER = Words(MODEL.text)


@pytest.fixture
def folder(tmp_path):
    place = tmp_path / "pictures"
    place.mkdir()
    rng = np.random.default_rng(0)
    for i in range(22):
        shape = ((40, 60, 3), (50, 50, 3))[i % 2]
        Image.fromarray(rng.integers(0, 256, shape).astype(np.uint8)).save(place / f"{i:02}.png")
        (place / f"{i:02}.txt").write_text(f"red {NUMBERS[i // 2]}\n{NUMBERS[i // 2]}\n")
    return place


def run_of(folder, model=MODEL, resolution=32, **fields) -> RunConfig:
    data = ImagesConfig(
        sources={str(folder): 1.0}, resolutions=(resolution,), aspect_ratio=1.5, validation=2,
        **fields,
    )  # fmt: skip
    return RunConfig(name="cached", model=model, data=data, stages={"flow": StageConfig()})


def first_batches(data, count, **options):
    return list(itertools.islice(data.batches(TOKENIZER, 4, **options), count))


def content(folder):
    return {f.name: f.read_bytes() for f in folder.iterdir() if f.suffix == records.SUFFIX}


def test_records_as_bytes():
    arrays = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(3, BFLOAT16)}
    record = Record({"key": "x", "crop": [1.5, 2]}, arrays)
    again = Record.from_bytes(record.to_bytes())
    assert again.facts == record.facts and again.arrays["b"].dtype == BFLOAT16
    np.testing.assert_array_equal(again.arrays["a"], arrays["a"])
    for damaged in (b"", b"\0\0", record.to_bytes()[:-3], b"\xff" * 40):
        with pytest.raises(ValueError):
            Record.from_bytes(damaged)


def test_batches_are_what_the_encoders_give(folder, tmp_path):
    counts = cache.cache(run_of(folder), tmp_path / "cache", all_captions=True)
    assert sum(counts.values()) == 44
    data = open_data(CacheConfig(path=str(tmp_path / "cache"), validation=6), MODEL)
    assert data.encoded and set(data.sizes) == {(32, 32), (28, 36)} and len(data) == 44
    images = open_data(run_of(folder).data, MODEL)
    by_key = {images.key(i): i for i in range(22)}
    seen = []
    for batch in first_batches(data, 8):
        grid = batch["latents"].shape[1:3]
        assert grid in {(8, 8), (7, 9)} and batch["latents"].dtype == np.float32
        seen += [batch]
    assert data.tells_padding
    encoders = Encoders(MODEL)
    for i in range(44):
        record = data.shards[i]
        size = records.size_of(next(n for n, c in _places(counts) if i < c))
        example = images.read(by_key[record.facts["key"]], size)
        assert record.facts["original"] == list(example.original)
        assert record.facts["caption"] in example.captions
        raw = {
            "image": example.pixels[None],
            "text": encoders.tokenizer.ids([record.facts["caption"]]),
        }
        expected = encoders.encode(raw)
        np.testing.assert_array_equal(record.arrays["txt"], expected["txt"][0].astype(BFLOAT16))
        np.testing.assert_array_equal(record.arrays["y"], expected["y"][0].astype(BFLOAT16))
        length = record.arrays["text_length"]
        assert length == expected["text_length"][0] == len(record.facts["caption"].split())
        found = packed(record.arrays["image"].astype(np.float32) / 127.5 - 1, 4)
        np.testing.assert_allclose(found, expected["latents"][0], atol=1e-6)
    assert {p.caption for p in data.prompts(6)} <= {
        data.shards[i].facts["caption"] for i in range(44)
    }
    held = first_batches(data, 3, split="validation")
    pairs = [
        {
            (x.tobytes(), t.tobytes())
            for b in some
            for x, t in zip(b["latents"], b["txt"], strict=True)
        }
        for some in (held, seen)
    ]
    assert len(pairs[0]) == 6 and pairs[0].isdisjoint(pairs[1])


def _places(counts):
    ends = np.cumsum(list(counts.values()))
    return list(zip(counts, ends.tolist(), strict=True))


def test_captions_are_left_out(folder, tmp_path):
    cache.cache(run_of(folder), tmp_path / "cache")
    config = CacheConfig(path=str(tmp_path / "cache"), validation=2, caption_dropout=0.4)
    data = open_data(config, MODEL)
    empty = Encoders(MODEL).text(Encoders(MODEL).tokenizer.ids([""]))
    batches = first_batches(data, 60)
    left_out = [not t.astype(np.float32).any() for b in batches for t in b["txt"]]
    assert not np.asarray(empty[0]).any() and 0.3 < np.mean(left_out) < 0.5
    whole = first_batches(data, 4, split="validation")
    assert all(t.astype(np.float32).any() for b in whole for t in b["txt"])
    again = data.batches(TOKENIZER, 4)
    again.set_state(_state_after(data, 30))
    for expected in batches[30:34]:
        for name, value in next(again).items():
            np.testing.assert_array_equal(value, expected[name])


def _state_after(data, count):
    stream = data.batches(TOKENIZER, 4)
    for _ in range(count):
        next(stream)
    return stream.get_state()


def test_goes_on_and_is_never_changed_into_another(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(making, "SHARD", 12_000)
    whole = tmp_path / "whole"
    cache.cache(run_of(folder), whole)
    expected = content(whole)
    assert len(expected) > 6
    part = tmp_path / "part"
    cache.cache(run_of(folder), part)
    (part / max(n for n in expected if n != records.EMPTY)).unlink()
    value = json.loads((part / records.FILE).read_text()) | {"shards": None}
    (part / records.FILE).write_text(json.dumps(value))
    with pytest.raises(ConfigError, match="a cache that is not finished"):
        open_data(CacheConfig(path=str(part), validation=2), MODEL)
    cache.cache(run_of(folder), part)
    assert content(part) == expected
    known = records.open_cache(part).fingerprint
    assert known == records.open_cache(whole).fingerprint
    cache.cache(run_of(folder, resolution=48), tmp_path / "larger")
    assert records.open_cache(tmp_path / "larger").fingerprint != known
    with pytest.raises(
        ConfigError, match=r"cache.json: sizes\S* = .* expected the same, or another"
    ):
        cache.cache(run_of(folder, resolution=48), part)
    (folder / "21.png").unlink()
    with pytest.raises(ConfigError, match=r"cache.json: data = "):
        cache.cache(run_of(folder), part)
    assert content(part) == expected
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").write_text("")
    with pytest.raises(ConfigError, match="other: holds other files than a cache"):
        cache.cache(run_of(folder), tmp_path / "other")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text": replace(MODEL.text, seed=1)}, r"text.seed = 0, this run's is 1"),
        ({"text": replace(MODEL.text, length=2)}, r"text_length = 3, the model reads 2"),
        ({"image": PixelsConfig(32, 32, 2)}, r"image.patch = 4, this run's is 2"),
    ],
)
def test_another_model_s_cache_is_refused(folder, tmp_path, change, message):
    cache.cache(run_of(folder), tmp_path / "cache")
    config = CacheConfig(path=str(tmp_path / "cache"), validation=2)
    assert open_data(config, MODEL) is not None
    with pytest.raises(ConfigError, match=message):
        open_data(config, replace(MODEL, **change))
    with pytest.raises(ConfigError, match="latents = sampled: .* holds means alone"):
        open_data(replace(config, latents="sampled"), MODEL)
    with pytest.raises(
        ConfigError, match="found 22 samples, expected more than Cache.* = 22, which"
    ):
        open_data(replace(config, validation=22), MODEL)
    with pytest.raises(ConfigError, match="no such file, expected a cache"):
        open_data(CacheConfig(path=str(tmp_path)), MODEL)


def test_bad_images_are_named_and_left_out(folder, tmp_path, monkeypatch):
    (folder / "03.png").write_bytes((folder / "03.png").read_bytes()[:4000])
    advanced = []

    @contextlib.contextmanager
    def bar(total, *others):
        yield lambda count: advanced.append((count, total))

    monkeypatch.setattr(making, "bar", bar)
    counts = cache.cache(run_of(folder), tmp_path / "cache")
    assert sum(counts.values()) == 21
    assert sum(count for count, _ in advanced) == 22 == advanced[0][1]  # the bad one is done too
    told = (tmp_path / "cache" / "left_out.0.txt").read_text()
    assert told.count("\n") == 1 and "03.png: no image that can be decoded" in told
    with pytest.raises(ConfigError, match="03.png: no image .*max_bad = 0"):
        cache.cache(run_of(folder, max_bad=0), tmp_path / "strict")


CONFIG = """
from tests.data.test_cache import run_of

def get_config():
    return run_of({folder!r})
"""


def test_killed_at_any_moment_it_ends_with_the_same_bytes(folder, tmp_path):
    """By SIGKILL, which nothing can catch; shards of two images, so that it is amid them."""
    (tmp_path / "config.py").write_text(CONFIG.format(folder=str(folder)))
    program = (
        "import sys, time; from d2m_jax.data import making, cache; making.SHARD = 12_000;"
        " write = making.write_shard;"
        " making.write_shard = lambda *a: (time.sleep(0.1), write(*a))[1];"
        " cache.main(sys.argv[1:])"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "config.py"), "--output"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    killed = tmp_path / "killed"
    for shards in (2, 4):
        process = subprocess.Popen(
            [*command, str(killed)], cwd=ROOT, env=environment, stderr=subprocess.DEVNULL
        )
        while len(list(killed.glob(f"*-*{records.SUFFIX}"))) < shards and process.poll() is None:
            time.sleep(0.01)
        assert process.poll() is None, "it ended before it was killed"
        process.send_signal(signal.SIGKILL)
        process.wait()
    for place in (killed, tmp_path / "whole"):
        done = subprocess.run(
            [*command, str(place)], cwd=ROOT, env=environment, capture_output=True, text=True,
            check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    assert content(killed) == content(tmp_path / "whole")
    assert len(list(killed.iterdir())) == len(content(killed)) + 1, "nothing half-written is left"


@pytest.mark.parametrize("padding", ["keep", "drop"])
def test_flux_s_own_encoders(folder, tmp_path, padding):
    """T5, CLIP and the autoencoder of a tiny FluxPipeline: as they would encode the raw batch."""
    pytest.importorskip("diffusers")
    from tests.sampling.flux_oracle import tiny_pipeline

    tiny_pipeline().save_pretrained(tmp_path / "torch")
    convert.convert(tmp_path / "torch", tmp_path / "flux")
    model = load_config(tmp_path / "flux")
    model = replace(model, text=replace(model.text, length=12))
    cache.cache(run_of(folder, model), tmp_path / "cache", padding)
    path = str(tmp_path / "cache")
    data = open_data(CacheConfig(path=path, validation=2), model)
    images, encoders = open_data(run_of(folder).data, model), Encoders(model)
    by_key = {images.key(i): i for i in range(22)}
    record = data.shards[0]
    size = data.buckets[int(data._bucket_of[0])]
    example = images.read(by_key[record.facts["key"]], size)
    ids = encoders.tokenizer.ids([record.facts["caption"]])
    expected = encoders.encode({"image": example.pixels[None], "text": ids})
    batch = _only(data, 0)
    for name, value in expected.items():
        value = np.array(value[0], np.float32)
        if name == "txt" and padding == "drop":
            length = int((ids["t5"] != 0).sum())
            assert 0 < length < 12 and len(record.arrays["txt"]) == length
            value[length:] = 0
        # bfloat16 has 8 bits
        np.testing.assert_allclose(
            np.asarray(batch[name][0], np.float32), value, atol=0.02, rtol=0.01
        )
    sampled = open_data(CacheConfig(path=path, validation=2, latents="sampled"), model)
    drawn = np.stack([_only(sampled, 0, seed)["latents"][0] for seed in range(64)])
    deviation = (
        np.exp(0.5 * record.arrays["logvar"].astype(np.float32)) * model.image.scaling_factor
    )
    mean = batch["latents"][0]
    expected_deviation = packed(deviation, 2)
    assert np.abs(drawn.mean(0) - mean).max() < 0.8 * expected_deviation.max()
    np.testing.assert_allclose(drawn.std(0).mean(), expected_deviation.mean(), rtol=0.1)
    # A transformer alone, without encoders, trains on it too.
    assert len(open_data(CacheConfig(path=path, validation=2), replace(model, encoders=None))) == 22


def _only(data, entry, seed=0):
    """A batch of one record."""
    from d2m_jax.data.buckets import Rows
    from d2m_jax.data.cached import _encoded

    rows = Rows(0, np.array([entry]), np.array([entry]))
    return _encoded(data.config, data.model, None, seed, [data.shards[entry]], rows)
