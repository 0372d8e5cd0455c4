"""What `evaluate.py routing` does: watch a model, keep arrays, pictures and a summary."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import jax
import numpy as np
from matplotlib.figure import Figure

from d2m_jax import hosts, numpy_files
from d2m_jax.config import WordsConfig, check
from d2m_jax.cores import use_cores
from d2m_jax.data.prompt_files import grouped_prompts_of
from d2m_jax.evaluate.arguments import Routing
from d2m_jax.evaluate.benchmark import data_of
from d2m_jax.evaluate.export import check_model
from d2m_jax.evaluate.watch import Names, Sums, information, watch
from d2m_jax.evaluate.watch_pictures import pictures
from d2m_jax.output import check_writable, new_file, write_json
from d2m_jax.sampling.pipeline import load_pipeline
from d2m_jax.sharding import local_mesh
from d2m_jax.weights.directory import model_directory
from d2m_jax.weights.files.hub import check_folder_name

ARRAYS, SUMMARY = "routing.npz", "summary.json"
PART = ".part.{}.npz"  # what one process has seen
# Of Routing, what watch takes under the same name.
OPTIONS = (
    *("height", "width", "steps", "guidance", "seed", "max_sequence_length", "batch_size"),
    *("top_k", "bins", "places"),
)


def run(asked: Routing) -> dict[str, Any] | None:
    """Watch and write. All processes share the prompts; the first writes, and has the summary."""
    check(asked.count >= 1, f"--count {asked.count}: expected at least 1")
    check(asked.bins >= 1 and asked.places >= 1, "--bins, --places: expected at least 1")
    check_folder_name(asked.output)
    check_writable(asked.output / ARRAYS)
    prompts = _prompts(asked)
    use_cores()
    options = {name: getattr(asked, name) for name in OPTIONS}
    with hosts.joined(*asked.among.who):
        hosts.agree({"model": asked.model, "prompts": len(prompts)} | options)
        check_model(asked, asked.model, [prompt for prompt, _ in prompts])
        pipe = load_pipeline(asked.model, asked.dtype, local_mesh(), encoders=asked.encoders)
        sums, names = watch(pipe, prompts, **options)
        _save(asked.output / PART.format(jax.process_index()), sums)
        hosts.barrier("routing")
        return _finish(asked.output, names) if hosts.first() else None


@dataclasses.dataclass(frozen=True)
class Watched:
    """What was seen of a model that drew; printed, the summary in a few lines."""

    sums: Sums
    names: Names

    def __str__(self) -> str:
        return "\n".join(lines(self.summary))

    __repr__ = __str__

    @property
    def summary(self) -> dict[str, Any]:
        """What tells of the choices, how even they are, how much blocks change (see below)."""
        return summary(self.sums, self.names)

    def pictures(self) -> dict[str, Figure]:
        """Matplotlib's, by what they show."""
        return pictures(self.sums, self.names)

    def save(self, folder: Path | str) -> None:
        """Arrays, pictures and the summary, each file whole."""
        labels = {f"names_{k}": np.array(v) for k, v in dataclasses.asdict(self.names).items()}
        _save(Path(folder) / ARRAYS, self.sums | labels)
        for name, figure in self.pictures().items():
            with new_file(Path(folder) / f"{name}.png") as new:
                figure.savefig(new, format="png")
        write_json(Path(folder) / SUMMARY, self.summary)


