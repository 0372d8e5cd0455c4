"""What was seen of a model while it drew (watch.py), as pictures."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from d2m_jax.evaluate.watch import Names, Sums, information

SHOWN = 8  # layers of a picture, spread over the depth


def pictures(sums: Sums, names: Names) -> dict[str, Figure]:
    """Those that this model has something for, by the names of their files."""
    drawn: dict[str, Callable[[Sums, Names], Figure]] = {"contributions": contributions}
    if names.layers:
        drawn |= {"places": places, "groups": groups, "experts": experts, "loads": loads}
    if names.mixtures:
        drawn |= {"blocks": blocks}
    return {name: draw(sums, names) for name, draw in drawn.items()}


def places(sums: Sums, names: Names) -> Figure:
    """Where in the image each expert is chosen: early, late and on the whole."""
    maps = sums["maps"].sum(2)  # [i t h w n]
    last = maps.shape[1] - 1
    rows = [
        (f"{names.maps[i]}\n{label}", maps[i, t])
        for i in _some(len(names.maps))
        for label, t in (("noise", 0), ("data", last))
    ]
    return _maps(rows, "Where in the image each expert is chosen, first and last steps")


def groups(sums: Sums, names: Names) -> Figure:
    """The same by group of prompts, of the layer whose choice depends on it most."""
    maps = sums["maps"].sum(1)  # [i c h w n]
    told = [information(one.sum((1, 2)).astype(np.float64)) for one in maps]
    most = int(np.argmax(told))
    rows = [(group or "all", maps[most, c]) for c, group in enumerate(names.groups)]
    return _maps(rows, f"Where {names.maps[most]} chooses each expert, by group of prompts")


def _maps(rows: Sequence[tuple[str, Float[np.ndarray, "h w n"]]], title: str) -> Figure:
    """A map for every expert, rows with their labels."""
    count = rows[0][1].shape[-1]
    figure = _figure(1 + 1.1 * count, 1.15 * len(rows) + 0.6)
    panels = figure.subplots(len(rows), count, squeeze=False)
    image: Any = None
    for line, (label, map_) in zip(panels, rows, strict=True):
        shares = _shares(map_) * count
        for n, axes in enumerate(line):
            image = axes.imshow(shares[..., n], cmap="magma", vmin=0, vmax=3)
            axes.set(xticks=[], yticks=[])
        line[0].set_ylabel(label, fontsize=7)
    for n, axes in enumerate(panels[0]):
        axes.set_title(f"expert {n}", fontsize=8)
    figure.colorbar(image, ax=panels.ravel().tolist(), label="× even", shrink=0.6)
    figure.suptitle(title, fontsize=10)
    return figure


def experts(sums: Sums, names: Names) -> Figure:
    """Loads by time, and by group of prompts."""
    rows = []
    for i in _some(len(names.layers)):
        load = sums["load"][i]
        even = load.shape[-1]
        rows.append((f"{names.layers[i]}\nexpert", *(_shares(load.sum(a)) * even for a in (1, 0))))
    figure, panels = _by_time_and_group(rows, sums, names, 1.3, ("magma", 3, "× even"))
    panels[0, 0].set_title("by time", fontsize=9)
    return figure


def loads(sums: Sums, names: Names) -> Figure:
    """How even choices are: of one sample, layer by layer."""
    ran = sums["ran"].sum(2)  # [l t]
    values = np.where(ran > 0, sums["entropy"] / np.maximum(ran, 1), np.nan)
    figure = _figure(5, 0.16 * len(values) + 1.4)
    axes = figure.subplots()
    image = axes.imshow(values, aspect="auto", cmap="viridis", vmax=1)
    axes.set_yticks(range(len(names.layers)), names.layers, fontsize=6)
    axes.set_title("entropy of a sample's choices (1: even)", fontsize=9)
    _time_axis(axes, sums)
    figure.colorbar(image, ax=axes)
    return figure


def blocks(sums: Sums, names: Names) -> Figure:
    """Which blocks of each mixture run, by time and by group of prompts."""
    rows = []
    for i, size in enumerate(names.sizes):
        used, samples = sums["used"][i, ..., :size], sums["samples"]
        shares = (used.sum(a) / np.maximum(samples.sum(a)[:, None], 1) for a in (1, 0))
        rows.append((names.mixtures[i], *shares))
    figure, panels = _by_time_and_group(rows, sums, names, 1.2, ("viridis", 1, "of samples"))
    panels[0, 0].set_title("blocks that run, by time", fontsize=9)
    for line, size in zip(panels, names.sizes, strict=True):
        for axes in line:
            axes.set_yticks(range(size))
    return figure


def _by_time_and_group(
    rows: Sequence[tuple[str, Float[np.ndarray, "t _"], Float[np.ndarray, "c _"]]],
    sums: Sums,
    names: Names,
    height: float,
    colours: tuple[str, float, str],
) -> tuple[Figure, np.ndarray]:
    """Two panels a row; `colours` are a map's name, its highest value and what values mean."""
    cmap, highest, meaning = colours
    figure = _figure(9, height * len(rows) + 0.8)
    panels = figure.subplots(len(rows), 2, squeeze=False)
    image: Any = None
    for line, (label, *both) in zip(panels, rows, strict=True):
        for axes, shares in zip(line, both, strict=True):
            image = axes.imshow(shares.T, aspect="auto", cmap=cmap, vmin=0, vmax=highest)
            axes.set(xticks=[])
            axes.tick_params(labelsize=7)
        line[0].set_ylabel(label, fontsize=7)
    _time_axis(panels[-1, 0], sums)
    _group_axis(panels[-1, 1], names)
    panels[0, 1].set_title("by group of prompts", fontsize=9)
    figure.colorbar(image, ax=panels.ravel().tolist(), label=meaning, shrink=0.6)
    return figure, panels


