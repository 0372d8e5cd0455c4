"""Everything that a report tells about a run, as numbers."""

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import jax
import numpy as np

from d2m_jax.config import to_json as as_json
from d2m_jax.evaluate import latency, routing, scores
from d2m_jax.evaluate.noisy import Program
from d2m_jax.models.accounting import Account, account
from d2m_jax.report.ahead import compiled_ahead
from d2m_jax.report.comparison import By, Comparison, Verdict, compare, verdicts
from d2m_jax.report.measure import FEWEST, Bench, Measured, cached, prompt_counts
from d2m_jax.report.rows import Row, Run


@dataclass(frozen=True)
class Findings:
    """What was measured of a run's rows."""

    run: Run
    prompts: dict[str, int]  # by kinds of pairs (measure.splits)
    # Height and width in pixels of the images that FLOPs, times and maps of routing are of, where
    # it is not the only size or not the model's own.
    size: tuple[int, int] | None
    accounts: dict[Row, Account]
    milliseconds: dict[int, dict[Row, float]]  # per image of one forward, by batch
    measured: dict[Row, Measured]
    compared: dict[Row, dict[By, Comparison]]  # with the rival, of all other students' rows
    verdicts: dict[Row, dict[str, Verdict]]  # of sparse students, the main one first
    sweep: tuple[Row, dict[int, Measured]] | None  # the main MoE row by experts per token
    routing: dict[Row, tuple[list[routing.Layer], list[routing.Group]]]  # of the main student

    @property
    def judged(self) -> bool:
        """Whether images have scores."""
        return bool(self.measured[self.run.teacher].scores)

    @property
    def pixels(self) -> str:
        """`size` in words, empty where nothing need be said."""
        return "{} × {} pixels".format(*self.size) if self.size else ""

    @property
    def batch(self) -> int:
        """Examples of one forward, where there are many."""
        return max(self.milliseconds)

    @property
    def gflops(self) -> dict[Row, float]:
        """Per forward of one example."""
        return {row: account.total.flops / 1e9 for row, account in self.accounts.items()}


