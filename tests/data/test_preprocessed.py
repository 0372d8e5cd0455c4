"""Samples of MLPerf's FLUX.1 benchmark, as its reference and as NVIDIA keep them.

The folders beside this file were written by Hugging Face's datasets 5.2.0 in the way of the
reference, which goes through parquet: `save` below, given a place where that is installed.
"""

import io
import json
import pickle
import re
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from d2m_jax.config import (
    AutoencoderConfig,
    CacheConfig,
    ConfigError,
    ModelConfig,
    PixelsConfig,
    PromptsConfig,
    RunConfig,
    StageConfig,
)
from d2m_jax.data.cached import packed
from d2m_jax.data.records import BFLOAT16
from d2m_jax.data.source import largest_size, open_data
from d2m_jax.training.run import run
from tests.models import toy

FOLDER = Path(__file__).parent / "preprocessed"
SHAPES = {"t5_encodings": (6, 8), "clip_encodings": (4,), "mean": (4, 4, 6), "logvar": (4, 4, 6)}
SAMPLES = 11
MODEL = ModelConfig(
    transformer=replace(toy.DENSE, in_channels=16, context_in_dim=8, vec_in_dim=4),
    text=PromptsConfig(length=7),
    image=AutoencoderConfig(
        height=8, width=8, block_out_channels=(8, 8), latent_channels=4, norm_num_groups=2
    ),
)


class Unasked:
    """A tokenizer that encoded samples have no use for."""

    def ids(self, captions):
        raise AssertionError("asked")


UNASKED = Unasked()


def values(sample: int, name: str, shape: tuple[int, ...] | None = None) -> np.ndarray:
    """What an array of a sample holds, exact in bfloat16; −1 is the empty caption."""
    shape = shape or SHAPES[name]
    count = int(np.prod(shape))
    drawn = np.arange(count) * 7 + 13 * sample + 5 * list(SHAPES).index(name)
    return ((drawn % 127).astype(np.float32) / 64 - 1).reshape(shape)


NUMBERS = {values(i, "clip_encodings").astype(BFLOAT16).tobytes(): i for i in range(-1, SAMPLES)}


def saved(array: np.ndarray) -> bytes:
    """As the reference does: bfloat16, viewed as uint16, by np.save."""
    file = io.BytesIO()
    np.save(file, array.astype(BFLOAT16).view(np.uint16))
    return file.getvalue()


def save(folder: Path) -> None:
    """Write the folders anew."""
    import datasets
    import pyarrow
    import pyarrow.parquet

    names = {name: pyarrow.binary() for name in SHAPES}
    schema = {"__key__": pyarrow.string(), **names, "timestep": pyarrow.int32()}
    for name, timed, shards in (("cc12m_preprocessed", False, 3), ("coco_preprocessed", True, 2)):
        rows = [
            {"__key__": f"{i:09d}"}
            | {name: saved(values(i, name)) for name in SHAPES}
            | ({"timestep": (i * 3) % 8} if timed else {})
            for i in range(SAMPLES)
        ]
        table = pyarrow.Table.from_pylist(rows, schema=pyarrow.schema(schema.items()))
        pyarrow.parquet.write_table(table, folder / "part.parquet")
        data = datasets.Dataset.from_parquet(str(folder / "part.parquet"))
        data.save_to_disk(folder / name, num_shards=shards)
        (folder / "part.parquet").unlink()
    empty = folder / "empty_encodings"
    empty.mkdir(exist_ok=True)
    for file, name in (("t5_empty", "t5_encodings"), ("clip_empty", "clip_encodings")):
        np.save(empty / f"{file}.npy", values(-1, name)[None].astype(np.float16))


def cached(folder: Path, model: ModelConfig = MODEL, **fields) -> CacheConfig:
    return open_data(CacheConfig(path=str(folder), validation=2, **fields), model)


def expected(sample: int) -> dict[str, np.ndarray]:
    """What a batch holds of a sample."""
    scaled = (values(sample, "mean") - MODEL.image.shift_factor) * MODEL.image.scaling_factor
    txt = np.zeros((MODEL.text.length, 8), np.float32)
    txt[:6] = values(sample, "t5_encodings")
    latents = packed(scaled.transpose(1, 2, 0), 2)
    return {"latents": latents, "txt": txt, "y": values(sample, "clip_encodings")}


def samples_of(batches, count):
    """Samples of so many batches, each as arrays by name."""
    found = []
    for _ in range(count):
        batch = next(batches)
        found += [{name: a[i] for name, a in batch.items()} for i in range(len(batch["y"]))]
    return found


def number_of(sample):
    """Which one it is, by its vector of CLIP."""
    return NUMBERS[sample["y"].tobytes()]


