import os
import pickle
from concurrent.futures import ThreadPoolExecutor

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from d2m_jax.config import ConfigError
from d2m_jax.data.sources import parquet
from d2m_jax.data.sources.any_source import BadSample, Source
from d2m_jax.data.sources.open import open_source
from tests.data.sources.making import encoded

IMAGES = [encoded(i, size=(20 + i, 10)) for i in range(7)]
TEXTS = [f"caption {i}" for i in range(7)]


def nested(images=IMAGES):
    return [None if i is None else {"bytes": i, "path": f"{n}.jpg"} for n, i in enumerate(images)]


def write(path, rows=3, **columns):
    pq.write_table(pa.table(columns), path, row_group_size=rows)
    return path


@pytest.mark.parametrize("name", ["image", "jpg", "picture"])
@pytest.mark.parametrize("text", ["text", "caption"])
def test_as_hugging_face_writes_it(tmp_path, name, text):
    (tmp_path / "data").mkdir()
    write(tmp_path / "data" / "train-00000-of-00002.parquet", **{name: nested(), text: TEXTS})
    write(
        tmp_path / "data" / "train-00001-of-00002.parquet",
        **{text: ["x"], name: nested([IMAGES[0]])},
    )
    source = open_source(str(tmp_path))
    assert isinstance(source, Source) and len(source) == 8
    order = np.random.default_rng(0).permutation(8)
    for i in map(int, order):
        sample = source[i]
        assert sample.image == [*IMAGES, IMAGES[0]][i]
        assert sample.captions == ([*TEXTS, "x"][i],)
        assert sample.key == source.key(i)
    assert source.key(4) == "data/train-00000-of-00002.parquet: 1, 1"
    assert source.key(7) == "data/train-00001-of-00002.parquet: 0, 0"
    assert source.sizes().tolist() == [[10, 20 + i] for i in range(7)] + [[10, 20]]


def test_plain_bytes_and_lists_of_captions(tmp_path):
    more = [["a", "b"], [], ["c"], None, ["d", " "], ["e"], ["f"]]
    write(tmp_path / "a.parquet", image=pa.array(IMAGES, pa.large_binary()), captions=more)
    source = open_source(str(tmp_path / "a.parquet"))
    found = [source[i].captions for i in range(7)]
    assert found == [("a", "b"), (), ("c",), (), ("d",), ("e",), ("f",)]
    assert [source[i].image for i in range(7)] == IMAGES


def test_columns_with_sizes_spare_reading_the_images(tmp_path, monkeypatch):
    monkeypatch.setattr(parquet, "image_size", None)
    write(
        tmp_path / "a.parquet", image=nested(), text=TEXTS, height=[7] * 7, width=list(range(1, 8))
    )
    source = open_source(str(tmp_path))
    assert source.sizes().tolist() == [[7, w] for w in range(1, 8)]


def test_columns_with_some_sizes_do_not(tmp_path):
    write(
        tmp_path / "a.parquet", image=nested(), text=TEXTS, height=[9, *[None] * 6], width=[0] * 7
    )
    assert open_source(str(tmp_path)).sizes().tolist() == [[10, 20 + i] for i in range(7)]


def test_rows_without_image(tmp_path):
    images = [IMAGES[0], None, b"", *IMAGES[3:5]]
    write(tmp_path / "a.parquet", rows=2, image=nested(images), text=TEXTS[:5])
    with pytest.raises(
        ConfigError, match="2 samples cannot be used.*a.parquet: 0, 1: has no image"
    ):
        open_source(str(tmp_path), max_bad=1)
    source = open_source(str(tmp_path))
    assert [source[i].captions[0] for i in range(3)] == ["caption 0", "caption 3", "caption 4"]
    assert source.key(1) == "a.parquet: 1, 1"


def test_bad_captions(tmp_path):
    write(tmp_path / "a.parquet", image=nested(IMAGES[:2]), text=["x" * 70_000, None])
    source = open_source(str(tmp_path))
    with pytest.raises(BadSample, match="^a.parquet: 0, 0: its caption has 70000 bytes"):
        source[0]
    assert source[1].captions == ()