def gather(run: Run, bench: Bench) -> Findings:
    """Measure all rows; what the bench has on disk is read."""
    prompts = prompt_counts(run.config, bench.judge is not None)
    measured = {}
    with compiled_ahead(run, bench):
        for i, row in enumerate(run.rows, 1):
            measured[row] = found = bench.measure(row.file_name, row, prompts)
            scores = found.scores.values()
            score = "".join(f"score {100 * s.overall.mean:.1f} %, " for s in list(scores)[:1])
            error = f"distillation error {found.errors['seen']:.3g}"
            _say(f"{i} of {len(run.rows)}, {row.label}: {score}{error}")
        fewer = max(FEWEST, run.config.evaluate_prompts // 3)
        sweep = _sweep(run, bench, fewer if bench.judge else 0)
    bench.encoders.release()  # the rest has no use for them
    routed = {
        row: routing.measure(bench.program(row), bench.params(row), bench.inputs["seen"])
        for row in run.routed
    }
    tokens = math.prod(run.teacher.config.grid(*bench.size))
    accounts = {row: account(row.config, tokens) for row in run.rows}
    gflops = {row: account.total.flops / 1e9 for row, account in accounts.items()}
    milliseconds = _milliseconds(run, bench)
    compared = {
        row: compare(row, measured, rival.rows)
        for student in run.students
        for row in student.rows
        if (rival := run.rival_of(row)) is not None and rival is not student
    }
    judged = {
        row: verdicts(run, row, measured, compared.get(row, {}), gflops, milliseconds)
        for student in reversed(run.students)
        for row in student.finals
        if row.sparse
    }
    image = run.teacher.config.image
    usual = set(bench.validation.sizes) == {(image.height, image.width)}
    return Findings(
        run,
        prompts,
        None if usual else bench.size,
        accounts,
        milliseconds,
        measured,
        compared,
        judged,
        sweep,
        routed,
    )


def _sweep(run: Run, bench: Bench, count: int) -> tuple[Row, dict[int, Measured]] | None:
    """The main student, before it mixes blocks if it ever did not, with other numbers of experts
    per token, its own and all of them; None where the run tries none."""
    row = run.swept
    if row is None or not run.config.sweep_top_k:
        return None
    moe, prompts, found = row.config.transformer.moe, {"seen": count}, {}
    tried = {k for k in run.config.sweep_top_k if k < moe.experts}
    for k in sorted(tried | {moe.top_k, moe.experts}):
        name = f"{row.file_name}.top_{k}"
        found[k] = bench.measure(name, row, prompts, row.config.running(k))
    _say(f"{row.label}: measured with {', '.join(map(str, found))} experts per token")
    return row, found


def _milliseconds(run: Run, bench: Bench) -> dict[int, dict[Row, float]]:
    """Per image of one forward, by batch; on disk as soon as they are known.

    Each program takes turns with the teacher's, two models at a time, and its time is told as a
    multiple of the teacher's. Rows of equal config run the same program, so they share one.
    """
    first = {bench.program(row): row for row in reversed(run.rows)}
    teacher = cache(lambda: (bench.program(run.teacher), bench.params(run.teacher)))
    taken = {}
    for i, (program, row) in enumerate(first.items(), 1):
        _say(f"times, {i} of {len(first)}: {row.label}")
        taken[program] = _turns(run, bench, row, teacher)
    result = {}
    for batch in bench.timed:
        usual = float(np.median([times[str(batch)][0] for times in taken.values()]))
        result[batch] = {}
        for row in run.rows:
            times = taken[bench.program(row)][str(batch)]
            result[batch][row] = usual * times[-1] / times[0]
    return result


def _turns(
    run: Run, bench: Bench, row: Row, teacher: Callable[[], tuple[Program, dict]]
) -> dict[str, list[float]]:
    """By batch, milliseconds of the teacher and of a row that takes turns with it."""
    programs = [bench.program(run.teacher), bench.program(row)]
    key = {
        "programs": [[as_json(program.config), program.dtype] for program in programs],
        "images": [*bench.size, *bench.timed],
        "device": f"{bench.mesh.size} × {jax.devices()[0].device_kind}",
        "versions": bench.versions,
        "rounds": latency.ROUNDS,
    }

    def measure() -> dict[str, list[float]]:
        models, inputs = [teacher()], bench.inputs["seen"][0]
        if row is not run.teacher:
            models.append((bench.program(row), bench.params(row)))
        return {str(n): latency.milliseconds(models, inputs, n) for n in bench.timed}

    return cached(bench.folder / f"{row.file_name}.latency.json", key, measure)


def _say(line: str) -> None:
    print(f"report: {line}", file=sys.stderr, flush=True)


def to_json(findings: Findings) -> dict[str, Any]:
    """The findings for report.json; scores in percent."""
    result = {
        "prompts": findings.prompts,
        "rows": [_row(findings, row) for row in findings.run.rows],
        "rival": findings.run.rival.name if findings.run.rival else None,
    }
    if findings.sweep is not None:
        row, found = findings.sweep
        result["top_k"] = {
            "row": row.label,
            "values": [{"top_k": k, **_worth(measured)} for k, measured in found.items()],
        }
    result["routing"] = [
        {
            "row": row.label,
            "layers": [
                {"name": layer.name, **layer.health, "load_by_time": _rounded(layer.by_time)}
                for layer in layers
            ],
            "groups": [
                {"name": group.name, "use_by_time": _rounded(group.by_time)} for group in groups
            ],
        }
        for row, (layers, groups) in findings.routing.items()
    ]
    return result


def _row(findings: Findings, row: Row) -> dict[str, Any]:
    cost = findings.accounts[row].total
    return {
        "name": row.label,
        "student": row.student,
        "stage": row.stage or None,
        "steps": row.steps,
        "seconds": row.seconds,
        "parameters": cost.parameters,
        "activated": cost.activated,
        "gflops": findings.gflops[row],
        "milliseconds_per_image": {
            f"batch_{batch}": found[row] for batch, found in findings.milliseconds.items()
        },
        **_worth(findings.measured[row]),
        "against_rival": {
            f"at_equal_{by}": {
                "row": c.rival.label,
                "steps": c.rival.steps,
                "seconds": c.rival.seconds,
                "reached": c.reached,
                "error_ratio": c.error,
                **_difference(c),
            }
            for by, c in findings.compared.get(row, {}).items()
        },
        "verdicts": {
            name: {"value": verdict.value, "met": verdict.met, "text": verdict.text}
            for name, verdict in findings.verdicts.get(row, {}).items()
        },
    }


def _difference(comparison: Comparison) -> dict[str, Any]:
    score = comparison.score
    if score is None:
        return {}
    return {
        "score_difference": 100 * score.mean,
        "confidence_95": [100 * score.low, 100 * score.high],
    }


def _worth(measured: Measured) -> dict[str, Any]:
    return {"error": measured.errors, "scores": scores.to_json(measured.scores)}


def _rounded(values: np.ndarray) -> list:
    return values.round(4).tolist()