def test_batches_hold_what_the_reference_saved():
    data = cached(FOLDER / "cc12m_preprocessed")
    assert data.encoded and data.sizes == ((8, 12),) and len(data) == SAMPLES
    config = CacheConfig(path=str(FOLDER / "cc12m_preprocessed"))
    assert largest_size(config, MODEL) == (8, 12)
    seen = {}
    for split in ("train", "validation"):
        found = samples_of(data.batches(UNASKED, 3, split=split), 6)
        for sample in found:
            number = number_of(sample)
            assert set(sample) == {"latents", "txt", "y"}, "times are null here"
            for name, array in expected(number).items():
                np.testing.assert_allclose(sample[name].astype(np.float32), array, atol=1e-6)
        seen[split] = {number_of(sample) for sample in found}
    assert len(seen["train"]) == 9 and seen["validation"] == set(range(SAMPLES)) - seen["train"]
    assert data.prompts(3) == [] and data.vocabulary() == ()


def test_latents_are_drawn_anew():
    data = cached(FOLDER / "cc12m_preprocessed", latents="sampled")
    found = samples_of(data.batches(UNASKED, 9), 120)
    means, deviations = [], []
    for number in {number_of(sample) for sample in found}:
        drawn = np.stack([s["latents"] for s in found if number_of(s) == number])
        deviation = np.exp(0.5 * values(number, "logvar").transpose(1, 2, 0))
        deviation = packed(deviation * MODEL.image.scaling_factor, 2)
        means.append((drawn.mean(0) - expected(number)["latents"]) / deviation)
        deviations.append(drawn.std(0) / deviation)
    # 120 draws of each: 1/√120 = 0.09
    assert np.abs(means).max() < 0.5 and np.std(means) < 0.12
    assert np.min(deviations) > 0.6 and np.max(deviations) < 1.4
    assert 0.97 < np.mean(deviations) < 1.03


def test_captions_left_out_have_the_features_of_the_empty_one(tmp_path):
    data = cached(FOLDER / "cc12m_preprocessed", caption_dropout=0.3)
    found = samples_of(data.batches(UNASKED, 9), 30)
    empty = [sample for sample in found if number_of(sample) == -1]
    assert 0.2 < len(empty) / len(found) < 0.4
    for sample in empty:
        np.testing.assert_array_equal(sample["txt"].astype(np.float32), expected(-1)["txt"])
    kept = samples_of(data.batches(UNASKED, 2, split="validation"), 9)
    assert all(number_of(sample) >= 0 for sample in kept)
    alone = tmp_path / "a" / "b" / "saved"
    shutil.copytree(FOLDER / "cc12m_preprocessed", alone)
    with pytest.raises(ConfigError, match="caption_dropout: none of .*empty_encodings is there"):
        cached(alone, caption_dropout=0.3)
    assert len(cached(alone)) == SAMPLES
    shutil.copytree(FOLDER / "empty_encodings", tmp_path / "a" / "empty_encodings")
    assert cached(alone, caption_dropout=0.3) is not None
    np.save(tmp_path / "a" / "empty_encodings" / "t5_empty.npy", np.zeros((1, 9, 8), np.float16))
    with pytest.raises(ConfigError, match=r"t5_empty.npy: shape \(1, 9, 8\), .* have \(1, 6, 8\)"):
        cached(alone, caption_dropout=0.3)


def test_samples_to_validate_on_say_when():
    data = cached(FOLDER / "coco_preprocessed")
    for split in ("train", "validation"):
        for sample in samples_of(data.batches(UNASKED, 2, split=split), 6):
            assert sample["eighth"] == (number_of(sample) * 3) % 8
            assert sample["eighth"].dtype == np.int32


def test_worker_processes_read_it_too():
    data = cached(FOLDER / "coco_preprocessed")
    again = pickle.loads(pickle.dumps(data))
    for i in (0, 10):
        np.testing.assert_array_equal(again.shards[i].arrays["txt"], data.shards[i].arrays["txt"])


def test_a_damaged_file_is_named(tmp_path):
    folder = tmp_path / "saved"
    shutil.copytree(FOLDER / "coco_preprocessed", folder)
    file = folder / "data-00001-of-00002.arrow"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ConfigError, match="data-00001-of-00002.arrow: cannot be read as an Arrow"):
        cached(folder)
    file.unlink()
    with pytest.raises(ConfigError, match="data-00001-of-00002.arrow: no such file, .*state.json"):
        cached(folder)
    (folder / "state.json").write_text("{}")
    with pytest.raises(ConfigError, match="state.json: damaged"):
        cached(folder)


def test_a_folder_of_splits_asks_for_one(tmp_path):
    shutil.copytree(FOLDER / "coco_preprocessed", tmp_path / "train")
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train"]}')
    with pytest.raises(ConfigError, match="holds the folders train; expected the path of one"):
        cached(tmp_path)


