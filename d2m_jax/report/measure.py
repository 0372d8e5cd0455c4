"""What a model is worth: scores, samples and errors, on disk as soon as they are known."""

import base64
import io
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, UInt8
from PIL import Image

from d2m_jax.config import ConfigError, MeshConfig, ModelConfig, to_json
from d2m_jax.data.protocol import Data
from d2m_jax.data.source import open_data
from d2m_jax.evaluate.benchmark import judge
from d2m_jax.evaluate.noisy import (
    BATCH,
    SPLITS,
    Inputs,
    Program,
    mean_square,
    noisy_batches,
    velocities,
)
from d2m_jax.evaluate.scores import Score, Scores
from d2m_jax.report.rows import Row, Run
from d2m_jax.sampling.encoders import Encoders
from d2m_jax.sampling.grid import to_image
from d2m_jax.sampling.pipeline import Pipeline
from d2m_jax.sharding import check_mesh, make_mesh, parameter_sharding
from d2m_jax.weights import model_directory
from d2m_jax.weights.output import new_file

SAMPLES = 12  # images that are kept: two of every category


@dataclass(frozen=True)
class Measured:
    """Of one model, by pairs of glyph and colour ("seen" in training and "held_out" of it)."""

    scores: Scores
    errors: dict[str, float]  # distillation error; 0 is the teacher's own
    samples: UInt8[np.ndarray, "n h w 3"]  # of the first prompts of seen pairs


class Bench:
    """Prompts, noise and noisy examples that all models of a run meet, and the teacher's answers.

    Results lie in `folder`, one file each, with what they were measured from.
    """

    def __init__(self, run: Run, folder: Path, versions: Mapping[str, str]):
        self.run, self.folder, self.versions = run, folder, dict(versions)
        self.mesh = _mesh(run)
        self._place = partial(parameter_sharding, self.mesh)
        # Of every model directory that is asked for: config, shapes, fingerprint.
        self._stored = cache(partial(model_directory.stored, sharding=self._place))
        self._loaded: tuple[Path, dict] | None = None

    @cached_property
    def encoders(self) -> Encoders:
        """What all models of a run share."""
        return Encoders(self.run.teacher.config, mesh=self.mesh)

    @cached_property
    def data(self) -> Data:
        """What all models of a run are asked."""
        return open_data(self.run.config.data, self.run.teacher.config)

    @cached_property
    def inputs(self) -> dict[str, list[Inputs]]:
        """Noisy examples by pairs."""
        made = partial(noisy_batches, self.run.config, self.encoders, mesh=self.mesh)
        return {pairs: made(pairs) for pairs in SPLITS}

    @cached_property
    def targets(self) -> dict[str, list[Float[np.ndarray, "b n c"]]]:
        """The teacher's velocities there."""
        program, params = self.program(self.run.teacher), self.params(self.run.teacher)
        return {pairs: velocities(program, params, found) for pairs, found in self.inputs.items()}

    def program(self, row: Row, config: ModelConfig | None = None) -> Program:
        """A row's forward (of another config, with another top_k), in the type that trained."""
        stage = next(iter(self.run.config.stages.values()))
        return Program(config or row.config, stage.dtype)

    def shapes(self, row: Row) -> dict:
        """Of a row's parameters, with their places."""
        return self._stored(row.path)[1]

    def params(self, row: Row) -> dict:
        """A row's parameters, cut over the mesh, as stored. One model is kept at a time: the one
        that was asked for last."""
        if self._loaded is None or self._loaded[0] != row.path:
            self._loaded = None  # before the next one comes
            self._loaded = row.path, model_directory.load(row.path, None, self._place)[1]
        return self._loaded[1]

    def measure(
        self,
        name: str,
        row: Row,
        prompts: Mapping[str, int],
        config: ModelConfig | None = None,
    ) -> Measured:
        """Measure a row (with another config) on so many prompts by pairs, unless `name`.json has
        just that."""
        config = config or row.config
        key = {
            "model": self._stored(row.path)[2],
            "config": to_json(config),
            "teacher": self._stored(self.run.teacher.path)[2],
            "data": to_json(self.run.config.data),
            "seed": self.run.config.seed,
            "prompts": dict(prompts),
            "held_out_batches": self.run.config.held_out_batches,
            "versions": self.versions,
        }
        file = self.folder / f"{name}.json"
        value = cached(file, key, lambda: self._measure(row, config, prompts))
        return self._read(value, prompts)

    def _measure(self, row: Row, config: ModelConfig, prompts: Mapping[str, int]) -> dict[str, Any]:
        targets = self.targets  # of another model, hence first
        params, program = self.params(row), self.program(row, config)
        pipe = Pipeline(config, params, encoders=self.encoders, mesh=self.mesh)
        value = {}
        for pairs, count in prompts.items():
            asked = self.data.prompts(count, pairs == "held_out")
            images = pipe([prompt.caption for prompt in asked], seed=self.run.config.seed)
            judged = judge(self.data, images, asked)
            answers = velocities(program, params, self.inputs[pairs])
            value[pairs] = {
                "correct": _bits(judged.correct),
                "floor": _bits(judged.floor),
                "error": mean_square(answers, targets[pairs]),
            }
            if pairs == "seen":
                value["samples"] = [png(to_image(image)) for image in images[:SAMPLES]]
        return value

    def _read(self, value: dict, prompts: Mapping[str, int]) -> Measured:
        scores = {
            pairs: Score(
                tuple(self.data.prompts(count, pairs == "held_out")),
                *(np.array(list(value[pairs][judged])) == "1" for judged in ("correct", "floor")),
            )
            for pairs, count in prompts.items()
        }
        files = [io.BytesIO(base64.b64decode(text)) for text in value["samples"]]
        samples = np.stack([np.asarray(Image.open(file)) for file in files])
        return Measured(scores, {pairs: value[pairs]["error"] for pairs in prompts}, samples)


def _mesh(run: Run) -> Mesh:
    """The run's mesh over devices of this process alone, or all of fsdp where it does not fit
    them; as many devices as cut a batch of examples evenly."""
    count = 2 ** min(int(math.log2(jax.local_device_count())), int(math.log2(BATCH)))
    devices = jax.local_devices()[:count]
    try:
        mesh = make_mesh(run.config.mesh, devices)
        for row in run.rows:
            check_mesh(mesh, row.config.transformer)
    except ConfigError:
        return make_mesh(MeshConfig(data=1, fsdp=-1), devices)
    return mesh


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
    with new_file(file) as new:
        new.write_bytes(content)


def png(image: Image.Image) -> str:
    """A picture as base64 text."""
    content = io.BytesIO()
    image.save(content, format="PNG")
    return base64.b64encode(content.getvalue()).decode()


def _bits(values: np.ndarray) -> str:
    return "".join("01"[int(value)] for value in values)
