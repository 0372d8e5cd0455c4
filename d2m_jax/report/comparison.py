"""A student against the pruned rival, at equal steps and at equal time, and against our aims."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from d2m_jax.evaluate.scores import Estimate, paired_difference
from d2m_jax.report.measure import Measured
from d2m_jax.report.rows import Row, Run

SCORE_AIM, ERROR_AIM = 0.9, 0.8  # of the teacher's score, at least; of the rival's error, at most

By = Literal["steps", "seconds"]


@dataclass(frozen=True)
class Comparison:
    """A row against the rival after as much training, or the most it had (`reached` is False)."""

    by: By
    rival: Row
    reached: bool
    # By how much the row's score on seen pairs is higher, over the same prompts; None: not judged.
    score: Estimate | None
    error: float  # the row's distillation error over the rival's


@dataclass(frozen=True)
class Verdict:
    """One sentence about a row; `met` says whether an aim was met, None where there is none."""

    text: str
    value: float
    met: bool | None = None


def rival_at(row: Row, rival: Sequence[Row], by: By) -> tuple[Row, bool]:
    """The rival's row with the least training that is at least this row's; else its last, False."""
    amounts = {other: getattr(other, by) for other in rival}
    enough = [other for other in rival if amounts[other] >= getattr(row, by)]
    if enough:
        return min(enough, key=amounts.__getitem__), True
    return max(rival, key=amounts.__getitem__), False


def compare(
    row: Row, measured: Mapping[Row, Measured], rival: Sequence[Row]
) -> dict[By, Comparison]:
    """Both comparisons of a row."""
    result = {}
    for by in ("steps", "seconds"):
        other, reached = rival_at(row, rival, by)
        mine, theirs = measured[row], measured[other]
        result[by] = Comparison(
            by,
            other,
            reached,
            paired_difference(mine.scores["seen"], theirs.scores["seen"]) if mine.scores else None,
            mine.errors["seen"] / max(theirs.errors["seen"], 1e-12),
        )
    return result


def note(row: Row, comparison: Comparison) -> str:
    """What one should know where the rival's row does not have the same training; else empty."""
    rival, by = comparison.rival, comparison.by
    amounts = getattr(row, by), getattr(rival, by)
    mine, theirs = (f"{a:,} steps" if by == "steps" else f"{a:,.1f} s" for a in amounts)
    if not comparison.reached:
        return (
            f"{row.label} trained {mine}, longer than the rival ever did: compared with"
            f" {rival.label}, {theirs}"
        )
    if mine == theirs:
        return ""
    return f"{row.label} trained {mine}: compared with {rival.label}, {theirs}, the next after it"


def verdicts(
    run: Run,
    row: Row,
    measured: Mapping[Row, Measured],
    compared: Mapping[By, Comparison],
    gflops: Mapping[Row, float],
    milliseconds: Mapping[int, Mapping[Row, float]],
) -> dict[str, Verdict]:
    """How a sparse row stands to the aims: score, distillation error, time beside FLOPs.
    `milliseconds` per image, by the images of one forward."""
    result, batch = {}, max(milliseconds)
    if measured[row].scores:
        scores = [measured[model].scores["seen"].overall.mean for model in (row, run.teacher)]
        share = scores[0] / max(scores[1], 1e-12)
        met = share >= SCORE_AIM
        result["score_of_teacher"] = Verdict(
            f"score {100 * scores[0]:.1f} % is {share:.2f} × the teacher's {100 * scores[1]:.1f} %"
            f" (aim: at least {SCORE_AIM}, {'met' if met else 'missed'})",
            share,
            met,
        )
    if steps := compared.get("steps"):
        met = steps.error <= ERROR_AIM
        result["error_of_rival"] = Verdict(
            f"distillation error {measured[row].errors['seen']:.3g} is {steps.error:.2f} × that of"
            f" {steps.rival.label} (aim: at most {ERROR_AIM}, {'met' if met else 'missed'})",
            steps.error,
            met,
        )
    flops = gflops[row] / gflops[run.teacher]
    time = milliseconds[batch][row] / milliseconds[batch][run.teacher]
    extra = time - flops
    overhead = (
        f"; the other {extra:.2f} are what routing, sorting and small matrices cost at width"
        f" {row.config.transformer.hidden_size}"
    )
    result["time_of_teacher"] = Verdict(
        f"{flops:.2f} × the teacher's FLOPs take {time:.2f} × its time (in batches of {batch})"
        + (overhead if extra > 0.05 else ""),
        time,
    )
    return result
