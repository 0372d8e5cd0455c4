"""What a teacher makes of prompts: the sampler's own latents, in a cache."""

import json
from dataclasses import replace

import jax
import numpy as np
import pytest

from d2m_jax import flow
from d2m_jax.config import (
    AutoencoderConfig,
    CacheConfig,
    ConfigError,
    IconsConfig,
    ImagesConfig,
    ModelConfig,
    PixelsConfig,
    WordsConfig,
)
from d2m_jax.data import generate, making, records
from d2m_jax.data.prompt_files import prompts_of
from d2m_jax.data.source import largest_size, open_data
from d2m_jax.models.words import Words
from d2m_jax.sampling.pipeline import Pipeline
from d2m_jax.weights.directory import model_directory
from tests.models import toy

MODEL = ModelConfig(
    transformer=replace(toy.DENSE, in_channels=48, context_in_dim=16, vec_in_dim=16),
    text=WordsConfig(dim=16, length=3, vocabulary=("red", "blue", "anchor", "earth")),
    image=PixelsConfig(16, 16, 4),
    sample_steps=3,
    shift=None,
)
PROMPTS = ["red anchor", "blue earth", "blue anchor", "earth", "red earth"]
SIZES = [(16, 16), (12, 20)]


@pytest.fixture(scope="module")
def pipe():
    return Pipeline(MODEL, jax.tree.map(lambda a: 0.5 * a, toy.params(MODEL.transformer)))


def content(folder):
    return {f.name: f.read_bytes() for f in folder.iterdir() if f.suffix == records.SUFFIX}


def test_latents_are_the_sampler_s(pipe, tmp_path):
    counts = generate.generate(pipe, PROMPTS, tmp_path / "made", seed=3)
    assert sum(counts.values()) == 5
    data = open_data(CacheConfig(path=str(tmp_path / "made"), validation=1), MODEL)
    expected = pipe(PROMPTS, seed=3)
    for i in range(5):
        record = data.shards[i]
        number = int(record.facts["key"])
        assert record.facts["caption"] == PROMPTS[number] and record.facts["guidance"] == 3.5
        latents = record.arrays["latents"].astype(np.float32).reshape(1, 16, 48)
        image = np.clip(flow.unpack(jax.numpy.asarray(latents), 16, 16, 4)[0] / 2 + 0.5, 0, 1)
        np.testing.assert_allclose(image, expected[number], atol=0.01)  # bfloat16