def _prompts(asked: Routing) -> list[tuple[str, str]]:
    """Each with its group, as many of every group as of the others."""
    if asked.prompts is not None:
        found = grouped_prompts_of(asked.prompts, asked.column, asked.group)
    else:
        path = Path(asked.model)
        check(
            model_directory.is_model_directory(path),
            "--prompts: missing, expected a file of prompts for a model that is no directory",
        )
        config = model_directory.load_config(path)
        needed = "--prompts: missing, expected a file of prompts for a model that reads any"
        check(isinstance(config.text, WordsConfig), needed)
        found = [(p.caption, p.category) for p in data_of(path, config).prompts(asked.count)]
    groups = list(dict.fromkeys(group for _, group in found))
    each = -(-asked.count // len(groups))
    taken = [[pair for pair in found if pair[1] == group][:each] for group in groups]
    return [pair for group in taken for pair in group]


def _save(file: Path, arrays: Any) -> None:
    with new_file(file) as new, new.open("wb") as opened:
        np.savez_compressed(opened, **arrays)


def _finish(folder: Path, names: Names) -> dict[str, Any]:
    parts = [folder / PART.format(i) for i in range(hosts.count())]
    total: Sums = {}
    for file in parts:
        mine = numpy_files.load_all(file)
        total = {name: array + total.get(name, 0) for name, array in mine.items()}
    watched = Watched(total, names)
    watched.save(folder)
    for file in parts:
        file.unlink()
    return watched.summary


def summary(sums: Sums, names: Names) -> dict[str, Any]:
    """How much place, time and prompt tell of the choice, as shares of what there is to tell, in
    the mean over layers and layer by layer; and how even one sample's choices are, by time."""
    found: dict[str, Any] = {
        "prompts": dict(zip(names.groups, sums["prompts"].astype(int).tolist(), strict=True))
    }
    if names.layers:
        whole = math.log(max(2, sums["load"].shape[-1]))
        layers = {}
        for i, name in enumerate(names.layers):
            load = sums["load"][i]
            ran = sums["ran"][i].sum(1)
            layers[name] = {
                "time": information(load.sum(1)) / whole,
                "prompts": information(load.sum(0)) / whole,
                "prompts_by_chance": information(sums["load_dealt"][i]) / whole,
                "entropy": _divided(sums["entropy"][i], ran),
            }
        for i, name in enumerate(names.maps):
            map_ = sums["maps"][i].sum((0, 1))
            layers[name]["place"] = information(map_.reshape(-1, map_.shape[-1])) / whole
        found["experts"] = _means(layers) | {"layers": layers}
    if names.mixtures:
        mixtures = {}
        for i, name in enumerate(names.mixtures):
            used, whole = sums["used"][i], math.log(names.sizes[i])
            mixtures[name] = {
                "time": information(used.sum(1)) / whole,
                "prompts": information(used.sum(0)) / whole,
                "prompts_by_chance": information(sums["used_dealt"][i]) / whole,
            }
        found["blocks"] = _means(mixtures) | {"mixtures": mixtures}
    ran = sums["block_ran"].sum((1, 2))[:, None].repeat(2, axis=1)  # image and text
    found["change"] = {
        name: dict(
            zip(("image", "text"), _divided(sums["change"][i].sum((0, 1)), ran[i]), strict=True)
        )
        for i, name in enumerate(names.blocks)
    }
    return found


def _divided(values: np.ndarray, counts: np.ndarray) -> list[float | None]:
    """Means; None where nothing was seen."""
    pairs = zip(values.tolist(), counts.tolist(), strict=True)
    return [value / count if count else None for value, count in pairs]


def _means(rows: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Over layers, of every number that they have; of lists place by place."""
    found: dict[str, Any] = {}
    for key in dict.fromkeys(key for row in rows.values() for key in row):
        values = [row[key] for row in rows.values() if key in row]
        if isinstance(values[0], list):
            columns = zip(*values, strict=True)
            found[key] = [_mean([v for v in column if v is not None]) for column in columns]
        else:
            found[key] = _mean(values)
    return found


def _mean(values: list[float]) -> float | None:
    return float(np.mean(values)) if values else None


def lines(found: dict[str, Any]) -> list[str]:
    """The summary for people."""
    told = [f"{sum(found['prompts'].values())} prompts in {len(found['prompts'])} groups"]
    for what, kind in (("experts", "expert"), ("blocks", "block")):
        if what not in found:
            continue
        mine = found[what]
        told.append(f"what tells which {kind} is chosen (0: nothing of it, 1: all)")
        for key, label in (
            ("place", "place in the image"),
            ("time", "time"),
            ("prompts", "group of prompts"),
        ):
            if key in mine and (key != "prompts" or len(found["prompts"]) > 1):
                more = f" ({mine['prompts_by_chance']:.4f} by chance)" if key == "prompts" else ""
                told.append(f"  {label:20} {mine[key]:.4f}{more}")
        if mine.get("entropy"):
            noise, data = mine["entropy"][0], mine["entropy"][-1]
            told.append(
                f"evenness of one sample's choices: {noise:.3f} at noise, {data:.3f} at data"
            )
    return told
