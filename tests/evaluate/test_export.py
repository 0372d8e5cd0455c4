"""Images for official scorers: read as these read them, the same after one process was killed.

What the processes do is in functions of this file, which `together` starts in each of them.
"""

import io
import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from d2m_jax import weights
from d2m_jax.config import ConfigError, ModelConfig, PixelsConfig, WordsConfig
from d2m_jax.evaluate import export, layouts
from d2m_jax.evaluate.arguments import Export
from d2m_jax.grid import to_image
from d2m_jax.models.flux import initialise
from d2m_jax.sampling.noise import noise_of
from d2m_jax.sampling.pipeline import load_pipeline
from tests.evaluate import scorers
from tests.models import toy
from tests.test_hosts import assert_all_ended_well, together

MODEL = ModelConfig(
    transformer=replace(toy.DENSE, in_channels=48, context_in_dim=16, vec_in_dim=16),
    text=WordsConfig(dim=16, length=3, vocabulary=("red", "blue", "anchor", "earth")),
    image=PixelsConfig(16, 16, 4),
    sample_steps=2,
)
PROMPTS = ["red anchor", "blue earth", "blue anchor"]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    params = jax.tree.map(
        lambda a: a + 0.05 * jax.random.normal(jax.random.key(a.size), a.shape),
        initialise(MODEL.transformer, 0),
    )
    path = tmp_path_factory.mktemp("models") / "tiny"
    weights.save(path, MODEL, params)
    return path


def files_of(scorer: str, folder: Path) -> Path:
    """Prompt files as the scorer's repository has them."""
    folder.mkdir(exist_ok=True)
    if scorer == "geneval":
        lines = [json.dumps({"tag": "colors", "include": [], "prompt": p}) for p in PROMPTS]
        (folder / "evaluation_metadata.jsonl").write_text("\n".join(lines) + "\n")
        return folder / "evaluation_metadata.jsonl"
    if scorer == "dpg":
        for name, prompt in zip(("0", "10", "COCOval2014000000000283"), PROMPTS, strict=True):
            (folder / f"{name}.txt").write_text(prompt)
    elif scorer == "t2i-compbench":
        for category in layouts.CATEGORIES:  # as they are there: CRLF, none after the last
            (folder / f"{category}_val.txt").write_bytes("\r\n".join(PROMPTS).encode())
            (folder / f"{category}_train.txt").write_text("not this\n")
    elif scorer == "hpsv2":
        for style in layouts.STYLES:
            (folder / f"{style}.json").write_text(json.dumps(PROMPTS))
        (folder / "drawbench.json").write_text("[]")
    else:
        items = [{"id": f"0056{i}-00", "prompt": p} for i, p in enumerate(PROMPTS)]
        (folder / "benchmark-prompts.json").write_text(json.dumps(items))
        return folder / "benchmark-prompts.json"
    return folder


def read(scorer: str, images: Path, prompts: Path) -> scorers.Pairs:
    if scorer == "geneval":
        return scorers.geneval(images)
    if scorer == "dpg":
        return scorers.dpg(images, 16, {f.stem: f.read_text() for f in prompts.iterdir()})
    if scorer == "t2i-compbench":
        assert scorers.names(images) == sorted(layouts.CATEGORIES)
        return [p for c in layouts.CATEGORIES for p in scorers.t2i_compbench(images / c)]
    if scorer == "hpsv2":
        return scorers.hpsv2(images, prompts)
    return scorers.imagereward(images, "tiny", prompts)


def ask(scorer: str, model: Path, prompts: Path, output: Path, **options) -> Export:
    return Export(scorer=scorer, model=str(model), prompts=prompts, output=output, **options)