def test_sizes_guidance_and_points_on_the_way(pipe, tmp_path):
    options = {"sizes": SIZES, "guidance": (1.0, 5.0), "trajectory": 2, "images_per_prompt": 3}
    options["batch_size"] = 2
    generate.generate(pipe, PROMPTS, tmp_path / "made", **options)
    data = open_data(CacheConfig(path=str(tmp_path / "made"), validation=1), MODEL)
    assert data.sizes == ((12, 20), (16, 16)) and len(data) == 15
    guidance = [data.shards[i].facts["guidance"] for i in range(15)]
    assert min(guidance) < 2 and max(guidance) > 4 and len(set(guidance)) == 15
    times = {size: flow.schedule(3, MODEL.shift_at(size[0] * size[1] // 16)) for size in SIZES}
    stream = data.batches(Words(MODEL.text), 4)
    seen = set()
    for _ in range(20):
        batch = next(stream)
        rows, columns = batch["latents"].shape[1:3]
        mine = times[rows * 4, columns * 4]
        assert batch["noisy"].shape == batch["latents"].shape and len(batch["guidance"]) == 4
        seen |= {np.flatnonzero(np.isclose(mine, t)).item() for t in batch["time"]}
    assert seen == {0, 1, 2}
    # From a point, what is left of the steps leads to the latents.
    record = data.shards[0]
    size = data.buckets[int(data._bucket_of[0])]
    grid, schedule = (size[0] // 4, size[1] // 4), times[size]
    ids = pipe.encoders.tokenizer.ids([record.facts["caption"]])
    for noisy, time in zip(record.arrays["noisy"], record.arrays["time"], strict=True):
        first = int(np.flatnonzero(np.isclose(schedule, time)).item())
        x = np.asarray(noisy, np.float32).reshape(1, -1, 48)
        with jax.set_mesh(pipe.mesh):
            text = pipe.encoders.text(making.placed(pipe.mesh, ids))
            end = generate.denoise_steps(
                pipe, jax.numpy.asarray(x), (first, 3), text, grid, schedule,
                np.float32([record.facts["guidance"]]),
            )  # fmt: skip
        expected = record.arrays["latents"].astype(np.float32).reshape(1, -1, 48)
        np.testing.assert_allclose(end, expected, atol=0.05)


def test_goes_on_with_the_same(pipe, tmp_path, monkeypatch):
    monkeypatch.setattr(making, "SHARD", 5_000)
    options = {"batch_size": 2, "images_per_prompt": 4, "guidance": (1.0, 5.0)}
    generate.generate(pipe, PROMPTS, tmp_path / "whole", **options)
    expected = content(tmp_path / "whole")
    assert len(expected) > 5
    generate.generate(pipe, PROMPTS, tmp_path / "part", **options)
    for name in sorted(expected)[:3]:
        if name != records.EMPTY:
            (tmp_path / "part" / name).unlink()
    generate.generate(pipe, PROMPTS, tmp_path / "part", **options)
    assert content(tmp_path / "part") == expected
    for change, message in [
        ({"seed": 1}, "sampled.seed = 0"),
        ({"steps": 2}, "sampled.steps = 3"),
        ({"padding": "drop"}, "padding = keep"),
        ({"images_per_prompt": 7}, r"images_per_prompt = \d"),
    ]:
        with pytest.raises(ConfigError, match=f"cache.json: {message}, this run's is"):
            generate.generate(pipe, PROMPTS, tmp_path / "part", **(options | change))
    fewer, others = PROMPTS[:2], [*PROMPTS[:-1], PROMPTS[0]]
    for prompts, message in ((fewer, f"prompts = {len(PROMPTS)}"), (others, r"data = \w+")):
        with pytest.raises(ConfigError, match=f"cache.json: {message}, this run's is"):
            generate.generate(pipe, prompts, tmp_path / "part", **options)
    other = Pipeline(MODEL, toy.params(MODEL.transformer, 5))
    with pytest.raises(ConfigError, match=r"cache.json: teacher = \w+, this run's is"):
        generate.generate(other, PROMPTS, tmp_path / "part", **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"trajectory": 4}, "trajectory = 4: expected 0 to steps = 3"),
        ({"guidance": (5.0, 1.0)}, "guidance = 5.0 1.0: expected one number, or the least"),
        ({"sizes": [(15, 16)]}, "image size 15 × 16: expected multiples of 4"),
        ({"images_per_prompt": 0}, "images_per_prompt = 0: expected at least 1"),
        ({"seed": -1}, "seed = -1: expected a whole number from 0 to 4294967295"),
        ({"seed": 2**32}, "seed = 4294967296: expected a whole number from 0 to 4294967295"),
        ({"batch_size": -2}, "batch_size = -2: expected a whole number of at least 1"),
        ({"guidance": (1.0, np.inf)}, "guidance = inf: expected a number of at least 0"),
    ],
)
def test_what_cannot_be_is_told_first(pipe, tmp_path, options, message):
    with pytest.raises(ConfigError, match=message):
        generate.generate(pipe, PROMPTS, tmp_path / "made", **options)
    assert not (tmp_path / "made").exists()


def test_the_command(pipe, tmp_path, monkeypatch):
    model_directory.save(tmp_path / "teacher", MODEL, pipe.params)
    (tmp_path / "prompts.jsonl").write_text(
        "".join(json.dumps({"text": p}) + "\n" for p in PROMPTS)
    )
    monkeypatch.setattr(generate, "use_cores", lambda: None)
    command = [str(tmp_path / "teacher"), "--prompts", str(tmp_path / "prompts.jsonl")]
    generate.main([*command, "--output", str(tmp_path / "made"), "--sizes", "16x16", "12x20",
                   "--guidance", "2", "4"])  # fmt: skip
    assert len(open_data(CacheConfig(path=str(tmp_path / "made"), validation=1), MODEL)) == 5


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (("--seed", "4294967296"), "seed = 4294967296: expected a whole number from 0 to"),
        (("--batch_size", "-2"), "batch_size = -2: expected a whole number of at least 1"),
        (("--trajectory", "-1"), "trajectory = -1: expected 0 to steps"),
        (("--sizes", "16"), "--sizes 16: expected HEIGHTxWIDTH"),
    ],
)
def test_the_command_tells_before_it_loads(tmp_path, monkeypatch, option, message):
    (tmp_path / "prompts.txt").write_text("red anchor\n")
    monkeypatch.setattr(generate, "load_pipeline", None)
    command = ["teacher", "--prompts", str(tmp_path / "prompts.txt"), *option]
    with pytest.raises(ConfigError, match=message):
        generate.main([*command, "--output", str(tmp_path / "made")])


