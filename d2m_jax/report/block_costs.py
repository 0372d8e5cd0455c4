"""What each block of a teacher is worth by time, and where groups of blocks would lose least."""

from dataclasses import asdict, dataclass

import jax
import numpy as np
import rich
from jaxtyping import Float
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from rich.table import Table

from d2m_jax import hosts
from d2m_jax.config import KINDS, RunConfig, check
from d2m_jax.evaluate.arguments import Blocks
from d2m_jax.evaluate.routing import BINS, bins_of
from d2m_jax.keys import named_key
from d2m_jax.output import check_writable, write_json
from d2m_jax.sharding import make_mesh
from d2m_jax.sparsification.left_out import LeftOut, leave_out
from d2m_jax.sparsification.routers import fit_router, logits
from d2m_jax.training.run import with_teacher


@dataclass(frozen=True)
class Place:
    """A group at one place in the depth: the sum of the costs of the blocks that do not run, means
    over samples."""

    kind: str
    first: int  # block
    fixed: float  # always the same blocks run, those that cost most
    fitted: float  # a fitted router chooses, on samples that it was not fitted to
    best: float  # whatever costs least for each sample


def run(config: RunConfig, asked: Blocks) -> None:
    """Measure, print two tables, and write costs.png and costs.json where an output is asked for.

    ConfigError for groups that are longer than the depth of the run's teacher.
    """
    if asked.output is not None:
        check_writable(asked.output / "costs.json")
    mesh = make_mesh(config.mesh)
    work, (model, params, _) = with_teacher(config, mesh)
    alpha = model.transformer.mob_alpha
    longest = max(model.transformer.depth(kind) for kind in KINDS)
    check(
        asked.size <= longest,
        f"--size {asked.size}: the teacher has no so many blocks of a kind one after the other",
    )
    with jax.set_mesh(mesh):
        found = leave_out(
            model.transformer,
            params,
            work.encoded(asked.batch_size),
            work.noisy(model),
            named_key(config.seed, "blocks"),
            count=asked.batches,
            micro_batch=asked.micro_batch,
        )
    if not hosts.first():
        return
    places = [place for kind in KINDS for place in places_of(found, kind, asked, alpha)]
    by_time = costs_by_time(found)
    rich.print(_blocks(found, by_time))
    rich.print(_groups(places, asked))
    print("\n".join(_advice(places, found, asked)))
    if asked.output is None:
        return
    asked.output.mkdir(parents=True, exist_ok=True)
    write_json(
        asked.output / "costs.json",
        {
            "samples": len(found.timesteps),
            "size": asked.size,
            "active": asked.active,
            "blocks": {f"{k} {n}": float(c.mean()) for (k, n), c in found.costs.items()},
            "by_time": {name: list(map(float, row)) for name, row in by_time.items()},
            "groups": [asdict(place) for place in places],
        },
    )
    picture(by_time).savefig(asked.output / "costs.png")
    print(f"costs.png and costs.json in {asked.output}")


