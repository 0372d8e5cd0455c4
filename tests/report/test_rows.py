"""What a run directory holds, and what is said where it does not."""

import json

import pytest

from d2m_jax.config import ConfigError
from d2m_jax.report import rows


def test_history_goes_on_through_the_stages(tmp_path):
    lines = [
        {"step": 0, "stage": "moe", "loss": 3.0},
        {"step": 20, "stage": "moe", "loss": 2.0, "seconds": 5.0},
        {"step": 0, "stage": "mob", "loss": 2.5},
        {"step": 10, "stage": "mob", "loss": 1.5, "seconds": 4.0},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = rows.history(tmp_path, ["moe", "mob"])
    assert [(line["step"], line["seconds"]) for line in found] == [
        (0, 0),
        (20, 5),
        (20, 5),
        (30, 9),
    ]
    assert rows.history(tmp_path, ["mob"])[-1]["seconds"] == 4
    with pytest.raises(ConfigError, match="lines of stage shared, found none"):
        rows.history(tmp_path, ["shared"])
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "stage"')
    with pytest.raises(ConfigError, match="metrics.jsonl, line 1: damaged"):
        rows.history(tmp_path, ["moe"])


@pytest.mark.parametrize(
    "config, message",
    [
        (None, "config.json: no such file"),
        ("{", "config.json: damaged"),
        ('{"name": "a", "stagez": {}}', r"stagez: unknown field, did you mean stages\?"),
        (
            '{"name": "a", "model": {}, "stages": {"flow": {"kind": "flow"}}}',
            "teacher = None: a report compares with a teacher",
        ),
        (
            '{"name": "a", "teacher": "no/such", "stages": {"moe": {}}}',
            "teacher = no/such: found nothing in",
        ),
    ],
)
def test_what_is_no_run_is_refused(tmp_path, config, message):
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    with pytest.raises(ConfigError, match=message):
        rows.read(tmp_path)
