"""The pictures of a report, drawn by matplotlib: samples, curves, costs, routing."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from d2m_jax.data.protocol import Prompt
from d2m_jax.evaluate.routing import BINS, Group, Layer
from d2m_jax.report.measure import Measured
from d2m_jax.report.rows import Row, Run

COLOURS = ("#d62728", "#ff7f0e", "#1f77b4", "#2ca02c", "#9467bd", "#8c564b", "#17becf", "#e377c2")
MARKERS = "osD^vPX*"
DPI = 110  # of the samples, whose images are an inch
LINES = 4  # of a caption beside them
RIGHT, WRONG = "#2ca02c", "#d62728"


def samples(rows: Sequence[Row], measured: Mapping[Row, Measured]) -> Figure:
    """The same prompts with the same noise, a column per model; frames say what came out right,
    where images are judged."""
    images = [measured[row].samples for row in rows]
    scenes = measured[rows[0]].prompts
    categories = list(dict.fromkeys(scene.category for scene in scenes))
    order = sorted(range(len(scenes)), key=lambda i: categories.index(scenes[i].category))
    caption, size, gap = 2.4, 1.0, 0.24  # in units of an image
    width = caption + len(rows) * (size + gap)
    height = len(scenes) * (size + gap) + 0.65
    pixels = max(images[0].shape[1:3])
    small = pixels <= DPI
    figure = Figure(figsize=(width, height), dpi=DPI if small else min(pixels, 2 * DPI))
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(height, 0))
    axes.axis("off")
    for column, row in enumerate(rows):
        x = caption + column * (size + gap)
        title = row.label.replace(", after ", ",\nafter ")
        axes.text(
            x + size / 2, 0.58, title, ha="center", va="bottom", fontsize=8.5, parse_math=False
        )
        for place, i in enumerate(order):
            y = 0.65 + place * (size + gap)
            image = images[column][i]
            tall, wide = (size * side / pixels for side in image.shape[:2])
            axes.imshow(
                image,
                extent=(x, x + wide, y + tall, y),
                interpolation="nearest" if small else "antialiased",
            )
            if not measured[row].scores:
                continue
            right = bool(measured[row].scores["seen"].correct[i])
            colour = RIGHT if right else WRONG
            axes.add_patch(Rectangle((x, y), size, size, fill=False, ec=colour, lw=2))
            mark = "✓" if right else "✗"
            axes.text(x + size + 0.04, y + size, mark, color=colour, fontsize=11, va="bottom")
    for place, i in enumerate(order):
        y = 0.65 + place * (size + gap) + size / 2
        text = _wrapped(scenes[i])
        axes.text(0.08, y - 0.03, text, va="bottom", fontsize=9, parse_math=False)
        if len(categories) > 1:
            axes.text(0.08, y + 0.09, scenes[i].category, va="top", fontsize=7.5, color="0.45")
    axes.set(xlim=(0, width), ylim=(height, 0), aspect="equal")
    return figure


def _wrapped(scene: Prompt) -> str:
    """A caption in lines that fit beside the images, or its beginning."""
    lines = [""]
    for word in scene.caption.split():
        if lines[-1] and len(lines[-1]) + len(word) > 26:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    lines = [line if len(line) <= 26 else f"{line[:25]}…" for line in lines]
    return "\n".join(lines if len(lines) <= LINES else [*lines[: LINES - 1], "…"])


def curves(run: Run) -> Figure:
    """The distillation error of all students while they train, by step and by second."""
    figure = Figure(figsize=(10, 4.4), dpi=110, layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, by, label in zip(
        panels, ("step", "seconds"), ("steps", "training seconds"), strict=True
    ):
        for student, colour in zip(run.students, _colours(run.students), strict=False):
            for name, style in (
                ("output", {"lw": 0.8, "alpha": 0.35}),
                ("validation_output", {"lw": 1.6, "marker": "o", "ms": 3, "label": student.name}),
            ):
                lines = [line for line in student.history if line.get(name, 0) > 0]
                x, y = [line[by] for line in lines], [line[name] for line in lines]
                axes.plot(x, y, color=colour, **style)
            for row in student.rows[:-1]:  # where one stage ends and the next begins
                end = row.steps if by == "step" else row.seconds
                axes.axvline(end, color=colour, lw=0.8, ls=":", alpha=0.7)
        axes.set(xlabel=label, yscale="log")
        _tidy(axes)
    panels[0].set_ylabel("E ‖v teacher − v student‖²")
    panels[0].legend(frameon=False)
    return figure


def costs(
    run: Run,
    measured: Mapping[Row, Measured],
    gflops: Mapping[Row, float],
    milliseconds: Mapping[Row, float],
    batch: int,
) -> Figure:
    """Scores against FLOPs and against measured time, with 95 % intervals; where images are not
    judged, the distillation error of the students."""
    figure = Figure(figsize=(10, 4.6), dpi=110, layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    styles = {run.teacher: ("black", "*")}
    for student, colour in zip(run.students, _colours(run.students), strict=True):
        styles |= {row: (colour, MARKERS[i % 8]) for i, row in enumerate(student.rows)}
    titles = "GFLOPs per forward", f"measured ms per image and forward, batch {batch}"
    for axes, cost, title in zip(panels, (gflops, milliseconds), titles, strict=True):
        for row, (colour, marker) in styles.items():
            scores = measured[row].scores
            if not scores and row is run.teacher:
                axes.axvline(cost[row], color=colour, ls=":", label=row.label)
                continue
            worth = (measured[row].errors["seen"], 0.0)
            if scores:
                overall = scores["seen"].overall
                worth = 100 * overall.mean, 196 * overall.standard_error
            axes.errorbar(
                cost[row], *worth, color=colour,
                marker=marker, ms=11 if marker == "*" else 7, ls="none", elinewidth=1,
                capsize=2, label=row.label,
            )  # fmt: skip
        axes.set(xlabel=title, xlim=(0, 1.12 * max(cost.values())))
        _tidy(axes)
    if measured[run.teacher].scores:
        panels[0].set(ylabel="score, % of prompts", ylim=(0, 100))
    else:
        panels[0].set(ylabel="E ‖v teacher − v student‖²", ylim=(0, None))
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    return figure


def routing(layers: Sequence[Layer], groups: Sequence[Group]) -> Figure:
    """Loads of experts by timestep and by place in the image; use of blocks by timestep."""
    rows = len(layers) + len(groups)
    figure = Figure(figsize=(12, 1.25 * rows + 0.9), dpi=100, layout="constrained")
    panels = figure.subplots(rows, 2, squeeze=False, width_ratios=(1, 3.4))
    for axes, layer in zip(panels, layers, strict=False):
        experts = layer.by_time.shape[1]
        _heat(axes[0], experts * _seen(layer.by_time).T, "magma", 3)
        axes[0].set_facecolor("0.85")  # where no sample came
        axes[0].set(ylabel="expert", title=layer.name)
        axes[0].yaxis.set_major_locator(MaxNLocator(integer=True))
        if layer.by_place is None:
            axes[1].axis("off")
            continue
        maps = np.pad(_seen(layer.by_place), [(0, 0), (0, 1), (0, 0)], constant_values=np.nan)
        strip = maps.transpose(0, 2, 1).reshape(len(maps), -1)[:, :-1]
        image = axes[1].imshow(strip * experts, cmap="magma", vmin=0, vmax=3)
        centres = np.arange(experts) * maps.shape[1] + (maps.shape[1] - 2) / 2
        axes[1].set(yticks=[], xticks=centres, xticklabels=range(experts))
        axes[1].set_title(f"{layer.name}: where in the image each expert is chosen")
        axes[1].spines[:].set_visible(False)
        axes[1].tick_params(length=0)
        figure.colorbar(image, ax=axes[1], label="× even", shrink=0.9)
    for axes, group in zip(panels[len(layers) :], groups, strict=True):
        image = _heat(axes[0], group.by_time.T, "viridis", 1)
        axes[0].set(ylabel="block", title=f"use of blocks {group.name}")
        axes[0].set_yticks(range(group.by_time.shape[1]))
        figure.colorbar(image, ax=axes[0], label="of samples")
        axes[1].axis("off")
    for axes in panels[:, 0]:
        axes.set_xticks([-0.5, BINS - 0.5], [])
    panels[-1, 0].set_xticks([-0.5, BINS - 0.5], ["t = 0\ndata", "t = 1\nnoise"])
    for axes in panels.ravel():
        axes.title.set_fontsize(9)
        axes.yaxis.label.set_fontsize(8)
        axes.tick_params(labelsize=8)
    return figure


def _heat(axes: Axes, values: np.ndarray, cmap: str, most: float):
    return axes.imshow(values, aspect="auto", cmap=cmap, vmin=0, vmax=most)


def _seen(shares: np.ndarray) -> np.ndarray:
    """Shares over the last axis, NaN where there are none because no sample came by."""
    return np.where(shares.sum(-1, keepdims=True) > 0, shares, np.nan)


def _colours(things: Sequence) -> list[str]:
    return [COLOURS[i % len(COLOURS)] for i in range(len(things))]


def _tidy(axes: Axes) -> None:
    axes.grid(alpha=0.25, which="both" if axes.get_yscale() == "log" else "major", lw=0.5)
    axes.spines[["top", "right"]].set_visible(False)
