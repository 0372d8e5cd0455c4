"""Captioned images as data: batches, captions, what is held out, what is bad."""

import io
import itertools
import tarfile

import numpy as np
import pytest
from PIL import Image

from d2m_jax.config import ConfigError, ImagesConfig, ModelConfig, PixelsConfig, WordsConfig
from d2m_jax.data import batches, images
from d2m_jax.data.batches import Bad
from d2m_jax.data.images import Images
from d2m_jax.data.source import open_data
from d2m_jax.data.sources.any_source import BadSample
from d2m_jax.models.words import Words

CANVAS = PixelsConfig(32, 32, 4)


class Captions:
    """A tokenizer that leaves captions as they are."""

    def ids(self, captions):
        return np.array(captions)


def picture(number, height, width):
    """One that tells its number by its colour."""
    colour = (number % 16 * 16, number // 16 * 16, 128)
    return Image.new("RGB", (width, height), colour)


def number_of(pixels):
    red, green = (round(float(c) / 16) for c in pixels[16, 16, :2])
    return red + 16 * green


@pytest.fixture
def folder(tmp_path):
    """Forty images: wide, tall and square; image i is called i in its caption."""
    place = tmp_path / "pictures"
    place.mkdir()
    for i in range(40):
        picture(i, *((40, 60), (60, 40), (50, 50))[i % 3]).save(place / f"{i:03}.png")
        (place / f"{i:03}.txt").write_text(f"image {i}\npicture {i}\n")
    return place


def opened(folder, **fields):
    fields = {"resolutions": (32,), "aspect_ratio": 1.5, "validation": 4} | fields
    return Images(ImagesConfig(sources={str(folder): 1.0}, **fields), CANVAS)


def taken(data, count, size=6, **options):
    return list(itertools.islice(data.batches(Captions(), size, **options), count))


def test_every_image_trains_once_a_pass_but_those_held_out(folder):
    data = opened(folder)
    assert set(data.sizes) == {(28, 36), (36, 28), (32, 32)} and not data.encoded
    found = taken(data, 6)
    assert {batch["image"].shape for batch in found} == {(6, h, w, 3) for h, w in data.sizes}
    seen = [number_of(image) for batch in found for image in batch["image"]]
    for batch in found:
        for image, caption in zip(batch["image"], batch["text"], strict=True):
            assert caption in {f"image {number_of(image)}", f"picture {number_of(image)}"}
    validation = taken(data, 4, split="validation")
    held = {number_of(image) for batch in validation for image in batch["image"]}
    assert len(held) == 4 and held.isdisjoint(seen) and len(set(seen)) == len(seen)
    assert {caption.split()[0] for batch in validation for caption in batch["text"]} == {"image"}
    assert {p.caption for p in data.prompts(9)} == {f"image {i}" for i in held}


def test_images_that_are_enlarged_are_counted(folder, capfd):
    opened(folder, resolutions=(64, 32))
    assert "are enlarged" not in capfd.readouterr().err
    opened(folder, resolutions=(64,))
    said = "\n40 of them are smaller than the smallest of ImagesConfig.resolutions = (64,)"
    assert said in capfd.readouterr().err


def test_the_same_from_any_state_and_in_parts(folder):
    data = opened(folder, caption_dropout=0.3)
    whole = taken(data, 8, seed=3)
    stream = data.batches(Captions(), 6, seed=3)
    for _ in range(3):
        next(stream)
    state = stream.get_state()
    again = opened(folder, caption_dropout=0.3).batches(Captions(), 6, seed=3)
    again.set_state(state)
    for expected in whole[3:]:
        found = next(again)
        np.testing.assert_array_equal(found["image"], expected["image"])
        np.testing.assert_array_equal(found["text"], expected["text"])
    parts = [taken(data, 8, seed=3, rows=rows) for rows in (slice(0, 2), slice(2, 6))]
    for expected, *mine in zip(whole, *parts, strict=True):
        for name in ("image", "text"):
            joined = np.concatenate([part[name] for part in mine])
            np.testing.assert_array_equal(joined, expected[name])
    other = taken(data, 8, seed=4)
    assert any(a["image"].shape != b["image"].shape or (a["image"] != b["image"]).any()
               for a, b in zip(whole, other, strict=True))  # fmt: skip


def test_other_data_than_those_of_the_last_start_are_told(folder, capsys):
    stream = opened(folder).batches(Captions(), 6)
    next(stream)
    state = stream.get_state()
    opened(folder).batches(Captions(), 6).set_state(state)
    opened(folder).batches(Captions(), 6).set_state(state["position"])  # of an older checkpoint
    assert "the data are not those of the last start" not in capsys.readouterr().err
    picture(40, 40, 60).save(folder / "040.png")
    (folder / "040.txt").write_text("image 40")
    again = opened(folder).batches(Captions(), 6)
    again.set_state(state)
    assert "the data are not those of the last start" in capsys.readouterr().err
    assert next(again)["image"].shape[0] == 6


def test_captions(folder):
    data = opened(folder, template="a drawing of {caption}", caption_dropout=0.5)
    captions = [c for batch in taken(data, 40) for c in batch["text"]]
    empty = captions.count("") / len(captions)
    assert 0.38 < empty < 0.62
    firsts = [c.split()[3] for c in captions if c]
    assert all(c.startswith("a drawing of ") for c in captions if c)
    assert 0.35 < firsts.count("image") / len(firsts) < 0.65
    assert set(data.vocabulary()) == {
        "a",
        "drawing",
        "of",
        "image",
        "picture",
        *map(str, range(40)),
    }


def test_words_of_a_vocabulary(folder, monkeypatch):
    (folder / "000.txt").write_text("A Red\tapple\nred APPLE\n")
    data = opened(folder)
    words = data.vocabulary()
    assert {"a", "red", "apple"} < set(words) and all(word == word.lower() for word in words)
    tokenizer = Words(WordsConfig(dim=8, length=3, vocabulary=words))
    assert (tokenizer.ids(["A Red apple"]) > 0).all()
    monkeypatch.setattr(images, "MOST_WORDS", 20)
    with pytest.raises(ConfigError, match="found more than 20 words in captions"):
        data.vocabulary()


def test_prompts_of_a_file(folder, tmp_path):
    (tmp_path / "prompts.txt").write_text("one\ntwo\nthree\n")
    data = opened(folder, prompts=str(tmp_path / "prompts.txt"))
    assert [p.caption for p in data.prompts(2)] == ["one", "two"] and data.prompts(1)[0].category
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "four"}\n')
    found = opened(folder, prompts=str(tmp_path / "prompts.jsonl")).prompts(2)
    assert [prompt.caption for prompt in found] == ["four"]
    with pytest.raises(ConfigError, match="no such file"):
        opened(folder, prompts=str(tmp_path / "none.txt"))


