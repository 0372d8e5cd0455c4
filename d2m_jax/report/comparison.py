"""A student against its pruned rival, at equal steps and at equal time, and against our aims."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from d2m_jax.evaluate.scores import Estimate, paired_difference
from d2m_jax.report.measure import Measured
from d2m_jax.report.rows import Row, Run

SCORE_AIM = 0.9  # of the teacher's score, at least
ERROR_AIM = 0.75  # of the rival's error after as many steps, at most; of a Mixture of Blocks 1

# Steps of training in all, below which a student says nothing about its recipe.
FEWEST_STEPS = 100

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
    """One sentence about a row, and whether the aim that it states was met."""

    text: str
    value: float
    met: bool


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
    """How a sparse row stands to the aims: error and score beside the rival's, score and time
    beside the teacher's. `milliseconds` per image, by the images of one forward."""
    result, batch = {}, max(milliseconds)

    def judge(name: str, text: str, value: float, aim: str, met: bool) -> None:
        result[name] = Verdict(f"{text} (aim: {aim})", value, met)

    if steps := compared.get("steps"):
        most, rival = 1.0 if row.mixes else ERROR_AIM, steps.rival.student
        error = f"error {measured[row].errors['seen']:.3g} is {steps.error:.2f} × that of {rival}"
        text, met = f"{error}, {_training(steps, 'steps')}", steps.error <= most
        judge("error_of_rival", text, steps.error, f"at most {most:g}", met)
        time = compared["seconds"]
        text = f"error is {time.error:.2f} × that of {rival}, {_training(time, 'seconds')}"
        judge("error_at_equal_time", text, time.error, "below 1", time.error < 1)
        if score := steps.score:
            text = (
                f"score is {100 * score.mean:+.1f} ± {196 * score.standard_error:.1f} points from"
            )
            text += f" that of {rival}, {_training(steps, 'steps')}"
            judge("score_over_rival", text, score.mean, "above, surely", score.low > 0)
    if measured[row].scores:
        scores = [measured[model].scores["seen"].overall.mean for model in (row, run.teacher)]
        share = scores[0] / max(scores[1], 1e-12)
        text = (
            f"score {100 * scores[0]:.1f} % is {share:.2f} × the teacher's {100 * scores[1]:.1f} %"
        )
        judge("score_of_teacher", text, share, f"at least {SCORE_AIM}", share >= SCORE_AIM)
    flops = gflops[row] / gflops[run.teacher]
    time = milliseconds[batch][row] / milliseconds[batch][run.teacher]
    text = f"a forward takes {time:.2f} × the teacher's time for {flops:.2f} × its FLOPs"
    judge("time_of_teacher", f"{text}, in batches of {batch}", time, "below 1", time < 1)
    return result


def _training(comparison: Comparison, what: str) -> str:
    """How much training the rival's row had, in words."""
    return f"after as many {what}" if comparison.reached else f"which had fewer {what}"
