"""CLIP's judgement of images: how near to their prompts, how near a student's to its teacher's.

The model is any CLIPModel of transformers, in JAX. A score is 100 times the cosine of the features
of image and prompt (Hessel et al., arXiv 2104.08718, without its factor 2.5); the distance of two
images is 1 minus the cosine of their features.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float, Int
from PIL import Image

from d2m_jax import hosts
from d2m_jax.config import CLIPModelConfig, check
from d2m_jax.cores import use_cores
from d2m_jax.data.prompt_files import prompts_of
from d2m_jax.evaluate.arguments import Clip
from d2m_jax.evaluate.export import IMAGES, check_model, draw
from d2m_jax.evaluate.layouts import Layout, Picture, prompt_files
from d2m_jax.evaluate.scores import Estimate
from d2m_jax.models.clip_vision import model_of
from d2m_jax.progress import bar
from d2m_jax.sharding import batch_shards, local_mesh, put_batch, replicated
from d2m_jax.tokenizers import clip_tokenizer
from d2m_jax.weights.files.hub import check_folder_name
from d2m_jax.weights.torch_files import clip_folder
from d2m_jax.weights.torch_files.clip_folder import Preprocessor

BATCH = 16  # images that a device looks at in one go
MODEL, TEACHER = "model", "teacher"  # folders of OUTPUT


@dataclass(frozen=True)
class Result:
    """Means over prompts, each of which is a mean over its images."""

    images: int
    score: Estimate
    teacher: Estimate | None = None
    difference: Estimate | None = None  # of the two scores, prompt by prompt
    distance: Estimate | None = None  # of images that were drawn from the same noise

    def to_json(self) -> dict[str, Any]:
        """For programs."""
        found: dict[str, Any] = {"images": self.images}
        for name in ("score", "teacher", "difference", "distance"):
            value = getattr(self, name)
            if value is not None:
                found[name] = {"mean": value.mean, "confidence_95": [value.low, value.high]}
        return found

    def lines(self) -> list[str]:
        """For people."""
        told = [f"CLIP score of {self.images} images (100 × cosine; ± 95 % over prompts)"]
        told += [f"model       {_interval(self.score, 2)}"]
        if self.teacher and self.difference and self.distance:
            told += [f"teacher     {_interval(self.teacher, 2)}"]
            told += [f"difference  {_interval(self.difference, 2)}"]
            told += [f"distance    {_interval(self.distance, 4)}  (1 − cosine, same noise)"]
        return told


def run(asked: Clip) -> Result | None:
    """What `evaluate.py clip` does; the first process of many has the result."""
    prompts = prompts_of(asked.prompts, asked.column)
    each = asked.images_per_prompt
    check(each >= 1, f"--images_per_prompt {each}: expected at least 1")
    layout = Layout(list(prompt_files(prompts, each)), {}, "")
    check_folder_name(asked.output)
    clip_folder.config_of(asked.clip)
    clip_tokenizer(asked.clip)
    use_cores()
    models = {MODEL: (asked, asked.model)}
    if asked.teacher is not None:
        # What only a sparse model can be asked.
        plain = replace(asked, top_k=None, reuse=1, quantize=None)
        models[TEACHER] = plain, asked.teacher
    with hosts.joined(*asked.among.who):
        for options, path in models.values():
            check_model(options, path, layout.prompts)
        for name, (options, path) in models.items():
            draw(options, path, layout, asked.output / name, name)
        places = [asked.output / name / IMAGES for name in models]
        result = judge(asked.clip, layout.pictures, places, each)
        return result if hosts.first() else None


def judge(clip: Path, pictures: Sequence[Picture], places: Sequence[Path], each: int) -> Result:
    """Score the pictures, `each` of every prompt, that lie in the first of one or two folders, and
    compare with the second. All processes call it, each of which looks at its share."""
    mine = range(len(pictures))[jax.process_index() :: jax.process_count()]
    judged = Judge(clip)
    rows: list[list[float]] = []
    with bar(len(mine) * len(places), "CLIP", "images", "compiling …") as advance:
        for start in range(0, len(mine), judged.batch):
            part = mine[start : start + judged.batch]
            texts = judged.texts([pictures[i].prompt for i in part])
            seen = []
            for place in places:
                seen.append(judged.images([place / pictures[i].file for i in part]))
                advance(len(part))
            columns = [100 * (texts * images).sum(-1) for images in seen]
            if len(seen) == 2:
                columns.append(np.square(seen[0] - seen[1]).sum(-1) / 2)  # of unit vectors
            rows += np.stack([np.array(part), *columns], axis=1).tolist()
    every = np.array(sorted(itertools.chain(*hosts.gather(rows))))[:, 1:]
    by_prompt = every.reshape(-1, each, every.shape[1]).mean(1)
    if len(places) == 1:
        return Result(len(every), _estimate(by_prompt[:, 0]))
    score, teacher, distance = by_prompt.T
    parts = (score, teacher, score - teacher, distance)
    return Result(len(every), *map(_estimate, parts))


class Judge:
    """A CLIPModel's folder, loaded onto this process's devices; it computes in float32."""

    def __init__(self, folder: Path):
        self.mesh = local_mesh()
        _, self.preprocessor = clip_folder.config_of(folder)
        whole = replicated(self.mesh)
        self.config, self.params = clip_folder.load_clip(folder, lambda name, shape: whole)
        self.tokenizer = clip_tokenizer(folder)
        self.batch = BATCH * batch_shards(self.mesh)

    def texts(self, prompts: Sequence[str]) -> Float[np.ndarray, "n p"]:
        """Features of prompts, of which CLIP reads what fits its positions."""
        ids = self.tokenizer(
            list(prompts),
            padding="max_length",
            max_length=self.config.text.max_position_embeddings,
            truncation=True,
            return_tensors="np",
        ).input_ids
        return self._run(_texts, np.asarray(ids, np.int32))

    def images(self, files: Sequence[Path]) -> Float[np.ndarray, "n p"]:
        """Features of images in files."""
        pixels = [preprocess(Image.open(file), self.preprocessor) for file in files]
        return self._run(_images, np.stack(pixels))

    def _run(self, program: Any, inputs: np.ndarray) -> np.ndarray:
        """In batches of one size: the last is filled up."""
        filled = inputs[np.arange(self.batch) % len(inputs)]
        with jax.set_mesh(self.mesh), jax.default_matmul_precision("highest"):
            found = program(self.config, self.params, put_batch(self.mesh, filled))
        return np.asarray(found)[: len(inputs)]


@partial(jax.jit, static_argnums=0)
def _texts(config: CLIPModelConfig, params: dict, ids: Int[Array, "b l"]):
    return model_of(config, params).texts(ids)


@partial(jax.jit, static_argnums=0)
def _images(config: CLIPModelConfig, params: dict, images: Float[Array, "b h w 3"]):
    return model_of(config, params).images(images)


def preprocess(image: Image.Image, how: Preprocessor) -> Float[np.ndarray, "h w 3"]:
    """As CLIPImageProcessor does it with PIL: the shorter side to a length, bicubic, the middle,
    normalised."""
    image = image.convert("RGB")
    width, height = image.size
    edge, short = how.shortest_edge, min(width, height)
    size = edge * width // short, edge * height // short
    resized = image.resize(size, Image.Resampling.BICUBIC)
    left, top = ((side - how.crop) // 2 for side in resized.size)
    cropped = resized.crop((left, top, left + how.crop, top + how.crop))
    pixels = np.asarray(cropped, np.float32) / 255
    return (pixels - np.array(how.mean, np.float32)) / np.array(how.std, np.float32)


def _estimate(values: Float[np.ndarray, " n"]) -> Estimate:
    spread = values.std(ddof=1) if len(values) > 1 else np.nan
    return Estimate(float(values.mean()), float(spread / np.sqrt(len(values))))


def _interval(estimate: Estimate, digits: int) -> str:
    return f"{estimate.mean:.{digits}f} ± {1.96 * estimate.standard_error:.{digits}f}"