def test_row_groups_are_read_once_and_few_are_kept(tmp_path, monkeypatch):
    write(tmp_path / "a.parquet", image=nested(), text=TEXTS)
    source = open_source(str(tmp_path))
    read, true = [], parquet._Table.group
    monkeypatch.setattr(parquet._Table, "group", lambda self, n: (read.append(n), true(self, n))[1])
    for i in (0, 2, 1, 3, 6, 0, 5):
        source[i]
    assert read == [0, 1, 2]
    monkeypatch.setattr(parquet, "KEPT", 0)
    for i in (0, 1, 3, 0):
        source[i]
    assert read == [0, 1, 2, 1, 0] and len(source._groups) == 1


def test_many_threads(tmp_path, monkeypatch):
    monkeypatch.setattr(parquet, "KEPT", 3000)
    write(tmp_path / "a.parquet", image=nested(), text=TEXTS, rows=2)
    source = open_source(str(tmp_path))

    def read(seed):
        order = np.random.default_rng(seed).integers(0, 7, 50)
        return all(source[int(i)].image == IMAGES[i] for i in order)

    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(read, range(6))) == [True] * 6


@pytest.mark.parametrize(
    "columns, message",
    [
        ({"text": TEXTS}, "has the columns text; expected one with images"),
        ({"image": TEXTS}, "has the columns image; expected one with images"),
        ({"a": nested(), "b": nested()}, "has the columns a, b; expected one with images"),
    ],
)
def test_tables_without_images(tmp_path, columns, message):
    path = write(tmp_path / "a.parquet", **columns)
    with pytest.raises(ConfigError, match=f"found no image that can be used: {path}: {message}"):
        open_source(str(tmp_path))


def test_damage(tmp_path):
    path = write(tmp_path / "a.parquet", image=nested(), text=TEXTS)
    good = write(tmp_path / "b.parquet", image=nested(IMAGES[:1]), text=TEXTS[:1])
    os.truncate(path, path.stat().st_size - 9)
    with pytest.raises(ConfigError, match=f"1 samples cannot be used.*{path}: .*Parquet"):
        open_source(str(tmp_path), max_bad=0)
    assert len(open_source(str(tmp_path))) == 1
    good.write_bytes(b"")
    with pytest.raises(ConfigError, match="found no image that can be used"):
        open_source(str(tmp_path))


def test_a_damaged_row_group_costs_its_rows(tmp_path):
    path = write(tmp_path / "a.parquet", image=nested(), text=TEXTS)
    chunk = pq.ParquetFile(path).metadata.row_group(1).column(0)
    with path.open("r+b") as file:
        file.seek(chunk.dictionary_page_offset or chunk.data_page_offset)
        file.write(b"\xff" * 40)
    with pytest.raises(ConfigError, match=f"3 samples cannot be used.*{path}: 1: its 3 rows: "):
        open_source(str(tmp_path), max_bad=0)
    source = open_source(str(tmp_path))
    assert [source[i].captions[0] for i in range(4)] == [f"caption {i}" for i in (0, 1, 2, 6)]


def test_changed_while_it_is_read(tmp_path):
    path = write(tmp_path / "a.parquet", image=nested(), text=TEXTS)
    source = pickle.loads(pickle.dumps(open_source(str(tmp_path))))
    write(path, image=nested(IMAGES[::-1]), text=TEXTS, rows=1)
    with pytest.raises(
        BadSample, match="^a.parquet: 0, 1: has .* bytes, had .* when it was indexed"
    ):
        source[1]


def test_large_row_groups_are_told(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(parquet, "LARGE", 100)
    write(tmp_path / "a.parquet", image=nested(), text=TEXTS)
    open_source(str(tmp_path), max_bad=0)
    assert "faster if written with row groups of 100 rows" in capsys.readouterr().err


def test_in_a_store(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = write(tmp_path / "a.parquet", image=nested(), text=TEXTS)
    store = fsspec.filesystem("memory")
    store.store.clear()
    with store.open("/hf/data/a.parquet", "wb") as out:
        out.write(path.read_bytes())
    source = open_source("memory://hf/data/*.parquet")
    assert [source[i].image for i in range(7)] == IMAGES
    store.store.clear()