def test_prompt_files(tmp_path):
    def file(name, text):
        (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
        return tmp_path / name

    assert prompts_of(file("a.txt", "one\n\ntwo\n")) == ["one", "two"]
    assert prompts_of(file("a.jsonl", '{"id": 1, "caption": "one"}\n"two"\n')) == ["one", "two"]
    assert prompts_of(file("a.csv", 'id,Prompt\n1,"one, or"\n2,two\n')) == ["one, or", "two"]
    assert prompts_of(file("a.tsv", "words\tid\none\t1\n"), "words") == ["one"]
    # Neither U+2028 nor U+0085 ends a line; tables of spreadsheets may be UTF-16.
    odd = "one \u2028of two\x85lines"
    assert prompts_of(file("a.jsonl", f'"{odd}"\r\n"two"')) == [odd, "two"]
    assert prompts_of(file("a.csv", f"text\r\n{odd}\r\ntwo\r\n")) == [odd, "two"]
    assert prompts_of(file("a.tsv", "text\tid\nzwei\t1\n".encode("utf-16"))) == ["zwei"]
    arrow, parquet = (pytest.importorskip(name) for name in ("pyarrow", "pyarrow.parquet"))
    parquet.write_table(arrow.table({"TEXT": ["one", None, "two"]}), tmp_path / "a.parquet")
    assert prompts_of(tmp_path / "a.parquet") == ["one", "two"]
    for name, text, message in [
        ("b.txt", "\n", "expected at least one prompt, found none"),
        ("b.jsonl", '{"a": 1}\n', "line 1: found 'a', expected one called prompt"),
        ("b.jsonl", "{\n", "line 1: expected JSON"),
        ("b.jsonl", '{"text": 1}\n', "line 1: text = 1, expected a string"),
        ("b.csv", "a,b\n", "line 1: found 'a', 'b', expected one called prompt"),
        ("b.csv", b"text\na\ncaf\xe9\n", "b.csv, line 3: byte 0xe9 is not UTF-8; save the file"),
        ("b.jsonl", b'"a"\n"caf\xe9"\n', "b.jsonl, line 2: byte 0xe9 is not UTF-8; save"),
        ("b.jsonl", '"a cat \\ud83d"', r"b.jsonl: 'a cat \\ud83d' holds '\\ud83d', half a letter"),
        ("b.csv", "text\n" + "x" * 140_000, "b.csv: cannot be read as a table .field larger"),
        ("b.parquet", "x", "cannot be read as parquet"),
    ]:
        with pytest.raises(ConfigError, match=message):
            prompts_of(file(name, text))
    with pytest.raises(ConfigError, match="no such file"):
        prompts_of(tmp_path / "none.txt")


def test_planning_takes_the_largest_size(pipe, tmp_path):
    images = ImagesConfig(sources={"nowhere": 1.0}, resolutions=(512, 1024), aspect_ratio=2.0)
    flux = ModelConfig(image=AutoencoderConfig())
    height, width = largest_size(images, flux)
    assert height * width >= 1024**2 and height % 16 == width % 16 == 0
    made = CacheConfig(path=str(tmp_path / "made"), validation=1)
    assert largest_size(made, MODEL) == (16, 16)  # not there yet: the model's own
    generate.generate(pipe, PROMPTS, tmp_path / "made", sizes=[(8, 8), (12, 20)])
    assert largest_size(made, MODEL) == (12, 20)
    assert largest_size(IconsConfig(), MODEL) == (16, 16)
