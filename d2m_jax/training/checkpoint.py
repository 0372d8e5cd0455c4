"""Checkpoints of one stage through Orbax: the last n and the best, bits verified on restore."""

import json
import os
import time
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from d2m_jax import hosts
from d2m_jax.config import (
    ConfigError,
    MeshConfig,
    RunConfig,
    StageConfig,
    differences,
    first_line,
    from_json,
    to_json,
)
from d2m_jax.named_arrays import fingerprint, names, restructure
from d2m_jax.output import write_json
from d2m_jax.training import lock
from d2m_jax.weights.directory import orbax_blocks

# What else a run leaves in its directory.
OWN = {"tensorboard", "samples", "evaluation", "report", "wandb", "wandb.json"}
# Starts of names that a process that died may leave: config.json half-written, the lock.
LEFT = (".config.json.", lock.FILE)
# What a run directory holds once something was made in it.
BEGUN = ("checkpoints", "metrics.jsonl", "models", "rivals", "model")


@dataclass(frozen=True)
class Restored:
    """A whole checkpoint: arrays as they were after `step` steps, and the JSON beside them."""

    step: int
    state: Any
    progress: dict[str, Any]


class Checkpoints:
    """The checkpoints of one stage, `directory`/STEP; saving goes on in the background.

    Of several processes all call everything here, on one file system: each writes and reads its
    part of the arrays, in whatever mesh; what is done once, the first does.

    `identity` (JSON; `stage` is the StageConfig's as `stage_to_go_on` has it) is what a checkpoint
    must have been made with to be continued here.
    """

    def __init__(self, directory: Path, identity: dict[str, Any], keep: int = 2):
        self.directory, self.identity = Path(os.path.abspath(directory)), identity
        hosts.by_first(lambda: self.directory.mkdir(parents=True, exist_ok=True))
        best = checkpoint_managers.BestN(
            # The best is the last in this order.
            # "held_out" in checkpoints of earlier versions.
            get_metric_fn=lambda metrics: -metrics.get("validation", metrics.get("held_out")),
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

    def save(
        self, step: int, state: Any, progress: dict[str, Any], validation: float | None
    ) -> None:
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
        metrics = None if validation is None else {"validation": validation}
        self._manager.save(step, args=arguments, metrics=metrics, force=True)

    def restore(self, like: Any) -> Restored | None:
        """The newest whole checkpoint, its arrays placed like those of `like`; None without one.

        A damaged one is set aside as `damaged_STEP`, with one line on stderr. Raises ConfigError
        where a checkpoint belongs to another run.
        """
        for step in hosts.by_first(lambda: sorted(self._manager.all_steps(), reverse=True)):
            content, damage = hosts.by_first(lambda step=step: self._content(step))
            if damage is None:
                refuse_other(self.directory / str(step), content["identity"], self.identity)
                state, damage = self._state(step, like, content["fingerprint"])
            if damage is None:
                return Restored(step, state, content["progress"])
            hosts.by_first(lambda step=step, damage=damage: self._set_aside(step, damage))
            self._manager.reload()
        return None

    def _content(self, step: int) -> tuple[dict[str, Any] | None, str | None]:
        """What is beside the arrays, or why it cannot be read."""
        try:
            content = json.loads((self.directory / str(step) / "run" / "metadata").read_text())
            if content.pop("checksum", None) != _checksum(content):
                raise ValueError("run/metadata is not what was saved")
        except Exception as error:  # of files and JSON; damage can look like anything
            return None, first_line(error)
        identity = content["identity"]
        if "stage" in identity:  # as this version has it
            stage = from_json(StageConfig, identity["stage"])
            identity["stage"] = to_json(stage_to_go_on(stage))
        return content, None

    def _state(self, step: int, like: Any, expected: str) -> tuple[Any, str | None]:
        """The arrays, or why any process cannot read them."""
        target = {
            name: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding)
            for name, a in names(like).items()
        }
        state, damage = None, None
        try:
            # Not by the manager: it would wait for a process whose part is damaged.
            state = restructure(
                like, orbax_blocks.read(self.directory / str(step) / "state", target)
            )
        except Exception as error:  # Orbax and tensorstore each have their own
            damage = first_line(error)
        damage = next(filter(None, hosts.gather(damage)), None)
        if damage is None:
            try:
                if fingerprint(state) != expected:
                    damage = "state is not what was saved"
            except FloatingPointError as error:
                damage = str(error)
        return state, damage

    def _set_aside(self, step: int, damage: str) -> None:
        damaged = self.directory / str(step)
        aside = self.directory / f"damaged_{step}"
        for number in range(2, 1000):
            if not aside.exists():
                break
            aside = self.directory / f"damaged_{step}_{number}"
        damaged.rename(aside)
        left = max((s for s in self._manager.all_steps() if s != step), default=None)
        hosts.say(
            f"checkpoint {damaged} is damaged ({damage}), moved to {aside.name}; going back to "
            + ("the start of the stage" if left is None else f"step {left}")
        )

    def latest_step(self) -> int | None:
        """Step of the newest finished checkpoint."""
        self._manager.wait_until_finished()
        return hosts.by_first(self._manager.latest_step)

    def close(self) -> None:
        """Wait until everything is on disk."""
        self._manager.wait_until_finished()
        self._manager.close()


