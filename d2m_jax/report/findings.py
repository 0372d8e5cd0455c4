"""Everything that a report tells about a run, as numbers."""

import sys
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np

from d2m_jax.config import ModelConfig
from d2m_jax.config import to_json as as_json
from d2m_jax.evaluate import latency, routing, scores
from d2m_jax.models.accounting import Account, account
from d2m_jax.report.ahead import compiled_ahead
from d2m_jax.report.comparison import By, Comparison, Verdict, compare, verdicts
from d2m_jax.report.measure import SAMPLES, Bench, Measured, cached
from d2m_jax.report.rows import Row, Run

FEWEST = 12  # prompts: two of each category, for a standard error


@dataclass(frozen=True)
class Findings:
    """What was measured of a run's rows."""

    run: Run
    prompts: dict[str, int]  # by kinds of pairs (Bench.splits)
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
    def batch(self) -> int:
        """Examples of one forward, where there are many."""
        return max(self.milliseconds)

    @property
    def gflops(self) -> dict[Row, float]:
        """Per forward of one example."""
        return {row: account.total.flops / 1e9 for row, account in self.accounts.items()}


def gather(run: Run, bench: Bench) -> Findings:
    """Measure all rows; what the bench has on disk is read."""
    count = run.config.evaluate_prompts
    prompts = {"seen": count, "held_out": max(FEWEST, count // 2)}
    if bench.judge is None:
        prompts = {"seen": min(count, SAMPLES)}
    measured = {}
    with compiled_ahead(run, bench):
        for row in run.rows:
            measured[row] = found = bench.measure(row.file_name, row, prompts)
            scores = found.scores.values()
            score = "".join(f"score {100 * s.overall.mean:.1f} %, " for s in list(scores)[:1])
            _say(f"{row.label}: {score}distillation error {found.errors['seen']:.3g}")
        sweep = _sweep(run, bench, max(FEWEST, count // 3) if bench.judge else 0)
    routed = {
        row: routing.measure(bench.program(row), bench.params(row), bench.inputs["seen"])
        for row in run.routed
    }
    accounts = {row: account(row.config) for row in run.rows}
    gflops = {row: account.total.flops / 1e9 for row, account in accounts.items()}
    milliseconds = _milliseconds(run, bench)
    rival = run.rival
    others = [] if rival is None else [s for s in run.students if s is not rival]
    against = () if rival is None else rival.rows
    compared = {row: compare(row, measured, against) for s in others for row in s.rows}
    judged = {
        row: verdicts(run, row, measured, compared.get(row, {}), gflops, milliseconds)
        for student in reversed(run.students)
        for row in student.finals
        if row.sparse
    }
    return Findings(run, prompts, accounts, milliseconds, measured, compared, judged, sweep, routed)


def _sweep(run: Run, bench: Bench, count: int) -> tuple[Row, dict[int, Measured]] | None:
    """The main student before it mixes blocks, with other numbers of experts per token, its own
    and all of them; None where the run tries none."""
    row = next((row for row in run.routed if not row.mixes), None)
    if row is None or not run.config.sweep_top_k:
        return None
    moe, prompts, found = row.config.transformer.moe, {"seen": count}, {}
    tried = {k for k in run.config.sweep_top_k if k < moe.experts}
    for k in sorted(tried | {moe.top_k, moe.experts}):
        name = f"{row.file_name}.top_{k}"
        found[k] = bench.measure(name, row, prompts, _with_top_k(row.config, k))
    _say(f"{row.label}: measured with {', '.join(map(str, found))} experts per token")
    return row, found


def _with_top_k(config: ModelConfig, k: int) -> ModelConfig:
    transformer = config.transformer
    return replace(config, transformer=replace(transformer, moe=transformer.moe.running(k)))


def _milliseconds(run: Run, bench: Bench) -> dict[int, dict[Row, float]]:
    """Per image of one forward, by batch; on disk as soon as they are known.

    Each program takes turns with the teacher's, two models at a time, and its time is told as a
    multiple of the teacher's. Rows of equal config run the same program, so they share one.
    """
    first = {bench.program(row): row for row in reversed(run.rows)}
    key = {
        "programs": [[as_json(program.config), program.dtype] for program in first],
        "device": f"{bench.mesh.size} × {jax.devices()[0].device_kind}",
        "versions": bench.versions,
        "rounds": latency.ROUNDS,
    }
    rows = list(first.values())
    times = cached(bench.folder / "latency.json", key, lambda: _measure_latency(run, bench, rows))
    of_program = dict(zip(first, times, strict=True))
    return {
        batch: {row: of_program[bench.program(row)][str(batch)] for row in run.rows}
        for batch in (1, bench.batch)
    }


def _measure_latency(run: Run, bench: Bench, rows: list[Row]) -> list[dict[str, float]]:
    """Of every row, milliseconds by batch."""
    inputs = bench.inputs["seen"][0]
    teacher = bench.program(run.teacher), bench.params(run.teacher)
    found = []
    for row in rows:
        models = [teacher]
        if row is not run.teacher:
            models.append((bench.program(row), bench.params(row)))
        found.append({n: latency.milliseconds(models, inputs, n) for n in (1, bench.batch)})
        del models  # before the next one is loaded
    usual = {n: float(np.median([taken[n][0] for taken in found])) for n in (1, bench.batch)}
    return [
        {str(batch): usual[batch] * times[-1] / times[0] for batch, times in taken.items()}
        for taken in found
    ]


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
