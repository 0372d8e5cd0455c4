import csv
import io
import json
import os
import pickle

import fsspec
import pytest

from d2m_jax.config import ConfigError
from d2m_jax.data.sources import folders
from d2m_jax.data.sources.any_source import BadSample, Source
from d2m_jax.data.sources.open import open_source
from tests.data.sources.making import encoded, members, tar


def write(root, files):
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())


def captions(source):
    return {source[i].key: source[i].captions for i in range(len(source))}


def lines(*rows):
    return "\n".join(json.dumps(row) for row in rows)


def test_captions_beside_images(tmp_path):
    files = {
        "a.jpg": encoded(1),
        "a.txt": "one\n\ntwo \u2028and\x85a half\r\n",
        "photo.v2.png": encoded(kind="PNG"),
        "photo.v2.txt": "of a name with dots",
        "deep/er/b.webp": encoded(kind="WEBP", size=(50, 40)),
        "deep/er/b.json": '{"caption": "of JSON"}',
        "deep/c.GIF": encoded(kind="GIF", mode="P"),
        "deep/d.tif": encoded(kind="TIFF"),
        "deep/d.txt": " ",
        "deep/d.json": '{"text": "where the text is blank"}',
        "notes.md": "of no image",
        ".hidden/x.jpg": encoded(),
        ".x.jpg": encoded(),
        "deep/alone.txt": "of no image",
    }
    write(tmp_path, files)
    source = open_source(str(tmp_path))
    assert isinstance(source, Source)
    assert captions(source) == {
        "a.jpg": ("one", "two \u2028and\x85a half"),
        "photo.v2.png": ("of a name with dots",),
        "deep/c.GIF": (),
        "deep/d.tif": ("where the text is blank",),
        "deep/er/b.webp": ("of JSON",),
    }
    assert [source.key(i) for i in range(5)] == list(captions(source))
    for i, (height, width) in enumerate(source.sizes().tolist()):
        assert source[i].image == files[source.key(i)]
        assert (height, width) == ((40, 50) if "webp" in source.key(i) else (16, 24))


def test_metadata_of_an_imagefolder(tmp_path):
    """In the folder of the images or above it; what stands beside an image goes first, then what is
    nearer."""
    image = encoded()
    table = io.StringIO()
    out = csv.writer(table)
    out.writerows(
        [("file_name", "text"), ("0.png", 'of "CSV", quoted\nin two lines'), ("1.png", "x")]
    )
    write(
        tmp_path,
        {
            "metadata.jsonl": lines(
                {"file_name": "top.jpg", "text": "of the top"},
                {"file_name": "train/a.jpg", "caption": ["one", "two"]},
                {"file_name": "./train/b.jpg", "text": "of the top"},
                {"file_name": "csv/1.png", "text": "of the top"},
                {"file_name": "csv/2.png", "text": "of the top"},
            ),
            "top.jpg": image,
            "train/a.jpg": image,
            "train/b.jpg": image,
            "train/b.txt": "beside it",
            "csv/metadata.csv": "\ufeff" + table.getvalue(),
            "csv/0.png": image,
            "csv/1.png": image,
            "csv/2.png": image,
            "csv/none.png": image,
        },
    )
    assert captions(open_source(str(tmp_path), max_bad=0)) == {
        "top.jpg": ("of the top",),
        "csv/0.png": ('of "CSV", quoted\nin two lines',),
        "csv/1.png": ("x",),
        "csv/2.png": ("of the top",),
        "csv/none.png": (),
        "train/a.jpg": ("one", "two"),
        "train/b.jpg": ("beside it",),
    }


def test_what_is_bad_is_counted_and_named(tmp_path, capsys):
    image = encoded()
    write(
        tmp_path,
        {
            "metadata.jsonl": lines({"file_name": "gone.jpg", "text": "x"}, {"file": "a.jpg"})
            + "\n{",
            "good.jpg": image,
            "empty.jpg": b"",
            "latin.jpg": image,
            "latin.txt": b"caf\xe9",
            "long.jpg": image,
            "long.txt": "x" * 70_000,
            "broken.jpg": image,
            "broken.json": "{",
            "half.jpg": image,
            "half.json": '{"caption": "a cat \\ud83d"}',
            "header.jpg": b"\xff\xd8\xff\xe0 no more",
        },
    )
    with pytest.raises(ConfigError, match="6 samples cannot be used, more than max_bad = 5: "):
        open_source(str(tmp_path), max_bad=5)
    source = open_source(str(tmp_path))
    assert set(captions(source)) == {"good.jpg", "header.jpg"}
    told = source.index.parts[0].problems
    for message in (
        "gone.jpg: the metadata name it, but there is no such file",
        "metadata.jsonl, line 2: expected an object with file_name",
        "metadata.jsonl, line 3: expected an object with file_name",
        "empty.jpg: is empty",
        "latin.txt: its caption is no UTF-8",
        "long.txt: its caption has 70000 bytes, expected at most 65536",
        "half.json: its caption holds '\\ud83d', half a letter; expected text",
        "broken.json: its .json is no JSON",
    ):
        assert any(f"{tmp_path}/{message}" in line for line in told), (message, told)
    header = [source.key(i) for i in range(2)].index("header.jpg")
    assert source.sizes()[header].tolist() == [0, 0]
    assert f"{tmp_path}: 2 samples, 6 left out: " in capsys.readouterr().err