class NoCheckpoints:
    """The same for a training that nobody can go on with: nothing is kept."""

    def save(
        self, step: int, state: Any, progress: dict[str, Any], validation: float | None
    ) -> None:
        """Nothing."""

    def restore(self, like: Any) -> Restored | None:
        """None."""

    def latest_step(self) -> int | None:
        """None."""

    def close(self) -> None:
        """Nothing to wait for."""


def stage_to_go_on(stage: StageConfig) -> StageConfig:
    """A stage without what may change when it goes on: how a step is computed, which moves results
    by rounding alone, and what is left on the way."""
    optimizer = replace(stage.optimizer, accumulate=1)
    return replace(stage, optimizer=optimizer, remat=True, checkpoint_every=0, sample_every=0)


def _to_go_on(config: RunConfig) -> dict[str, Any]:
    """The same of a run, as JSON."""

    def plain(stages: Mapping[str, StageConfig]) -> dict[str, StageConfig]:
        return {name: stage_to_go_on(stage) for name, stage in stages.items()}

    rivals = {n: replace(r, stages=plain(r.stages)) for n, r in config.rivals.items()}
    stages, how = plain(config.stages), {"mesh": MeshConfig(), "keep_checkpoints": 1, "wandb": None}
    return to_json(replace(config, stages=stages, rivals=rivals, **how))


def _checksum(content: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())


def open_run(directory: Path | str, config: RunConfig) -> Path:
    """The run directory of this config, made where it is new.

    Raises ConfigError where it holds a run of another config (mesh, keep_checkpoints and wandb may
    differ, and of a stage what `stage_to_go_on` leaves out), and where not all processes see it.
    """
    directory = Path(hosts.by_first(lambda: str(_open_run(Path(directory), config))))
    blind = [
        i for i, sees in enumerate(hosts.gather(_appears(directory / "config.json"))) if not sees
    ]
    if blind:
        raise ConfigError(
            f"{directory}: process {blind[0]} does not see what process 0 writes there; expected a"
            " directory on a file system that all processes share"
        )
    return directory


def _appears(file: Path) -> bool:
    """Whether a file is there, or soon: network file systems may remember that it was not."""
    for _ in range(30):
        if file.exists():
            return True
        time.sleep(1)
    return False


def _open_run(directory: Path, config: RunConfig) -> Path:
    file = directory / "config.json"
    mine = json.loads(json.dumps(to_json(config)))
    begun = [name for name in BEGUN if (directory / name).exists()]
    if file.exists():
        try:
            saved = json.loads(file.read_text())
        except ValueError as error:
            raise ConfigError(f"{file}: damaged, expected JSON ({error})") from None
        try:
            theirs = from_json(RunConfig, saved, str(file))
        except ConfigError as error:
            message = f"{error}: not the config of a run; expected a new directory, or a run's"
            raise ConfigError(message) from None
        # A run that failed before its first training left nothing that another would spoil.
        if begun:
            refuse_other(file, _to_go_on(theirs), _to_go_on(config))
    elif others := _others(directory):
        raise ConfigError(
            f"{directory}: holds other things ({', '.join(others[:3])}), expected a new directory"
        )
    elif {"checkpoints", "metrics.jsonl"} & set(begun):
        raise ConfigError(f"{directory}: holds a run without config.json; expected a new directory")
    write_json(file, mine)
    return directory


def _others(directory: Path) -> list[str]:
    """Names in a directory that no run makes."""
    found = [path.name for path in directory.iterdir()] if directory.is_dir() else []
    mine = OWN.union(BEGUN)
    return sorted(n for n in found if n not in mine and not n.startswith(LEFT))


def refuse_other(where: Path, theirs: dict[str, Any], mine: dict[str, Any]) -> None:
    """Raise ConfigError that names the first fields in which a run on disk differs from mine."""
    found = [
        f"{name} is {json.dumps(there)[:80]} there and {json.dumps(here)[:80]} here"
        for name, there, here in differences(theirs, mine)
    ]
    if found:
        more = f" (and {len(found) - 3} more)" if len(found) > 3 else ""
        raise ConfigError(
            f"{where}: belongs to another run: {'; '.join(found[:3])}{more};"
            " expected the same config or another run directory"
        )
