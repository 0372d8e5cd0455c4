import io
import json
import os
import pickle
import random
import tarfile

import numpy as np
import pytest

from d2m_jax.config import ConfigError
from d2m_jax.data.sources.any_source import BadSample, Source
from d2m_jax.data.sources.captions import LONGEST
from d2m_jax.data.sources.open import open_source
from d2m_jax.data.sources.stores import look
from d2m_jax.data.sources.tars import scan
from tests.data.sources.making import encoded, members, place, tar


def samples(source):
    return {(s := source[i]).key: s for i in range(len(source))}


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_samples_as_they_were_written(tmp_path, form):
    """In any order, with long names, of all three forms that tars have."""
    names = ["0001", "folder/0002", "./0003", "f" * 90 + "/" + "n" * 120, "größe/ä", "a/b/c/0001"]
    if form == tarfile.USTAR_FORMAT:
        names[3] = "f" * 90 + "/" + "n" * 80
    written = list(members(names))
    random.Random(0).shuffle(written)
    tar(tmp_path / "7.tar", written, form)
    source = open_source(str(tmp_path / "7.tar"))
    assert isinstance(source, Source) and len(source) == len(names)
    assert {s.key for s in samples(source).values()} == {f"7.tar: {name}" for name in names}
    assert [source.key(i) for i in range(len(source))] == list(samples(source))
    for sample in samples(source).values():
        name = sample.key.removeprefix("7.tar: ")
        assert sample.image == dict(written)[f"{name}.jpg"]
        assert sample.captions == (f"caption of {name}",)
    assert np.array_equal(source.sizes(), [[16, 24]] * len(names))


def test_the_name_ends_at_the_first_dot_of_the_base_name(tmp_path):
    image = encoded()
    tar(
        tmp_path / "a.tar",
        [
            ("v1.5/0001.jpg", image),
            ("v1.5/0001.txt", b"one"),
            ("v1.5/0001.seg.png", b"no image of ours"),
            ("0002.JPEG", image),
            ("0002.Txt", b"two"),
            ("._0002.jpg", b"of macOS"),
            ("0003.webp", encoded(kind="WEBP")),
            ("0003.json", b'{"caption": "three"}'),
            ("0004.png", encoded(kind="PNG")),
            ("README", b"of no sample"),
        ],
    )
    found = samples(open_source(str(tmp_path)))
    assert {k: s.captions for k, s in found.items()} == {
        "a.tar: v1.5/0001": ("one",),
        "a.tar: 0002": ("two",),
        "a.tar: 0003": ("three",),
        "a.tar: 0004": (),
    }


def test_captions(tmp_path):
    image = encoded()
    beside = {
        "lines": [("txt", b"first\n\n second \r\nthird")],
        "bom": [("txt", "\ufeffa cat".encode())],
        "both": [("txt", b"of the text"), ("json", b'{"caption": "of the JSON"}')],
        "blank": [("txt", b" \n"), ("json", b'{"caption": "of the JSON"}')],
        "list": [("json", b'{"captions": ["one", "", "two"]}')],
        "null": [("json", b'{"caption": null, "text": "of text"}')],
        "none": [("json", b'{"width": 3}')],
    }
    written = [(f"{n}.jpg", image) for n in beside]
    written += [(f"{n}.{e}", c) for n, more in beside.items() for e, c in more]
    tar(tmp_path / "a.tar", written)
    found = {
        k.removeprefix("a.tar: "): s.captions
        for k, s in samples(open_source(str(tmp_path))).items()
    }
    assert found == {
        "lines": ("first", "second", "third"),
        "bom": ("a cat",),
        "both": ("of the text",),
        "blank": ("of the JSON",),
        "list": ("one", "two"),
        "null": ("of text",),
        "none": (),
    }


def test_members_that_lie_far_apart(tmp_path, monkeypatch):
    """They are read one by one; near ones in one go."""
    tar(tmp_path / "a.tar", [("1.jpg", encoded()), ("big.bin", b"x" * 2**20), ("1.txt", b"far")])
    source, read = open_source(str(tmp_path)), []
    true = source.reader.read
    monkeypatch.setattr(source.reader, "read", lambda *of: (read.append(of[2]), true(*of))[1])
    assert source[0].captions == ("far",)
    assert read == [len(encoded()), 3]


@pytest.mark.parametrize(
    "caption, message",
    [
        (("txt", b"x" * (LONGEST + 1)), "its caption has 65537 bytes, expected at most 65536"),
        (("txt", b"\xff\xfe\x00"), "its caption is no UTF-8"),
        (("json", b"{"), "its .json is no JSON"),
        (("json", b"[" * 99_999), "its .json is no JSON"),
        (("json", b"[1]"), "its .json is a list, expected an object"),
        (("json", b'{"caption": "a cat \\ud83d"}'), r"its caption holds '\\ud83d', half a letter"),
        (("json", b'{"caption": 3}'), "its caption is '3', expected text"),
        (("json", b'{"caption": "' + b"x" * LONGEST + b'x"}'), "has 65537 bytes"),
        (("json", b"{" + b" " * 2**20 + b"}"), "has 1048578 bytes, expected at most 1048576"),
    ],
)
def test_a_bad_caption_is_a_bad_sample(tmp_path, caption, message):
    tar(tmp_path / "a.tar", [("1.jpg", encoded()), (f"1.{caption[0]}", caption[1])])
    source = open_source(str(tmp_path))
    with pytest.raises(BadSample, match=f"^a.tar: 1: .*{message}"):
        source[0]