@pytest.mark.parametrize("scorer", layouts.SCORERS)
def test_scorers_find_every_image_with_its_prompt(scorer, model, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(export, "use_cores", lambda: None)  # JAX has its devices already
    prompts, output = files_of(scorer, tmp_path / "prompts"), tmp_path / "out"
    export.run(ask(scorer, model, prompts, output, seed=5))
    found = read(scorer, output / "images", prompts)

    each = {"geneval": 4, "dpg": 4, "t2i-compbench": 10, "hpsv2": 1, "imagereward": 10}[scorer]
    listed = [json.loads(line) for line in (output / "images.jsonl").read_text().splitlines()]
    numbers = [number for line in listed for number in line["images"]]
    assert numbers == list(range(len(found)))
    assert sorted(p for p, _ in found) == sorted(PROMPTS * each * (len(found) // each // 3))
    # Some images are those that a pipeline draws for these prompts from this noise.
    pipe = load_pipeline(model)
    of_number = {number: line for line in listed for number in line["images"]}
    some = np.unique([0, 1, each, len(found) - 2, len(found) - 1])
    captions = [of_number[number]["prompt"] for number in some.tolist()]
    expected = np.asarray(pipe(captions, latents=noise_of(5, some, 16, 48)))
    for number, image in zip(some.tolist(), expected, strict=True):
        line = of_number[number]
        file = output / "images" / line["file"]
        drawn = scorers.pixels(file)
        place = line["images"].index(number)
        row, column = divmod(place, 2)
        drawn = drawn[16 * row : 16 * row + 16, 16 * column : 16 * column + 16]
        if file.suffix == ".jpg":  # as HPSv2's own code saves: image.save("….jpg")
            jpeg = io.BytesIO()
            to_image(image).save(jpeg, format="JPEG")
            assert np.abs(drawn - scorers.pixels(jpeg).astype(int)).mean() < 1
        else:
            assert np.abs(drawn / 255 - image).max() < 0.51 / 255
    said = capsys.readouterr().err
    assert str(output / "images") in said and "{" not in said.split("print")[0]
    value = json.loads((output / "export.json").read_text())
    assert value["finished"] and value["made"]["seed"] == 5
    assert scorers.names(output) == ["export.json", "images", "images.jsonl"]


def content(folder: Path) -> dict[str, bytes]:
    files = [file for file in folder.rglob("*") if file.is_file()]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def make(model: str, prompts: str, output: str) -> None:
    asked = ask("geneval", Path(model), Path(prompts), Path(output), batch_size=2)
    export.run(asked)


def die(model: str, prompts: str, output: str) -> None:
    """With half of the third image written."""
    opened, done = export.new_file, []

    def open_or_die(path: Path):
        if path.suffix == ".png":
            done.append(path)
        if len(done) == 3:
            path.write_bytes(b"half")
            os.kill(os.getpid(), signal.SIGKILL)
        return opened(path)

    export.new_file = open_or_die
    make(model, prompts, output)


def test_killed_and_shared_out_it_ends_with_the_same(model, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "use_cores", lambda: None)
    prompts = str(files_of("geneval", tmp_path / "prompts"))
    both, alone = tmp_path / "both", tmp_path / "alone"
    (killed,) = together(die, str(model), prompts, str(both), processes=1)
    assert killed.code == -signal.SIGKILL
    partly = content(both / "images")
    assert len(partly) == 3 + 2 and b"half" not in partly.values()  # metadata, and two images
    assert not json.loads((both / "export.json").read_text())["finished"]
    assert_all_ended_well(together(make, str(model), prompts, str(both), processes=2))
    make(str(model), prompts, str(alone))
    assert content(both) == content(alone)
    # What is finished loads no model.
    monkeypatch.setattr(export, "load_pipeline", None)
    make(str(model), prompts, str(alone))


def test_another_export_is_refused(model, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "use_cores", lambda: None)
    prompts, output = files_of("geneval", tmp_path / "prompts"), tmp_path / "out"
    asked = ask("geneval", model, prompts, output, images_per_prompt=1)
    export.run(asked)
    with pytest.raises(ConfigError, match=r"export.json: seed = 0, this run's is 1; expected the"):
        export.run(replace(asked, seed=1))
    with pytest.raises(ConfigError, match=r"images.jsonl: made of other prompts"):
        export.run(replace(asked, images_per_prompt=2))
    other = tmp_path / "other"
    weights.save(other, MODEL, initialise(MODEL.transformer, 1))
    next((output / "images").rglob("*.png")).unlink()
    with pytest.raises(ConfigError, match=r"model.fingerprint = \w+, this run's is \w+; expected"):
        export.run(replace(asked, model=str(other)))
    # Where no model was found, nothing was made that could differ.
    asked = replace(asked, output=tmp_path / "none")
    with pytest.raises(ConfigError, match="no such file or folder"):
        export.run(replace(asked, model=str(tmp_path / "absent"), seed=1))
    export.run(asked)
    made = json.loads((asked.output / "export.json").read_text())
    assert made["made"]["seed"] == 0 and made["model"]["steps"] == 2 and made["finished"]
    with pytest.raises(ConfigError, match="not empty, and no export"):
        export.run(replace(asked, output=tmp_path))


@pytest.mark.parametrize(
    ("scorer", "damage", "options", "message"),
    [
        ("geneval", lambda p: p.write_text('{"tag": "a"}\n'), {}, "line 1: expected an object"),
        ("geneval", lambda p: p.write_text('{"tag": \n'), {}, "line 1: expected JSON"),
        ("geneval", lambda p: p.write_bytes(b"\xff"), {}, "byte 0 is not UTF-8"),
        ("geneval", lambda p: p.unlink(), {}, "no such file or folder, expected geneval's prompts"),
        ("dpg", lambda p: (p / "a.b.txt").write_text("red"), {}, "expected a name with one dot"),
        ("dpg", lambda p: (p / "0.txt").write_text(" "), {}, "expected a prompt, found nothing"),
        ("dpg", lambda p: None, {"images_per_prompt": 2}, "images_per_prompt = 2: dpg reads 4"),
        ("dpg", lambda p: None, {"height": 32}, "image size 32 × 16: expected a square"),
        ("t2i-compbench", lambda p: (p / "color_val.txt").unlink(), {}, "the prompts of color"),
        (
            *("t2i-compbench", lambda p: (p / "color_val.txt").write_text("red\nred_anchor"), {}),
            "color_val.txt, line 2: found '_'",
        ),
        (
            *("t2i-compbench", lambda p: (p / "color_val.txt").write_text("red " * 64), {}),
            "is too long for a name",
        ),
        ("t2i-compbench", lambda p: None, {"images_per_prompt": 2}, "3_in_1.py reads 10"),
        ("hpsv2", lambda p: (p / "photo.json").unlink(), {}, "expected the prompts of photo"),
        ("hpsv2", lambda p: (p / "photo.json").write_text("{}"), {}, "expected a list of prompts"),
        ("imagereward", lambda p: None, {"name": "a,b"}, "name = 'a,b': expected a folder's name"),
        ("imagereward", lambda p: p.write_text('[{"id": "1"}]'), {}, r"\[0\]: expected an object"),
        ("imagereward", lambda p: None, {"images_per_prompt": 0}, "images_per_prompt = 0"),
        ("hpsv2", lambda p: (p / "photo.json").write_text('["green"]'), {}, "green"),
        ("hpsv2", lambda p: None, {"width": 15}, "image size 16 × 15: expected multiples of 4"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_told_before_the_model_is_loaded(
    model, tmp_path, monkeypatch, scorer, damage, options, message
):
    monkeypatch.setattr(export, "use_cores", lambda: None)
    monkeypatch.setattr(export, "load_pipeline", None)
    prompts = files_of(scorer, tmp_path / "prompts")
    damage(prompts)
    with pytest.raises(ConfigError, match=message):
        export.run(ask(scorer, model, prompts, tmp_path / "out", **options))
    assert not (tmp_path / "out").exists()


def test_one_file_is_one_category_or_style(tmp_path):
    color = files_of("t2i-compbench", tmp_path / "t2i") / "color_val.txt"
    found = layouts.layout("t2i-compbench", color, 2).pictures
    assert [p.file for p in found][:3] == [
        "color/samples/red anchor_000000.png",
        "color/samples/red anchor_000001.png",
        "color/samples/blue earth_000002.png",
    ]
    anime = files_of("hpsv2", tmp_path / "hps") / "anime.json"
    found = layouts.layout("hpsv2", anime).pictures
    assert [p.file for p in found] == [f"anime/{i:05d}.jpg" for i in range(3)]


def test_a_fluxpipeline_of_diffusers(tmp_path, monkeypatch, capsys):
    """With T5, CLIP and an autoencoder; what is cut off is told once, not batch by batch."""
    pytest.importorskip("diffusers")
    from d2m_jax.evaluate import watch_run
    from d2m_jax.evaluate.arguments import Routing
    from tests.sampling.flux_oracle import tiny_pipeline

    for module in (export, watch_run):
        monkeypatch.setattr(module, "use_cores", lambda: None)
    tiny_pipeline().save_pretrained(tmp_path / "flux")
    prompts = files_of("dpg", tmp_path / "prompts")
    for file in prompts.iterdir():
        file.write_text("red anchor " * 20)
    asked = ask("dpg", tmp_path / "flux", prompts, tmp_path / "out", batch_size=1)
    capsys.readouterr()
    export.run(replace(asked, height=16, width=16, steps=1, max_sequence_length=12))
    said = capsys.readouterr().err
    assert said.count("is cut off") == 2 and "T5 reads 12" in said  # by CLIP and by T5
    names = dict.fromkeys([file.stem for file in prompts.iterdir()], "")
    assert len(scorers.dpg(tmp_path / "out" / "images", 16, names)) == 12

    (tmp_path / "prompts.txt").write_text("red anchor\nblue earth\n")
    watched = Routing(
        **{"model": str(tmp_path / "flux"), "output": tmp_path / "routing"},
        **{"prompts": tmp_path / "prompts.txt", "height": 16, "width": 16, "steps": 2},
        max_sequence_length=12,
    )
    found = watch_run.run(watched)
    assert list(found["change"]) == ["double 0", "double 1", "single 0", "single 1"]
