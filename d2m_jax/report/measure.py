"""What a model is worth: scores, samples and errors, on disk as soon as they are known."""

import base64
import io
import json
import math
import sys
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
from d2m_jax.data.protocol import Data, Prompt, Split
from d2m_jax.data.source import open_data
from d2m_jax.evaluate.benchmark import Judge, judge_of
from d2m_jax.evaluate.noisy import (
    MOST,
    Inputs,
    Program,
    examples,
    mean_square,
    noisy_batches,
    velocities,
)
from d2m_jax.evaluate.scores import Score, Scores
from d2m_jax.report.rows import Row, Run
from d2m_jax.sampling.encoders import Encoders
from d2m_jax.sampling.grid import to_image
from d2m_jax.sampling.pipeline import Pipeline
from d2m_jax.sharding import batch_shards, check_mesh, make_mesh, parameter_sharding
from d2m_jax.weights import model_directory
from d2m_jax.weights.encoders import parts
from d2m_jax.weights.output import new_file

SAMPLES = 12  # images that are kept: two of every category


@dataclass(frozen=True)
class Measured:
    """Of one model, by kinds of pairs (Bench.splits)."""

    scores: Scores  # none where nobody judges images
    errors: dict[str, float]  # distillation error; 0 is the teacher's own
    prompts: tuple[Prompt, ...]  # of the samples
    samples: UInt8[np.ndarray, "n h w 3"]


class Bench:
    """Prompts, noise and noisy examples that all models of a run meet, and the teacher's answers.

    Results lie in `folder`, one file each, with what they were measured from.
    """

    def __init__(self, run: Run, folder: Path, versions: Mapping[str, str]):
        self.run, self.folder, self.versions = run, folder, dict(versions)
        self.mesh = _mesh(run)
        self.batch = examples(run.teacher.config, batch_shards(self.mesh))  # of one forward
        self._place = partial(parameter_sharding, self.mesh)
        # Of every model directory that is asked for: config, shapes, fingerprint.
        self._stored = cache(partial(model_directory.stored, sharding=self._place))
        self._loaded: tuple[Path, dict] | None = None

    @cached_property
    def encoders(self) -> Encoders:
        """What all models of a run share."""
        return Encoders(self.run.teacher.config, mesh=self.mesh, load=not self.data.encoded)

    @cached_property
    def data(self) -> Data:
        """What all models of a run are asked."""
        return open_data(self.run.config.data, self.run.teacher.config)

    @cached_property
    def validation(self) -> Data:
        """What their errors are measured on."""
        other = self.run.config.validation
        return self.data if other is None else open_data(other, self.run.teacher.config)

    @cached_property
    def judge(self) -> Judge | None:
        """Who scores images, if anybody can."""
        return judge_of(self.data)

    @property
    def splits(self) -> dict[str, Split]:
        """What a report calls examples → the split of the data. Of judged data: pairs of glyph and
        colour that train ("seen"), and such that never do; of others what never trains is one."""
        if self.judge is None:
            return {"seen": "validation"}
        return {"seen": "validation", "held_out": "held_out"}

    @cached_property
    def draws(self) -> bool:
        """Whether the teacher has what makes images of prompts."""
        config = self.run.teacher.config
        there = config.encoders is not None and Path(config.encoders).is_dir()
        if parts(config) and not there:
            print(
                f"report: without samples: {config.encoders or 'text encoders and autoencoder'}"
                " not found",
                file=sys.stderr,
                flush=True,
            )
            return False
        return True

    @cached_property
    def inputs(self) -> dict[str, list[Inputs]]:
        """Noisy examples by pairs."""
        made = partial(noisy_batches, self.run.config, self.validation, self.encoders)
        return {
            pairs: made(pairs, split, self.batch, self.mesh) for pairs, split in self.splits.items()
        }

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
            "validation": to_json(self.run.config.validation),
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
            answers = velocities(program, params, self.inputs[pairs])
            value[pairs] = {"error": mean_square(answers, targets[pairs])}
            asked = self.data.prompts(count, pairs == "held_out") if self.draws else []
            if not asked:
                continue
            captions = [prompt.caption for prompt in asked]
            images = pipe(captions, seed=self.run.config.seed, progress=self.judge is None)
            if self.judge is not None:
                judged = self.judge(images, asked)
                value[pairs] |= {"correct": _bits(judged.correct), "floor": _bits(judged.floor)}
            if pairs == "seen":
                value["samples"] = [png(to_image(image)) for image in images[:SAMPLES]]
        return value

    def _read(self, value: dict, prompts: Mapping[str, int]) -> Measured:
        asked = {
            pairs: tuple(self.data.prompts(count, pairs == "held_out"))
            for pairs, count in prompts.items()
        }
        scores = {
            pairs: Score(
                asked[pairs],
                *(np.array(list(value[pairs][judged])) == "1" for judged in ("correct", "floor")),
            )
            for pairs in prompts
            if "correct" in value[pairs]
        }
        files = [io.BytesIO(base64.b64decode(text)) for text in value.get("samples", [])]
        samples = [np.asarray(Image.open(file)) for file in files]
        errors = {pairs: value[pairs]["error"] for pairs in prompts}
        drawn = np.stack(samples) if samples else np.zeros((0, 1, 1, 3), np.uint8)
        return Measured(scores, errors, asked["seen"][: len(samples)], drawn)


def _mesh(run: Run) -> Mesh:
    """The run's mesh over devices of this process alone, or all of fsdp where it does not fit
    them; as many devices as cut a batch of examples evenly."""
    count = 2 ** min(int(math.log2(jax.local_device_count())), int(math.log2(MOST)))
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