def test_sources_are_mixed_by_weight(folder, tmp_path):
    with tarfile.open(tmp_path / "00000.tar", "w") as tar:
        for i in range(40, 60):
            file = io.BytesIO()
            picture(i, 50, 50).save(file, "PNG")
            for name, content in ((f"{i}.png", file.getvalue()), (f"{i}.txt", f"tar {i}".encode())):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    config = ImagesConfig(
        sources={str(folder): 1.0, str(tmp_path / "00000.tar"): 3.0}, resolutions=(32,),
        aspect_ratio=1.0, validation=0,
    )  # fmt: skip
    data = open_data(config, ModelConfig(image=CANVAS))
    seen = [number_of(i) for batch in taken(data, 20, 10) for i in batch["image"]]  # two passes
    counts = np.bincount(seen, minlength=60)
    assert set(counts[:40]) == {2} and set(counts[40:]) == {6}
    with pytest.raises(ConfigError, match=r"validation = 0: expected at least 1"):
        data.batches(Captions(), 4, split="validation")


@pytest.fixture
def spoilt(folder):
    """Of the square ones (every third) two are damaged and one has no caption."""
    (folder / "002.png").write_bytes((folder / "002.png").read_bytes()[:60])
    noise = np.random.default_rng(0).integers(0, 256, (50, 50, 3)).astype(np.uint8)
    Image.fromarray(noise).save(folder / "005.jpg")
    (folder / "005.png").unlink()
    (folder / "005.jpg").write_bytes((folder / "005.jpg").read_bytes()[:1500])
    return folder