def altered(folder: Path, rows: dict[int, dict], shapes: dict | None = None) -> Path:
    """A folder like that of datasets, with some rows otherwise."""
    import pyarrow

    folder.mkdir()
    names = {name: pyarrow.binary() for name in SHAPES}
    schema = {"__key__": pyarrow.string(), **names, "timestep": pyarrow.int32()}
    found = [
        {"__key__": f"{i:09d}", "timestep": i % 8}
        | {name: saved(values(i, name, (shapes or SHAPES)[name])) for name in SHAPES}
        | rows.get(i, {})
        for i in range(8)
    ]
    table = pyarrow.Table.from_pylist(found, schema=pyarrow.schema(schema.items()))
    with pyarrow.ipc.new_stream(folder / "data.arrow", table.schema) as stream:
        stream.write_table(table)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data.arrow"}]}))
    return folder


BAD = {
    0: ({"mean": None}, "000000000: mean: expected 3 axes of uint16 from np.save, found nothing"),
    1: ({"mean": b"x"}, "000000001: mean: .* found EOF"),
    2: ({"timestep": 9}, "000000002: timestep = 9, expected 0 to 7"),
    3: ({"timestep": None}, "000000003: timestep = None"),
    4: ({"t5_encodings": saved(np.zeros((5, 8)))}, r"000000004: t5_encodings has .*\(5, 8\)"),
    5: ({"logvar": saved(np.zeros((4, 4, 6)))[:-2]}, "000000005: logvar: .* buffer is smaller"),
}  # fmt: skip


def test_bad_samples_are_named_and_left_out(tmp_path, capfd):
    folder = altered(tmp_path / "saved", {i: row for i, (row, _) in BAD.items()})
    data = open_data(CacheConfig(path=str(folder), validation=0), MODEL)
    found = samples_of(data.batches(UNASKED, 4), 20)
    assert {number_of(sample) for sample in found} == {6, 7}
    told = capfd.readouterr().err
    for _, message in BAD.values():
        assert len(re.findall(message, told)) == 1, told
    strict = open_data(CacheConfig(path=str(folder), validation=0, max_bad=3), MODEL)
    with pytest.raises(ConfigError, match="4 samples cannot be used, .*CacheConfig.max_bad = 3"):
        samples_of(strict.batches(UNASKED, 4), 20)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image": PixelsConfig(8, 12, 4)}, "CLIP and an autoencoder, expected a model that has"),
        ({"text": PromptsConfig(length=5)}, "length of T5's features: found 6, the model reads 5"),
        ({"image": replace(MODEL.image, latent_channels=8)}, "channels .* found 4, expected 8"),
        (
            {"image": replace(MODEL.image, block_out_channels=(8, 8, 8))},
            None,
        ),
        (
            {"transformer": replace(MODEL.transformer, context_in_dim=9)},
            "width of T5's features: found 8, expected 9",
        ),
        (
            {"transformer": replace(MODEL.transformer, vec_in_dim=9)},
            "width of CLIP's vectors: found 4, expected 9",
        ),
    ],
)
def test_another_model_s_samples_are_refused(change, message):
    folder = FOLDER / "coco_preprocessed"
    if message is None:  # the autoencoder shrinks more: other pixels, the same tokens
        assert cached(folder, replace(MODEL, **change)).sizes == ((16, 24),)
        return
    with pytest.raises(ConfigError, match=f"coco_preprocessed: .*{message}"):
        cached(folder, replace(MODEL, **change))


def test_what_does_not_make_whole_tokens_is_refused(tmp_path):
    odd = altered(tmp_path / "odd", {}, SHAPES | {"mean": (4, 4, 5), "logvar": (4, 4, 5)})
    with pytest.raises(ConfigError, match="odd: image size 8 × 10: expected multiples of 4"):
        cached(odd)
    none = {i: {"mean": None} for i in range(8)}
    with pytest.raises(ConfigError, match="none: 8 samples, found none to read: 000000000: mean"):
        cached(altered(tmp_path / "none", none))