def places_of(found: LeftOut, kind: str, asked: Blocks, alpha: float) -> list[Place]:
    """A group of blocks of this kind wherever one can stand."""
    places, there = [], len(found.means[kind])
    fits, judges = np.split(np.arange(len(found.vec)), [len(found.vec) // 2])
    gone = asked.size - asked.active
    for first in range(there - asked.size + 1):
        blocks = [(kind, first + n) for n in range(asked.size)]
        costs = np.stack([found.costs[block] for block in blocks], axis=1)
        pooled, judged = found.pooled[blocks[0]], costs[judges]
        router = fit_router(pooled[fits], found.vec[fits], costs[fits], alpha)
        chosen = logits(router, pooled[judges], found.vec[judges], alpha)
        places.append(
            Place(
                kind,
                first,
                fixed=_left(judged, np.broadcast_to(costs[fits].mean(0), judged.shape), gone),
                fitted=_left(judged, chosen, gone),
                best=_left(judged, judged, gone),
            )
        )
    return places


def _left(costs: Float[np.ndarray, "n m"], worth: Float[np.ndarray, "n m"], gone: int) -> float:
    """The cost of leaving out so many blocks, those that are worth least."""
    least = np.argsort(worth, axis=1, kind="stable")[:, :gone]
    return float(np.take_along_axis(costs, least, axis=1).sum(1).mean())


def costs_by_time(found: LeftOut) -> dict[str, Float[np.ndarray, " t"]]:
    """The mean cost of every block in bins of the timestep, NaN where no sample came."""
    bins = bins_of(found.timesteps)

    def mean(costs: np.ndarray, t: int) -> float:
        return float(costs[bins == t].mean()) if (bins == t).any() else float("nan")

    return {
        f"{kind} {number}": np.array([mean(costs, t) for t in range(BINS)])
        for (kind, number), costs in found.costs.items()
    }


def picture(by_time: dict[str, Float[np.ndarray, " t"]]) -> Figure:
    """Costs as a map, blocks by time, on a logarithmic scale."""
    values = np.stack([row[::-1] for row in by_time.values()])
    figure = Figure(figsize=(6, 0.2 * len(values) + 1.6), dpi=110, layout="constrained")
    axes = figure.subplots()
    positive = values[np.isfinite(values) & (values > 0)]
    low, high = (positive.min(), positive.max()) if positive.size else (1e-12, 1.0)
    norm = LogNorm(low, max(high, low * (1 + 1e-6)))
    image = axes.imshow(np.maximum(values, low), aspect="auto", cmap="viridis", norm=norm)
    axes.set_yticks(range(len(values)), list(by_time), fontsize=7)
    axes.set_xticks([0, BINS - 1], ["noise", "data"])
    axes.set_title("What the velocity loses without a block", fontsize=10)
    figure.colorbar(image, ax=axes, label="E‖v − v without it‖²")
    return figure


def _blocks(found: LeftOut, by_time: dict[str, Float[np.ndarray, " t"]]) -> Table:
    table = Table(
        title="What the velocity loses without a block, E‖v − v without it‖²",
        caption=f"{len(found.vec)} samples; noise: the noisiest eighth of the timesteps",
        title_justify="left",
    )
    for column in ("block", "mean", "noise", "middle", "data"):
        table.add_column(column, justify="left" if column == "block" else "right")
    for (name, row), costs in zip(by_time.items(), found.costs.values(), strict=True):
        middle = row[BINS // 2 - 1 : BINS // 2 + 1].mean()
        table.add_row(name, *(f"{v:.4f}" for v in (costs.mean(), row[-1], middle, row[0])))
    return table


def _groups(places: list[Place], asked: Blocks) -> Table:
    table = Table(
        title=f"What a group loses of {asked.size} blocks, of which {asked.active} run",
        caption="the sum of the costs of the blocks that do not run",
        title_justify="left",
    )
    columns = ("blocks", "always the same", "a fitted router", "the best choice")
    for column in columns:
        table.add_column(column, justify="left" if column == "blocks" else "right")
    for p in places:
        name = f"{p.kind} {p.first} to {p.first + asked.size - 1}"
        table.add_row(name, *(f"{value:.4f}" for value in (p.fixed, p.fitted, p.best)))
    return table


def _advice(places: list[Place], found: LeftOut, asked: Blocks) -> list[str]:
    """Where so many groups one after the other lose least, per kind."""
    said = []
    for kind in KINDS:
        costs = [place.fitted for place in places if place.kind == kind]
        there, size = len(found.means[kind]), asked.size
        for count in range(1, there // size + 1):
            sums = [sum(costs[first::size][:count]) for first in range(there - count * size + 1)]
            keep = int(np.argmin(sums))
            groups = f"{count} group{'s' * (count > 1)} of {kind} blocks"
            said.append(
                f"{groups}, one after the other: least is lost, {sums[keep]:.4f}, with"
                f" keep_{kind}={keep}, keep_last_{kind}={there - count * size - keep}"
            )
    return said