def test_another_of_its_size_takes_the_place_of_a_bad_one(spoilt, capsys):
    data = opened(spoilt, validation=1, max_bad=2)
    found = taken(data, 14)
    assert all(len(batch["image"]) == 6 for batch in found)
    numbers = {number_of(i) for batch in found for i in batch["image"]}
    assert 5 not in numbers and len(numbers) >= 36
    told = capsys.readouterr().err
    assert told.count("left out: ") == 2 - (told.count("002") == 0) and "005.jpg: no image" in told
    taken(data, 14, seed=1)  # other batches of the same data: nothing is told twice
    assert "005.jpg" not in capsys.readouterr().err
    again = [b["image"] for b in taken(opened(spoilt, validation=1, max_bad=2), 14)]
    for batch, expected in zip(found, again, strict=True):
        np.testing.assert_array_equal(batch["image"], expected)


@pytest.fixture
def alone(folder):
    """The only image of its size is damaged."""
    noise = np.random.default_rng(0).integers(0, 256, (40, 160, 3)).astype(np.uint8)
    Image.fromarray(noise).save(folder / "wide.png")
    (folder / "wide.png").write_bytes((folder / "wide.png").read_bytes()[:9000])
    (folder / "wide.txt").write_text("alone")
    return folder


def test_another_size_takes_the_place_of_one_without_a_sample_that_can_be_used(alone):
    data = opened(alone, aspect_ratio=4.0, validation=1, max_bad=1)
    assert (16, 64) in data.sizes
    found, again = taken(data, 60, size=2), opened(alone, aspect_ratio=4.0, validation=1, max_bad=1)
    assert all(batch["image"].shape != (2, 16, 64, 3) for batch in found) and len(data.bad) == 1
    for batch, expected in zip(taken(again, 60, size=2), found, strict=True):
        np.testing.assert_array_equal(batch["image"], expected["image"])
        assert batch["text"].tolist() == expected["text"].tolist()


@pytest.mark.parametrize("processes", [1, 2])
def test_a_size_without_a_sample_that_can_be_used_is_named(alone, monkeypatch, processes):
    """Where processes could not agree on another size, and where there is none."""
    if processes == 1:
        for file in alone.glob("0*.png"):
            file.write_bytes(file.read_bytes()[:60])
    data = opened(alone, aspect_ratio=4.0, validation=1, max_bad=50)
    monkeypatch.setattr(batches.hosts, "count", lambda: processes)
    message = "^wide.png: no image .*; of 1 samples of 16 × 64 pixels 1 were tried, and none can"
    if processes == 1:
        message = "png: no image .* samples of .* pixels .* were tried, and none can be used; expec"
    with pytest.raises(ConfigError, match=message):
        taken(data, 60, size=2)


def test_too_many_bad_ones_stop_the_training(spoilt):
    with pytest.raises(ConfigError, match=r"005.jpg: no image .*ImagesConfig.max_bad = 0"):
        taken(opened(spoilt, validation=1, max_bad=0), 14)


def test_worker_processes_give_the_same(folder):
    expected = taken(opened(folder), 3)
    found = taken(opened(folder, workers=1), 3)
    for one, other in zip(expected, found, strict=True):
        np.testing.assert_array_equal(one["image"], other["image"])


def test_what_cannot_be_is_told_at_once(folder, tmp_path):
    with pytest.raises(
        ConfigError, match="found 40 images, expected more than Images.* = 40, which"
    ):
        opened(folder, validation=40)
    with pytest.raises(ConfigError, match="resolutions: found 30, expected multiples of 4"):
        opened(folder, resolutions=(30,))
    with pytest.raises(ConfigError, match=str(tmp_path / "none")):
        opened(tmp_path / "none")


def test_data_smaller_than_a_batch(folder):
    for file in folder.iterdir():
        if int(file.stem) > 4:
            file.unlink()
    data = opened(folder, validation=1, aspect_ratio=1.0)
    (batch,) = taken(data, 1, 16)
    assert np.bincount([number_of(i) for i in batch["image"]]).max() == 4
    assert len({number_of(i) for i in batch["image"]}) == 4


def test_threads_that_read_ahead_change_no_message():
    bad = Bad(most=1, where="ImagesConfig.max_bad")
    bad.add(BadSample("a"))
    for key in ("b", "c", "b"):
        with pytest.raises(
            ConfigError, match=f"^{key}; 2 samples cannot be used, expected at most"
        ):
            bad.add(BadSample(key))
    assert len(bad) == 2