def refused(path, bad):
    """The message where none may be bad; opened where that many may be."""
    with pytest.raises(
        ConfigError, match=f"{bad} samples cannot be used, more than max_bad = 0"
    ) as e:
        open_source(str(path), max_bad=0)
    return str(e.value), open_source(str(path), max_bad=bad)


def test_a_damaged_header_costs_its_member_alone(tmp_path, capsys):
    path = tar(tmp_path / "a.tar", members(["1", "2", "3"]))
    at, next_one = place(path, "2.jpg"), place(path, "2.txt")
    with path.open("r+b") as file:
        file.seek(at + 124)  # its size
        file.write(b"77777777777")
    message, source = refused(tmp_path, 2)
    assert f"{path}: damaged from byte {at} up to byte {next_one}" in message
    assert f"{path}: 2: has no image" in message
    assert sorted(samples(source)) == ["a.tar: 1", "a.tar: 3"]
    assert "2 samples, 2 left out" in capsys.readouterr().err


def test_damage_to_the_end(tmp_path):
    path = tar(tmp_path / "a.tar", members(["1", "2", "3"]))
    at = place(path, "2.jpg")
    path.write_bytes(path.read_bytes()[:at] + b"\x07" * 5000)
    message, source = refused(tmp_path, 1)
    assert f"{path}: damaged from byte {at} to its end" in message
    assert list(samples(source)) == ["a.tar: 1"]


@pytest.mark.parametrize(
    "inside, lost", [("2.jpg", "2.jpg: is cut off"), ("2.txt", "2.txt: is cut off")]
)
def test_a_tar_that_was_cut_off(tmp_path, capsys, inside, lost):
    path = tar(tmp_path / "a.tar", members(["1", "2"]))
    os.truncate(path, place(path, inside) + 512 + 3)
    source = open_source(str(tmp_path), max_bad=1)
    said = capsys.readouterr().err
    assert lost in said and "no end mark" in said
    image_is_whole = inside == "2.txt"
    assert {k: s.captions for k, s in samples(source).items()} == {
        "a.tar: 1": ("caption of 1",),
    } | ({"a.tar: 2": ()} if image_is_whole else {})
    assert ("1 left out" in said) != image_is_whole


def test_cut_off_between_members(tmp_path, capsys):
    path = tar(tmp_path / "a.tar", members(["1", "2"]))
    os.truncate(path, place(path, "2.jpg"))
    assert len(open_source(str(tmp_path), max_bad=0)) == 1
    assert f"{path}: is cut off: it has no end mark" in capsys.readouterr().err


def test_samples_without_image_and_duplicates(tmp_path):
    first, second = encoded(1), encoded(2)
    path = tar(
        tmp_path / "a.tar",
        [
            ("1.jpg", first),
            ("1.txt", b"first"),
            ("2.txt", b"no image"),
            ("1.jpg", second),
            ("1.txt", b"second"),
            ("1.png", second),
            ("3.jpg", b""),
            ("3.txt", b"an empty image"),
        ],
    )
    message, source = refused(tmp_path, 4)
    assert f"{path}: 1.jpg: comes a second time; the first is used" in message
    problems = " ".join(source.index.parts[0].problems)
    for said in (
        "2: has no image",
        "1.png: comes a second time",
        "3.jpg: is empty",
        "1.txt: comes",
    ):
        assert f"{path}: {said}" in problems
    assert "3: has no image" not in problems  # it was told
    assert len(source) == 1 and source[0].image == first and source[0].captions == ("first",)


def test_a_second_image_lends_the_first_no_caption(tmp_path):
    """Keys that begin anew after an image: what follows is the second's."""
    first, second = encoded(1), encoded(2)
    tar(
        tmp_path / "a.tar",
        [
            ("0.png", first),
            ("0.json", b'{"caption": null}'),
            ("0.png", second),
            ("0.txt", b"the second image"),
            ("0.png", second),
            ("1.txt", b"a caption"),
            ("1.json", b'{"width": 3}'),
            ("1.png", first),
        ],
    )
    _, source = refused(tmp_path, 2)
    assert {key: (s.image, s.captions) for key, s in samples(source).items()} == {
        "a.tar: 0": (first, ()),
        "a.tar: 1": (first, ("a caption",)),
    }
    problems = " ".join(source.index.parts[0].problems)
    assert "0.txt: follows a second image of its name, and is not used" in problems


