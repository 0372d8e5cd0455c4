"""What a model is worth: scores, samples and errors, on disk as soon as they are known."""

import base64
import io
import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, UInt8
from PIL import Image

from d2m_jax.config import (
    ConfigError,
    FluxConfig,
    MeshConfig,
    ModelConfig,
    RunConfig,
    to_json,
)
from d2m_jax.data.protocol import Data, Prompt, Split
from d2m_jax.data.source import open_data
from d2m_jax.encoders import Encoders
from d2m_jax.evaluate.benchmark import Judge, judge_of
from d2m_jax.evaluate.noisy import (
    MOST,
    Inputs,
    Program,
    examples,
    fit_alone,
    mean_square,
    noisy_batches,
    velocities,
)
from d2m_jax.evaluate.scores import Score, Scores
from d2m_jax.grid import to_image
from d2m_jax.output import new_file
from d2m_jax.report.rows import Row, Run
from d2m_jax.sampling.pipeline import Pipeline
from d2m_jax.sharding import batch_shards, check_mesh, make_mesh, parameter_sharding
from d2m_jax.weights.directory import model_directory
from d2m_jax.weights.torch_files.diffusers_folder import parts

SAMPLES = 12  # images that are kept: two of every category
FEWEST = 12  # prompts that are scored: two of every category, for a standard error


def splits(judged: bool) -> dict[str, Split]:
    """What a report calls examples → the split of the data. Of judged data: pairs of
    pictogram and colour that train ("seen"), and such that never do; of others what never trains is
    one."""
    return {"seen": "validation", "held_out": "held_out"} if judged else {"seen": "validation"}


def prompt_counts(config: RunConfig, judged: bool) -> dict[str, int]:
    """How many prompts of each of these every model draws."""
    count = config.evaluate_prompts
    if not judged:
        return {"seen": min(count, SAMPLES)}
    return {"seen": max(FEWEST, count), "held_out": max(FEWEST, count // 2)}


def draws(model: ModelConfig) -> bool:
    """Whether a model has what makes images of prompts: words and pixels, or encoders."""
    return not parts(model) or (model.encoders is not None and Path(model.encoders).is_dir())


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
        self.mesh = mesh_of(run.config, [row.config.transformer for row in run.rows])
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

    @cached_property
    def batch(self) -> int:
        """Examples of one forward."""
        return examples(self.run.teacher.config, self.validation, batch_shards(self.mesh))

    @cached_property
    def timed(self) -> tuple[int, ...]:
        """Of how many examples the forwards are that are timed: one, on a device of its own if it
        cannot be cut and two models fit there; and as many as go together."""
        heaviest = max(_bytes(self.shapes(row)) for row in self.run.rows)
        one = (1,) if fit_alone(self.mesh, 2 * heaviest) else ()
        return tuple(dict.fromkeys((*one, self.batch)))

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels of the images of those forwards."""
        rows, columns = self.inputs["seen"][0]["img"].shape[1:3]
        stride = self.run.teacher.config.image.stride
        return rows * stride, columns * stride

    @cached_property
    def inputs(self) -> dict[str, list[Inputs]]:
        """Noisy examples by pairs."""
        made = partial(noisy_batches, self.run.config, self.validation, self.encoders)
        return {
            pairs: made(pairs, split, self.batch, self.mesh)
            for pairs, split in splits(self.judge is not None).items()
        }

    @cached_property
    def targets(self) -> dict[str, list[Float[np.ndarray, "b n c"]]]:
        """The teacher's velocities there."""
        program, params = self.program(self.run.teacher), self.params(self.run.teacher)
        return {
            pairs: velocities(program, params, found, "teacher: errors")
            for pairs, found in self.inputs.items()
        }

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
        asked = self._asked(prompts)
        key = {
            "model": self._stored(row.path)[2],
            "config": to_json(config),
            "teacher": self._stored(self.run.teacher.path)[2],
            "data": to_json(self.run.config.data),
            "validation": to_json(self.run.config.validation),
            "samples": [self.data.fingerprint(), self.validation.fingerprint()],
            "seed": self.run.config.seed,
            "prompts": {pairs: [one.caption for one in mine] for pairs, mine in asked.items()},
            "held_out_batches": self.run.config.held_out_batches,
            "versions": self.versions,
        }
        file = self.folder / f"{name}.json"
        value = cached(file, key, lambda: self._measure(row, config, prompts))
        return self._read(value, asked)

    def _measure(self, row: Row, config: ModelConfig, prompts: Mapping[str, int]) -> dict[str, Any]:
        targets = self.targets  # of another model, hence first
        params, program = self.params(row), self.program(row, config)
        pipe = Pipeline(config, params, encoders=self.encoders, mesh=self.mesh)
        value = {}
        for pairs, count in prompts.items():
            answers = velocities(program, params, self.inputs[pairs], f"{row.label}: errors")
            value[pairs] = {"error": mean_square(answers, targets[pairs])}
            drawn = draws(self.run.teacher.config)
            asked = self.data.prompts(count, pairs == "held_out") if drawn else ()
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

    def _asked(self, counts: Mapping[str, int]) -> dict[str, tuple[Prompt, ...]]:
        """So many prompts by pairs."""
        return {
            pairs: tuple(self.data.prompts(count, pairs == "held_out"))
            for pairs, count in counts.items()
        }

    def _read(self, value: dict, asked: Mapping[str, tuple[Prompt, ...]]) -> Measured:
        scores = {
            pairs: Score(
                asked[pairs],
                *(np.array(list(value[pairs][judged])) == "1" for judged in ("correct", "floor")),
            )
            for pairs in asked
            if "correct" in value[pairs]
        }
        files = [io.BytesIO(base64.b64decode(text)) for text in value.get("samples", [])]
        samples = [np.asarray(Image.open(file)) for file in files]
        errors = {pairs: value[pairs]["error"] for pairs in asked}
        drawn = np.stack(samples) if samples else np.zeros((0, 1, 1, 3), np.uint8)
        return Measured(scores, errors, asked["seen"][: len(samples)], drawn)


def mesh_of(config: RunConfig, transformers: Iterable[FluxConfig]) -> Mesh:
    """The run's mesh over devices of this process alone, or all of fsdp where it does not fit them
    or these models; as many devices as cut a batch of examples evenly."""
    count = 2 ** min(int(math.log2(jax.local_device_count())), int(math.log2(MOST)))
    devices = jax.local_devices()[:count]
    try:
        mesh = make_mesh(config.mesh, devices)
        for transformer in transformers:
            check_mesh(mesh, transformer)
    except ConfigError:
        return make_mesh(MeshConfig(data=1, fsdp=-1), devices)
    return mesh


def _bytes(params: dict) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(params))


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