def test_trains_and_validates_on_them(tmp_path):
    """As the benchmark does: at the times that the samples to validate on have."""
    config = RunConfig(
        name="mlperf",
        model=MODEL,
        data=CacheConfig(path=str(FOLDER / "cc12m_preprocessed"), validation=2),
        validation=CacheConfig(path=str(FOLDER / "coco_preprocessed"), validation=8),
        fixed_times=True,
        held_out_batches=2,
        stages={"flow": StageConfig(steps=2, batch_size=4, evaluate_every=1, log_every=1)},
    )
    run(config, tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    for name in ("validation_flow_eighths", "validation_flow_half_eighths"):
        assert 0 < lines[-1][name] < 10


def tar_of(file: Path, members: list[tuple[str, bytes]]) -> None:
    with tarfile.open(file, "w") as out:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            out.addfile(info, io.BytesIO(data))


def members_of(sample: int) -> list[tuple[str, bytes]]:
    """Of a tar that NVIDIA's script makes."""
    name, facts = f"{sample:08d}", {"key": f"{sample:09d}", "timestep": (sample * 3) % 8}
    found = [(f"{name}.json", json.dumps(facts).encode())]
    for suffix, array in zip(("t5", "clip", "mean", "logvar"), SHAPES, strict=True):
        found.append((f"{name}.{suffix}.bytes", saved(values(sample, array))))
    return found


@pytest.fixture
def tars(tmp_path):
    """Two of them, and what stands beside them."""
    folder = tmp_path / "energon" / "val"
    folder.mkdir(parents=True)
    for shard, samples in enumerate((range(6), range(6, SAMPLES))):
        tar_of(folder / f"shard_{shard:06d}.tar", [m for i in samples for m in members_of(i)])
    (folder / "index.txt").write_text("shard_000000.tar\nshard_000001.tar\n")
    shutil.copytree(FOLDER / "empty_encodings", tmp_path / "empty_encodings")
    return folder


def test_tars_hold_the_same(tars):
    ours, theirs = cached(tars), cached(FOLDER / "coco_preprocessed")
    assert len(ours) == SAMPLES and ours.sizes == theirs.sizes
    for split in ("train", "validation"):
        pairs = zip(
            samples_of(ours.batches(UNASKED, 3, split=split), 6),
            samples_of(theirs.batches(UNASKED, 3, split=split), 6),
            strict=True,
        )
        for mine, other in pairs:
            assert mine.keys() == other.keys() and "eighth" in mine
            for name, array in mine.items():
                np.testing.assert_array_equal(array, other[name])
    again = pickle.loads(pickle.dumps(ours))
    assert again.shards[7].facts == {"key": "shard_000001.tar: 00000007", "eighth": 5}
    empty = samples_of(cached(tars, caption_dropout=1.0).batches(UNASKED, 4), 1)
    assert {number_of(sample) for sample in empty} == {-1}


def test_what_is_wrong_in_tars_is_named(tars, tmp_path, capfd):
    """What the index tells, and what is told when it is read."""
    broken = [
        *members_of(5)[::-1],
        *members_of(4),
        *members_of(4),
        *[m for m in members_of(0) if ".mean." not in m[0]],
        *[m for m in members_of(1) if ".json" not in m[0]],
        *[(n, d if ".json" not in n else b"{") for n, d in members_of(2)],
        *[(n, d if ".clip." not in n else d[:40]) for n, d in members_of(3)],
    ]
    tar_of(tars / "shard_000000.tar", broken)
    data = open_data(CacheConfig(path=str(tars), validation=0), MODEL)
    assert len(data) == SAMPLES - 1
    found = samples_of(data.batches(UNASKED, 5), 20)
    told = capfd.readouterr().err
    assert {number_of(sample) for sample in found} == set(range(4, SAMPLES)), told
    for message in (
        "val: 10 samples, 1 left out: .*shard_000000.tar: 00000004: comes again; the first",
        "shard_000000.tar: 00000000: has no mean.bytes",
        "left out: .*shard_000000.tar: 00000001: timestep = None, expected 0 to 7",
        "left out: .*shard_000000.tar: 00000002: its .json is no JSON object",
        "left out: .*shard_000000.tar: 00000003: clip_encodings: expected 1 axes of uint16",
    ):
        assert re.search(message, told), told
    with pytest.raises(ConfigError, match="val: 1 samples cannot be used, more than max_bad = 0"):
        open_data(CacheConfig(path=str(tars), validation=0, max_bad=0), MODEL)
    other = tmp_path / "pictures"
    other.mkdir()
    tar_of(other / "a.tar", [("1.jpg", b"x"), ("1.txt", b"y")])
    with pytest.raises(ConfigError, match="found no sample that can be used: .*no samples of .t5."):
        cached(other)


def test_a_tar_that_is_cut_off(tars, capfd):
    """Within a sample; what came after is not known."""
    file = tars / "shard_000001.tar"
    file.write_bytes(file.read_bytes()[:-14_000])
    assert len(cached(tars)) == SAMPLES - 2
    told = capfd.readouterr().err
    assert "shard_000001.tar: is cut off: it has no end mark" in told
    assert "shard_000001.tar: 00000009: has no t5.bytes, clip.bytes" in told


def test_the_index_may_lie_elsewhere(tars, tmp_path):
    before = sorted(tars.iterdir())
    cached(tars, index=str(tmp_path / "index"))
    assert sorted(tars.iterdir()) == before
    (index,) = (tmp_path / "index").glob("encoded_tars-*")
    stamp = index.stat().st_mtime_ns
    cached(tars, index=str(tmp_path / "index"))
    assert index.stat().st_mtime_ns == stamp