@pytest.mark.parametrize(
    "content, message",
    [(b"", "is empty"), (b"\x1f\x8b" + b"gz" * 999, "is no tar"), (b"PK" * 99, "is no tar")],
)
def test_no_tar(tmp_path, content, message):
    (tmp_path / "a.tar").write_bytes(content)
    with pytest.raises(ConfigError, match=f"found no image that can be used: .*a.tar: {message}"):
        open_source(str(tmp_path))


def test_a_second_tar_behind_the_first_is_told(tmp_path, capsys):
    a, b = tar(tmp_path / "a.tar", members(["1"])), tar(tmp_path / "b", members(["2"]))
    big = a.read_bytes() + b.read_bytes() + b"\0" * 2**20
    a.write_bytes(big)
    assert len(open_source(str(tmp_path))) == 1
    assert "goes on after its end mark" in capsys.readouterr().err


def test_agrees_with_tarfile_on_damage_of_any_byte(tmp_path):
    """Whatever byte of a header is another one: no error, and no sample that is not there."""
    path = tar(tmp_path / "a.tar", members(["1", "2"]))
    whole, headers = path.read_bytes(), [place(path, n) for n in ("1.jpg", "1.txt", "2.jpg")]
    draw = random.Random(0)
    for _ in range(60):
        at = draw.choice(headers) + draw.randrange(512)
        data = bytearray(whole)
        data[at] ^= 1 << draw.randrange(8)
        path.write_bytes(data)
        found = scan(look(str(path)))
        assert found.problems.left_out > 0 or found.problems.named
        assert len(found.columns["size"]) in (1, 2)


def test_changed_while_it_is_read(tmp_path):
    path = tar(tmp_path / "a.tar", members(["1", "2"]))
    source = open_source(str(tmp_path))
    copy = pickle.loads(pickle.dumps(source))
    assert source[0] == copy[0]
    tar(path, members(["1", "2", "3"]))
    for one in (source, copy, pickle.loads(pickle.dumps(source))):
        with pytest.raises(
            BadSample, match="^a.tar: 2: .*a.tar was written again since it was indexed"
        ):
            one[1]
    path.unlink()
    with pytest.raises(BadSample, match="a.tar: 2: .*cannot be read .No such file"):
        pickle.loads(pickle.dumps(source))[1]


def test_as_img2dataset_leaves_it(tmp_path):
    """Tars with tables and statistics beside them, and what it writes about an image."""
    about = {"caption": "a cat", "url": "http://…", "key": "000000000", "status": "success"}
    about |= {"width": 24, "height": 16, "original_width": 99, "original_height": 66, "exif": "{}"}
    for n in ("00000", "00001"):
        key = f"{n}0000"
        tar(
            tmp_path / f"{n}.tar",
            [
                (f"{key}.jpg", encoded()),
                (f"{key}.json", json.dumps(about).encode()),
                (f"{key}.txt", b"a cat"),
            ],
        )
        (tmp_path / f"{n}.parquet").write_bytes(b"PAR1 no images here")
        (tmp_path / f"{n}_stats.json").write_text("{}")
    source = open_source(str(tmp_path))
    assert [source.key(i) for i in range(2)] == ["00000.tar: 000000000", "00001.tar: 000010000"]
    assert source[1].captions == ("a cat",)


def test_a_size_beyond_octal(tmp_path):
    """Sizes are binary from 8 GiB on; a sparse file stands in for that much."""
    path = tmp_path / "a.tar"
    info = tarfile.TarInfo("1.bin")
    info.size = 9 * 2**30
    end = 512 + info.size
    for form, header in (("gnu", tarfile.GNU_FORMAT), ("pax", tarfile.PAX_FORMAT)):
        start = info.tobuf(header)
        rest = io.BytesIO()
        with tarfile.open(fileobj=rest, mode="w") as out:
            for name, content in members(["2"]):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                out.addfile(member, io.BytesIO(content))
        with path.open("wb") as file:
            file.write(start)
            file.seek(len(start) + info.size)
            file.write(rest.getvalue())
        source = open_source(str(path))
        assert source[0].captions == ("caption of 2",), form
        assert path.stat().st_size > end


@pytest.mark.parametrize("right_sum", [True, False])
def test_a_negative_size_does_not_turn_back(tmp_path, right_sum):
    path = tar(tmp_path / "a.tar", members(["1", "2"]))
    at, data = place(path, "1.txt"), bytearray(path.read_bytes())
    data[at + 124 : at + 136] = b"-0000002000\0"
    if right_sum:
        data[at + 148 : at + 156] = b" " * 8
        data[at + 148 : at + 156] = b"%06o\0 " % sum(data[at : at + 512])
    path.write_bytes(data)
    message, source = refused(tmp_path, 1)
    assert f"damaged from byte {at}" in message
    assert [source[i].captions for i in range(2)] == [(), ("caption of 2",)]