def contributions(sums: Sums, names: Names) -> Figure:
    """How much every block changes image and text tokens where it runs, a curve per bin of time."""
    ran = sums["block_ran"].sum(2)[..., None]
    change = sums["change"].sum(2) / np.maximum(ran, 1)  # [b t 2]
    change = np.where(ran > 0, change, np.nan)
    bins = change.shape[1]
    figure = _figure(max(7, 0.13 * len(change)), 5)
    panels = figure.subplots(2, 1, sharex=True)
    colours = colormaps["coolwarm"](np.linspace(1, 0, bins))
    for side, (axes, name) in enumerate(zip(panels, ("image", "text"), strict=True)):
        for t in range(bins):
            label = {0: "noise", bins - 1: "data"}.get(t)
            axes.plot(change[:, t, side], color=colours[t], label=label, marker=".", lw=1)
        axes.set(ylabel=f"|x' − x| / |x|, {name}", yscale="log")
        axes.grid(alpha=0.25)
    panels[0].legend(fontsize=8)
    every = range(0, len(names.blocks), max(1, len(names.blocks) // 30))
    panels[1].set_xticks(every, [names.blocks[i] for i in every], rotation=90, fontsize=6)
    figure.suptitle("How much each block changes the streams", fontsize=10)
    return figure


def _some(count: int) -> list[int]:
    """At most SHOWN of so many, first and last among them."""
    return sorted(set(np.linspace(0, count - 1, min(SHOWN, count)).round().astype(int).tolist()))


def _figure(width: float, height: float) -> Figure:
    return Figure(figsize=(width, height), dpi=110, layout="constrained")


def _shares(values: Float[np.ndarray, "*s n"]) -> Float[np.ndarray, "*s n"]:
    """Over the last axis, NaN where there is nothing."""
    total = values.sum(-1, keepdims=True)
    return np.where(total > 0, values / np.maximum(total, 1e-30), np.nan)


def _time_axis(axes: Axes, sums: Sums) -> None:
    bins = len(sums["samples"])
    axes.set_xticks([0, bins - 1] if bins > 1 else [0], ["noise", "data"][: min(bins, 2)])


def _group_axis(axes: Axes, names: Names) -> None:
    groups: Sequence[str] = names.groups
    axes.set_xticks(range(len(groups)), [group or "all" for group in groups], rotation=30)
    axes.tick_params(axis="x", labelsize=7)