def test_only_folders_that_changed_are_read_again(tmp_path, monkeypatch):
    for name in ("a/1", "a/2", "b/1"):
        write(tmp_path, {f"{name}.jpg": encoded(), f"{name}.txt": name})
    read, true = [], folders.scan
    monkeypatch.setattr(
        folders, "scan", lambda root, folder: (read.append(folder.path), true(root, folder))[1]
    )
    first = open_source(str(tmp_path))
    assert sorted(read) == [f"{tmp_path}/a", f"{tmp_path}/b"]
    read.clear()
    assert open_source(str(tmp_path)).fingerprint() == first.fingerprint()
    write(tmp_path, {"b/1.txt": "another"})
    assert captions(open_source(str(tmp_path)))["b/1.jpg"] == ("another",)
    assert read == [f"{tmp_path}/b"]
    read.clear()
    write(tmp_path, {"metadata.jsonl": lines({"file_name": "a/3.jpg", "text": "new"})})
    write(tmp_path, {"a/3.jpg": encoded()})
    assert captions(open_source(str(tmp_path)))["a/3.jpg"] == ("new",)
    write(tmp_path, {"metadata.jsonl": lines({"file_name": "a/3.jpg", "text": "newer"})})
    assert captions(open_source(str(tmp_path)))["a/3.jpg"] == ("newer",)


def test_changed_while_it_is_read(tmp_path):
    write(tmp_path, {"a.jpg": encoded(1), "b.jpg": encoded(2)})
    source = pickle.loads(pickle.dumps(open_source(str(tmp_path))))
    write(tmp_path, {"a.jpg": encoded(3, size=(99, 99))})
    (tmp_path / "b.jpg").unlink()
    with pytest.raises(
        BadSample, match=r"^a.jpg: .*a.jpg has \d+ bytes, had \d+ when it was indexed"
    ):
        source[0]
    with pytest.raises(BadSample, match="^b.jpg: .*b.jpg cannot be read .No such file"):
        source[1]


def test_in_a_store(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    store = fsspec.filesystem("memory")
    store.store.clear()
    for name, content in {
        "/photos/x/a.jpg": encoded(1),
        "/photos/x/a.txt": b"a caption",
        "/photos/metadata.csv": b"file_name,caption\nb.png,of the table\n",
        "/photos/b.png": encoded(2, kind="PNG"),
    }.items():
        with store.open(name, "wb") as out:
            out.write(content)
    source = open_source("memory://photos/")
    assert captions(source) == {"b.png": ("of the table",), "x/a.jpg": ("a caption",)}
    assert source[1].image == encoded(1) and source.sizes().tolist() == [[16, 24]] * 2
    store.store.clear()


def test_folders_of_img2dataset(tmp_path):
    """Its output_format "files": images in folders, a table without images beside them."""
    write(
        tmp_path,
        {
            "00000/000000000.jpg": encoded(),
            "00000/000000000.txt": "a cat",
            "00000/000000000.json": "{}",
            "00000.parquet": b"PAR1",
            "00000_stats.json": "{}",
        },
    )
    assert captions(open_source(str(tmp_path))) == {"00000/000000000.jpg": ("a cat",)}


def test_names_that_are_no_utf8(tmp_path):
    """As Latin-1 has them: of files, of their folder, of tars."""
    place = tmp_path / os.fsdecode(b"sch\xf6n")
    names = [os.fsdecode(b"caf\xe9"), os.fsdecode(b"caf\xe8"), "café"]
    try:
        write(place, {f"{n}.jpg": encoded(i) for i, n in enumerate(names)})
    except OSError:
        pytest.skip("a disk on which all names are Unicode")
    write(place, {f"{n}.txt": f"caption {i}" for i, n in enumerate(names)})
    source = open_source(str(tmp_path), str(tmp_path / "index"), max_bad=0)
    keys = ["sch\\xf6n/caf\\xe8.jpg", "sch\\xf6n/caf\\xe9.jpg", "sch\\xf6n/café.jpg"]
    assert sorted(source.key(i) for i in range(3)) == keys
    for i in range(3):
        number = [1, 0, 2][keys.index(source.key(i))]
        assert source[i].image == encoded(number) and source[i].captions == (f"caption {number}",)
    (place / f"{names[0]}.jpg").unlink()
    source = pickle.loads(pickle.dumps(source))  # which has no file open
    with pytest.raises(BadSample) as error:
        source[[source.key(i) for i in range(3)].index(keys[1])]
    assert str(error.value).startswith(keys[1]) and str(error.value).encode()
    tar(place / f"{names[0]}.tar", members(["1"]))
    source = open_source(f"{place}/*.tar", str(tmp_path / "index"), max_bad=0)
    assert source[0].key == "caf\\xe9.tar: 1"
