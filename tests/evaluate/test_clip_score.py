"""CLIP's scores: images prepared as transformers prepares them, features and means by its model."""

import json

import numpy as np
import pytest
from PIL import Image

from d2m_jax.config import ConfigError
from d2m_jax.evaluate import clip_score, export
from d2m_jax.evaluate.arguments import Clip
from d2m_jax.weights.torch_files.clip_folder import Preprocessor
from tests.evaluate.test_export import MODEL, PROMPTS, model  # noqa: F401 (a fixture)
from tests.models.test_clip_vision import END, of_transformers
from tests.seed import generator

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")


def picture(height, width):
    """Smooth, with some noise: as images are."""
    rng = generator(height * width)
    coarse = Image.fromarray(rng.integers(0, 256, (5, 4, 3)).astype(np.uint8))
    image = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(int)
    return np.clip(image + rng.integers(-9, 9, image.shape), 0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A CLIPModel's folder, as transformers saves it."""
    path = tmp_path_factory.mktemp("clip")
    of_transformers().save_pretrained(path)
    letters = "abcdefghijklmnopqrstu"
    tokens = [*letters, *(f"{c}</w>" for c in letters), "<|startoftext|>"]
    vocabulary = {token: i for i, token in enumerate(tokens)} | {"<|endoftext|>": END}
    transformers.CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=12).save_pretrained(
        path
    )
    size = {"shortest_edge": 30}
    transformers.CLIPImageProcessorPil(size=size, crop_size=24).save_pretrained(path)
    return path


@pytest.mark.parametrize("shape", [(64, 64), (40, 93), (93, 40), (30, 31), (17, 20)])
def test_images_are_prepared_as_by_transformers(folder, shape):
    image = picture(*shape)
    theirs = transformers.CLIPImageProcessorPil.from_pretrained(folder)
    expected = theirs(images=[Image.fromarray(image)], return_tensors="np").pixel_values[0]
    found = clip_score.preprocess(Image.fromarray(image), Preprocessor(30, 24))
    np.testing.assert_allclose(found.transpose(2, 0, 1), expected, atol=1e-5)


def test_scores_and_distance_are_those_of_transformers(folder, tmp_path):
    """Three prompts, two images each, of two models; transformers computes all features."""
    pictures, count = list(clip_score.prompt_files(PROMPTS, 2)), 6
    for name in ("model", "teacher"):
        (tmp_path / name).mkdir()
    for i, one in enumerate(pictures):
        Image.fromarray(picture(48 + i, 50)).save(tmp_path / "model" / one.file)
        Image.fromarray(picture(48 + i, 60)).save(tmp_path / "teacher" / one.file)

    theirs = of_transformers()
    processor = transformers.CLIPImageProcessorPil.from_pretrained(folder)
    tokenizer = transformers.CLIPTokenizer.from_pretrained(folder)

    def features(name):
        images = [Image.open(tmp_path / name / one.file) for one in pictures]
        ids = tokenizer([one.prompt for one in pictures], padding="max_length", truncation=True,
                        max_length=12, return_tensors="pt").input_ids  # fmt: skip
        pixels = processor(images=images, return_tensors="pt").pixel_values
        with torch.no_grad():
            out = theirs(input_ids=ids, pixel_values=pixels)
        return out.text_embeds.numpy(), out.image_embeds.numpy()

    texts, mine = features("model")
    _, other = features("teacher")
    score, teacher = (100 * (texts * f).sum(-1).reshape(3, 2).mean(1) for f in (mine, other))
    distance = (1 - (mine * other).sum(-1)).reshape(3, 2).mean(1)
    result = clip_score.judge(folder, pictures, [tmp_path / "model", tmp_path / "teacher"], 2)
    assert result.images == count and distance.min() > 1e-4
    for found, values in [
        (result.score, score),
        (result.teacher, teacher),
        (result.difference, score - teacher),
        (result.distance, distance),
    ]:
        assert found.mean == pytest.approx(values.mean(), abs=2e-4)
        error = values.std(ddof=1) / 3**0.5
        assert found.standard_error == pytest.approx(error, abs=2e-4)
    alone = clip_score.judge(folder, pictures, [tmp_path / "model"], 2)
    assert alone.score == result.score and alone.distance is None


def test_a_model_and_its_teacher(folder, model, tmp_path, monkeypatch):  # noqa: F811
    """A model is no distance from itself; what is finished is not drawn again."""
    for module in (clip_score, export):
        monkeypatch.setattr(module, "use_cores", lambda: None)
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    asked = Clip(
        model=str(model),
        teacher=str(model),
        clip=folder,
        prompts=tmp_path / "prompts.txt",
        output=tmp_path / "out",
    )
    result = clip_score.run(asked)
    assert result.images == 3 and result.distance.mean == pytest.approx(0, abs=1e-6)
    assert result.difference.mean == pytest.approx(0, abs=1e-5)
    assert "distance    0.0000 ± 0.0000" in "\n".join(result.lines())
    assert json.loads(json.dumps(result.to_json()))["teacher"]["mean"] == result.teacher.mean
    with Image.open(tmp_path / "out" / "model" / "images" / "00000002.png") as image:
        assert image.size == (MODEL.image.width, MODEL.image.height)
    monkeypatch.setattr(export, "load_pipeline", None)
    assert clip_score.run(asked) == result

    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="empty/config.json: no such file, expected it in a CLIP"):
        clip_score.run(Clip(**(vars(asked) | {"clip": tmp_path / "empty"})))
