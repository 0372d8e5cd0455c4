"""What a model is worth: scores, samples and held-out errors, on disk as soon as they are known."""

import base64
import io
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from d2m_jax.config import ModelConfig, to_json
from d2m_jax.data.protocol import Data
from d2m_jax.data.source import open_data
from d2m_jax.evaluate.benchmark import judge
from d2m_jax.evaluate.held_out import SPLITS, Inputs, noisy_batches, velocities
from d2m_jax.evaluate.scores import Score, Scores
from d2m_jax.report.rows import Run
from d2m_jax.sampling.encoders import Encoders
from d2m_jax.sampling.grid import to_image
from d2m_jax.sampling.pipeline import Pipeline
from d2m_jax.weights.named_arrays import fingerprint

SAMPLES = 12  # images that are kept: two of every category


@dataclass(frozen=True)
class Measured:
    """Of one model, by pairs of glyph and colour ("seen" in training and "held_out" of it)."""

    scores: Scores
    errors: dict[str, float]  # held-out distillation error; 0 is the teacher's own
    samples: UInt8[np.ndarray, "n h w 3"]  # of the first prompts of seen pairs


class Bench:
    """Prompts, noise and noisy examples that all models of a run meet, and the teacher's answers.

    Results lie in `folder`, one file each, with what they were measured from.
    """

    def __init__(self, run: Run, folder: Path, versions: Mapping[str, str]):
        self.run, self.folder, self.versions = run, folder, dict(versions)

    @cached_property
    def encoders(self) -> Encoders:
        """What all models of a run share."""
        return Encoders(self.run.teacher.config)

    @cached_property
    def inputs(self) -> dict[str, list[Inputs]]:
        """Noisy examples by pairs."""
        return {pairs: noisy_batches(self.run.config, self.encoders, pairs) for pairs in SPLITS}

    @cached_property
    def targets(self) -> dict[str, Float[np.ndarray, "b n c"]]:
        """The teacher's velocities there."""
        teacher = self.run.teacher
        return {
            pairs: velocities(teacher.config, teacher.params, batches)
            for pairs, batches in self.inputs.items()
        }

    @cached_property
    def teacher(self) -> str:
        """The fingerprint of the teacher."""
        return fingerprint(self.run.teacher.params)

    def measure(
        self, name: str, config: ModelConfig, params: dict, prompts: Mapping[str, int]
    ) -> Measured:
        """Measure a model on so many prompts by pairs, unless `name`.json has just that."""
        key = {
            "model": fingerprint(params),
            "config": to_json(config),
            "teacher": self.teacher,
            "data": to_json(self.run.config.data),
            "seed": self.run.config.seed,
            "prompts": dict(prompts),
            "held_out_batches": self.run.config.held_out_batches,
            "versions": self.versions,
        }
        file = self.folder / f"{name}.json"
        value = cached(file, key, lambda: self._measure(config, params, prompts))
        return self._read(value, config, prompts)

    def _measure(
        self, config: ModelConfig, params: dict, prompts: Mapping[str, int]
    ) -> dict[str, Any]:
        pipe, value = Pipeline(config, params, encoders=self.encoders), {}
        data = self._data(config)
        for pairs, count in prompts.items():
            asked = data.prompts(count, pairs == "held_out")
            images = pipe([prompt.caption for prompt in asked], seed=self.run.config.seed)
            judged = judge(data, images, asked)
            answers = velocities(config, params, self.inputs[pairs])
            value[pairs] = {
                "correct": _bits(judged.correct),
                "floor": _bits(judged.floor),
                "error": float(np.square(answers - self.targets[pairs], dtype=np.float64).mean()),
            }
            if pairs == "seen":
                value["samples"] = [png(to_image(image)) for image in images[:SAMPLES]]
        return value

    def _read(self, value: dict, config: ModelConfig, prompts: Mapping[str, int]) -> Measured:
        scores = {
            pairs: Score(
                tuple(self._data(config).prompts(count, pairs == "held_out")),
                *(np.array(list(value[pairs][judged])) == "1" for judged in ("correct", "floor")),
            )
            for pairs, count in prompts.items()
        }
        files = [io.BytesIO(base64.b64decode(text)) for text in value["samples"]]
        samples = np.stack([np.asarray(Image.open(file)) for file in files])
        return Measured(scores, {pairs: value[pairs]["error"] for pairs in prompts}, samples)

    def _data(self, config: ModelConfig) -> Data:
        return open_data(self.run.config.data, config.image)


def cached(file: Path, key: Any, compute: Callable[[], Any]) -> Any:
    """The value in `file` if it was computed from `key`, else compute and write it; all JSON."""
    key = json.loads(json.dumps(key))
    if file.exists():
        try:
            found = json.loads(file.read_text())
            if found["key"] == key:
                return found["value"]
        except (ValueError, TypeError, KeyError):
            pass  # of no use: it is computed anew
    value = compute()
    write_whole(file, json.dumps({"key": key, "value": value}).encode())
    return value


def write_whole(file: Path, content: bytes) -> None:
    """Write a file that appears whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    new = file.with_name(f".{file.name}.new")
    new.write_bytes(content)
    new.replace(file)


def png(image: Image.Image) -> str:
    """A picture as base64 text."""
    content = io.BytesIO()
    image.save(content, format="PNG")
    return base64.b64encode(content.getvalue()).decode()


def _bits(values: np.ndarray) -> str:
    return "".join("01"[int(value)] for value in values)
