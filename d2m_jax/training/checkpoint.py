"""Checkpoints of one stage through Orbax: the last n and the best, bits verified on restore."""

import json
import os
import sys
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from d2m_jax.config import ConfigError, RunConfig, to_json
from d2m_jax.weights.named_arrays import fingerprint, names, restructure


@dataclass(frozen=True)
class Restored:
    """A whole checkpoint: arrays as they were after `step` steps, and the JSON beside them."""

    step: int
    state: Any
    progress: dict[str, Any]


class Checkpoints:
    """The checkpoints of one stage, `directory`/STEP; saving goes on in the background.

    `identity` (JSON) is what a checkpoint must have been made with to be continued here.
    """

    def __init__(self, directory: Path, identity: dict[str, Any], keep: int = 2):
        self.directory, self.identity = Path(os.path.abspath(directory)), identity
        self.directory.mkdir(parents=True, exist_ok=True)
        best = checkpoint_managers.BestN(
            # The best is the last in this order.
            get_metric_fn=lambda metrics: -metrics["held_out"],
            n=1,
            keep_checkpoints_without_metrics=False,
        )
        latest = checkpoint_managers.LatestN(max(keep, 1))
        self._manager = ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=checkpoint_managers.AnyPreservationPolicy([latest, best]),
                cleanup_tmp_directories=True,
            ),
        )

    def save(self, step: int, state: Any, progress: dict[str, Any], held_out: float | None) -> None:
        """Save in the background. FloatingPointError for a NaN or infinity, nothing saved."""
        content = {
            "identity": self.identity,
            "progress": progress,
            "fingerprint": fingerprint(state),
        }
        content["checksum"] = _checksum(content)
        arguments = ocp.args.Composite(
            state=ocp.args.StandardSave(names(state)), run=ocp.args.JsonSave(content)
        )
        metrics = None if held_out is None else {"held_out": held_out}
        self._manager.save(step, args=arguments, metrics=metrics, force=True)

    def restore(self, like: Any) -> Restored | None:
        """The newest whole checkpoint, its arrays placed like those of `like`; None without one.

        A damaged one is set aside as `damaged_STEP`, with one line on stderr. Raises ConfigError
        where a checkpoint belongs to another run.
        """
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                content = self._content(step)
            except Exception as error:  # Orbax, tensorstore and JSON each have their own
                self._set_aside(step, error)
                continue
            refuse_other(self.directory / str(step), content["identity"], self.identity)
            try:
                return Restored(step, self._state(step, like, content), content["progress"])
            except Exception as error:
                self._set_aside(step, error)
        return None

    def _content(self, step: int) -> dict[str, Any]:
        content = self._manager.restore(step, args=ocp.args.Composite(run=ocp.args.JsonRestore()))
        content = dict(content["run"])
        if content.pop("checksum", None) != _checksum(content):
            raise ValueError("run/metadata is not what was saved")
        return content

    def _state(self, step: int, like: Any, content: dict[str, Any]) -> Any:
        target = {
            name: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding)
            for name, a in names(like).items()
        }
        arguments = ocp.args.Composite(state=ocp.args.StandardRestore(target))
        named = self._manager.restore(step, args=arguments)["state"]
        state = restructure(like, named)
        if fingerprint(state) != content["fingerprint"]:
            raise ValueError("state is not what was saved")
        return state

    def _set_aside(self, step: int, error: Exception) -> None:
        damaged = self.directory / str(step)
        aside = self.directory / f"damaged_{step}"
        for number in range(2, 1000):
            if not aside.exists():
                break
            aside = self.directory / f"damaged_{step}_{number}"
        damaged.rename(aside)
        self._manager.reload()
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:120]
        left = self._manager.latest_step()
        print(
            f"checkpoint {damaged} is damaged ({reason}), moved to {aside.name}; going back to "
            + ("the start of the stage" if left is None else f"step {left}"),
            file=sys.stderr,
            flush=True,
        )

    def latest_step(self) -> int | None:
        """Step of the newest finished checkpoint."""
        self._manager.wait_until_finished()
        return self._manager.latest_step()

    def close(self) -> None:
        """Wait until everything is on disk."""
        self._manager.wait_until_finished()
        self._manager.close()


def _checksum(content: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())


def open_run(directory: Path | str, config: RunConfig) -> Path:
    """The run directory of this config, made where it is new.

    Raises ConfigError where it holds a run of another config; mesh and keep_checkpoints may differ.
    """
    directory = Path(directory)
    file = directory / "config.json"
    mine = json.loads(json.dumps(to_json(config)))
    if file.exists():
        try:
            theirs = json.loads(file.read_text())
        except ValueError as error:
            raise ConfigError(f"{file}: damaged, expected JSON ({error})") from None
        free = ("mesh", "keep_checkpoints")
        refuse_other(file, *({k: v for k, v in c.items() if k not in free} for c in (theirs, mine)))
    elif (directory / "checkpoints").exists() or (directory / "metrics.jsonl").exists():
        raise ConfigError(
            f"{directory}: holds a run without config.json; expected a free directory"
        )
    directory.mkdir(parents=True, exist_ok=True)
    new = file.with_name(".config.json.new")
    new.write_text(json.dumps(mine, indent=1) + "\n")
    new.rename(file)
    return directory


def refuse_other(where: Path, theirs: dict[str, Any], mine: dict[str, Any]) -> None:
    """Raise ConfigError that names the first fields in which a run on disk differs from mine."""
    found = list(_differences(theirs, mine, ""))
    if found:
        more = f" (and {len(found) - 3} more)" if len(found) > 3 else ""
        raise ConfigError(
            f"{where}: belongs to another run: {'; '.join(found[:3])}{more};"
            " expected the same config or another run directory"
        )


def _differences(theirs: Any, mine: Any, name: str):
    if isinstance(theirs, dict) and isinstance(mine, dict):
        for key in [*theirs, *(key for key in mine if key not in theirs)]:
            absent = "(absent)"
            inner = f"{name}.{key}" if name else key
            yield from _differences(theirs.get(key, absent), mine.get(key, absent), inner)
    elif theirs != mine:
        yield f"{name} is {json.dumps(theirs)[:80]} there and {json.dumps(mine)[:80]} here"
