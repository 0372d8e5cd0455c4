"""How strong a LoRA is by what PEFT writes beside it: alpha, rank, patterns, rank stabilisation."""

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from d2m_jax import hosts
from d2m_jax.config import ConfigError, check
from d2m_jax.weights.files import safetensors
from d2m_jax.weights.files.hub import ADAPTER, LORA_CONFIG

HEADER = "lora_adapter_metadata"
PREFIX = "transformer."  # of diffusers' fields, which may be beside those of text encoders
KINDS = ("LORA", "LOHA", "LOKR")
# Those start at weights that the base model is then taken away from: the file alone is not enough.
CHANGED_BASES = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class Stated:
    """PEFT's LoraConfig, as far as a merge needs it; all of it None where nothing is stated."""

    where: str = ""
    rank: int | None = None
    alpha: float | None = None
    ranks: Mapping[str, int] = field(default_factory=dict)
    alphas: Mapping[str, float] = field(default_factory=dict)
    stabilised: bool = False  # alpha / sqrt(rank) instead of alpha / rank
    dora: bool = False

    def alpha_of(self, linear: str) -> float | None:
        """The alpha of a linear by its dotted name; None where nothing is stated."""
        return next(_matching(self.alphas, linear), self.alpha)

    def ranks_of(self, linear: str) -> list[int]:
        """The ranks that a linear may have. PEFT takes the first pattern that fits, but saves
        patterns in another order than it trained with: of several that fit, any may be meant."""
        return [*_matching(self.ranks, linear), *([] if self.rank is None else [self.rank])]

    def divisor(self, rank: int) -> float:
        """What alpha is divided by."""
        return math.sqrt(rank) if self.stabilised else rank


def _matching(patterns: Mapping[str, Any], linear: str) -> Iterator[Any]:
    """What PEFT's patterns that a name ends in stand for (utils/other.py, get_pattern_key)."""
    return (value for end, value in patterns.items() if re.match(rf"(.*\.)?({end})$", linear))


def stated(file: Path, alone: bool = False) -> Stated:
    """What the header of a LoRA file says, else adapter_config.json beside it.

    That counts for PEFT's own adapter_model.safetensors, and for a file that is `alone` with it, or
    was found in the folder given; for another, one line says that it does not.
    Raises ConfigError where either is damaged, or is of a method that cannot be merged.
    """
    text = safetensors.read_metadata(file).get(HEADER)
    if text is not None:
        return _read(f"{file}: {HEADER}", text)
    beside = file.with_name(LORA_CONFIG)
    if not beside.is_file():
        return Stated()
    others = [f for f in file.parent.glob("*.safetensors") if f.name != file.name]
    if alone or file.stem == ADAPTER or not others:
        try:
            return _read(str(beside), beside.read_text(encoding="utf-8-sig"))
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{beside}: cannot be read ({error})") from None
    hosts.say(
        f"{file}: {LORA_CONFIG} beside it not used, for there are other files; give the folder"
    )
    return Stated()


def _read(where: str, text: str) -> Stated:
    try:
        value = json.loads(text)
        if any(key.startswith(PREFIX) for key in value):
            value = {k.removeprefix(PREFIX): v for k, v in value.items() if k.startswith(PREFIX)}
        elif not {"r", "lora_alpha", "peft_type"} & value.keys():
            return Stated()  # of a text encoder alone
        ranks, alphas = (dict(value.get(f"{x}_pattern") or {}) for x in ("rank", "alpha"))
        for pattern in (*ranks, *alphas):
            re.compile(pattern)
        found = Stated(
            where=where,
            rank=int(_or(value.get("r"), 8)),  # PEFT's defaults
            alpha=float(_or(_or(value.get("lora_alpha"), value.get("alpha")), 8)),
            ranks={end: int(rank) for end, rank in ranks.items()},
            alphas={end: float(alpha) for end, alpha in alphas.items()},
            stabilised=bool(value.get("use_rslora", False)),
            dora=bool(value.get("use_dora", False)),
        )
        kind, start = str(value.get("peft_type") or "LORA"), value.get("init_lora_weights")
    except (ValueError, TypeError, AttributeError, RecursionError, re.error) as error:
        raise ConfigError(f"{where}: damaged, expected PEFT's settings as JSON ({error})") from None
    check(
        kind.upper() in KINDS, f"{where}: peft_type = {kind!r}, expected one of {', '.join(KINDS)}"
    )
    qalora = bool(value.get("use_qalora", False))
    check(not qalora, f"{where}: use_qalora = True, expected an ordinary LoRA")
    changed = isinstance(start, str) and start.lower().startswith(CHANGED_BASES)
    check(
        not changed,
        f"{where}: init_lora_weights = {start!r}, which changes the base model too; save it as an"
        " ordinary LoRA (PEFT's path_initial_model_for_weight_conversion)",
    )
    return found


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value
