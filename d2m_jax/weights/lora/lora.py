"""LoRA files of all tools merged into a transformer: W + strength · alpha / rank · up · down, and
its kin (lora_differences.py), in float32 and with one rounding at the end.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from d2m_jax import hosts
from d2m_jax.config import SHOWN, ConfigError, FluxConfig, check, listed, suggestion
from d2m_jax.models.cut import BLOCKS, Cut
from d2m_jax.weights.files import hub, safetensors
from d2m_jax.weights.keys import flux_keys, key_table, recognise
from d2m_jax.weights.keys.key_table import Entry, Parameter, overlap, relative
from d2m_jax.weights.lora import lora_names, lora_strength
from d2m_jax.weights.lora.lora_differences import (
    Decomposed,
    Difference,
    Hadamard,
    Kronecker,
    LowRank,
    Replacement,
    Whole,
)
from d2m_jax.weights.lora.lora_linears import Linear, Tensor, linears
from d2m_jax.weights.lora.lora_strength import Stated

FILES = ("adapter_model.safetensors", "pytorch_lora_weights.safetensors")  # PEFT's and diffusers'
# The roles of lora_names that change a weight, by the start that those of one kind share.
KINDS = {"up": "LoRA", "down": "LoRA", "hada": "LoHa", "lokr": "LoKr", "diff": "diff"}
KINDS["weight"] = "weight"
NOTES = ("alpha", "reshape")  # what says something of a change and is none


@dataclass(frozen=True)
class Change:
    """What a LoRA file does to one tensor."""

    tensor: Tensor
    difference: Difference

    def array(self, exact: Mapping[str, Parameter]) -> np.ndarray:
        """What is added to the tensor, float32, in torch's layout; `exact` is the whole model in
        float32."""
        entries, shape = self.tensor.entries, self.tensor.shape
        return self.difference.array(lambda: key_table.write(entries, exact, shape, np.float32))


def read(
    path: Path | str, config: FluxConfig, scale: float = 1.0, cut: Cut | None = None
) -> list[Change]:
    """What a LoRA, a file or PEFT's folder of one, changes in a model, at a strength of `scale`.

    `cut` tells where a sparse model has what it was cut from: each neuron's row and column of a
    difference go where the neuron went, and differences of modulations into factors and biases.
    Raises ConfigError for a file that is something else, and one that lists all names that are
    unknown, incomplete or misshapen, or that change what a sparse model does not have. What is of
    text encoders is left out, with one line on stderr.
    """
    given = hub.local(path)
    path = _file(given)
    check(
        not set(BLOCKS.values()) & set(cut or {}),
        f"{path}: this model has fewer blocks than a LoRA counts; merge it into the one before",
    )
    check(math.isfinite(scale), f"{path}: a strength of {scale}, expected a finite number")
    if path.suffix.lower() not in hub.WEIGHTS:
        recognise.refuse_other(path)
    tensors, said = safetensors.read(path), lora_strength.stated(path, alone=given.is_dir())
    mine = {
        name: tensor
        for name, tensor in tensors.items()
        if not lora_names.of_text_encoder(lora_names.unwrapped(name))
    }
    encoders = [name for name in tensors if name not in mine]
    check(len(tensors) > 0, f"{path}: expected a LoRA, found no tensors of one")
    check(
        len(mine) > 0,
        f"{path}: a LoRA of text encoders alone ({listed(encoders)}), expected one of the"
        " transformer",
    )
    parts, wrong = _sorted_out(path, mine, linears(config, cut or {}))
    for linear, roles in parts:
        if linear.weight.entries[0].ours == "img_in.kernel":
            flux_keys.refuse_variant(path, _inputs(linear, roles), config.in_channels)
    changes = []
    for linear, roles in parts:
        try:
            changes += _changes(linear, roles, said, scale)
        except ConfigError as error:
            wrong.append(f"{linear.name} {error}")
    check(not wrong, f"{path}: {len(wrong)} tensors do not fit this model: {listed(wrong)}")
    differences = [c for c in changes if not isinstance(c.difference, Replacement)]
    check(len(differences) > 0, f"{path}: holds no differences of weights, expected a LoRA")
    absent = [change.tensor.name for change in changes if change.tensor.absent]
    check(
        not absent,
        f"{path}: this LoRA cannot be merged into this sparse model as a whole: it changes"
        f" {listed(absent)}, and the model's directory does not say where its neurons went; merge"
        " the LoRA into the dense model before that is cut, or take one of the attention alone",
    )
    needing = (Decomposed, Replacement)
    partial = [
        change.tensor.name
        for change in changes
        if not change.tensor.whole and isinstance(change.difference, needing)
    ]
    check(
        not partial,
        f"{path}: holds DoRA or whole tensors of {listed(partial)}, of which this model has a part"
        " alone (pruned, or of low rank); merge it into the dense model before that is cut",
    )
    dora = any(isinstance(change.difference, Decomposed) for change in changes)
    if dora and scale not in (0.0, 1.0):
        hosts.say(f"{path}: DoRA at a strength of {scale} as PEFT has it; other tools differ")
    if encoders:
        hosts.say(f"{path}: {len(encoders)} tensors of text encoders left out ({encoders[0]}, …)")
    return changes if scale else []


def _inputs(linear: Linear, roles: Mapping[str, Any]) -> int:
    """How many inputs a linear is meant to have: those of a control LoRA's first are more."""
    if "reshape" in roles:
        return _reshape(roles)[-1]
    shapes = (roles[role].shape for role in ("down", "diff", "weight") if role in roles)
    return next((shape[-1] for shape in shapes if len(shape) == 2), linear.weight.shape[-1])


def _reshape(roles: Mapping[str, Any]) -> list[int]:
    """The shape to which ComfyUI fills the weight up before it is changed."""
    return np.asarray(roles["reshape"]).astype(int).ravel().tolist() or [0]


def _file(path: Path) -> Path:
    if path.is_file():
        return path
    files = sorted(path.iterdir())
    found = [path / name for name in FILES if (path / name).is_file()][:1]
    found = found or [file for file in files if file.suffix.lower() in hub.WEIGHTS]
    if not found:
        # PEFT saves an adapter that has a name in a folder of that name.
        named = [f for f in files if any((f / name).is_file() for name in FILES)]
        if len(named) == 1:
            return _file(named[0])
        several = listed([folder.name for folder in named])
        check(not named, f"{path}: holds the LoRAs {several}; give one of these folders")
        for file in files:
            if file.is_file() and file.suffix.lower() in recognise.ENDINGS:
                recognise.refuse_other(file)
    check(
        len(found) == 1,
        f"{path}: holds {len(found)} of *.safetensors, expected one LoRA; name the file itself",
    )
    return found[0]


Parts = list[tuple[Linear, dict[str, Any]]]  # tensors by their roles


def _sorted_out(
    path: Path, tensors: Mapping[str, Any], linears: Mapping[str, Linear]
) -> tuple[Parts, list[str]]:
    """The tensors by linear and role, and what is wrong with their names."""
    parts: dict[str, tuple[Linear, dict[str, Any]]] = {}
    unknown: dict[str, lora_names.Named | None] = {}
    ignored, wrong, adapters = [], [], set()
    for name, tensor in tensors.items():
        named = lora_names.taken_apart(lora_names.unwrapped(name))
        linear = named and lora_names.look_up(named.part, linears)
        if named is None or linear is None:
            if 0 in tensor.shape:
                ignored.append(name)
            else:
                unknown[name] = named
            continue
        adapters.add(named.adapter)
        roles = parts.setdefault(linear.name, (linear, {}))[1]
        if named.role in roles and not _same(roles[named.role], tensor):
            wrong.append(f"{linear.name} has two of {named.role}, the other is {name}")
        roles[named.role] = tensor
        kind = np.dtype(tensor.dtype).name
        if "float" not in kind and named.role not in NOTES:
            wrong.append(f"{name} is {kind}, expected floating point")
        elif named.role not in NOTES and not np.isfinite(np.asarray(tensor, np.float32)).all():
            wrong.append(f"{name} holds a NaN or an infinity")
    found = lora_names.foreign(unknown)
    if found is not None:
        raise ConfigError(f"{path}: {found[0]} (it holds {found[1]}), expected a LoRA of FLUX.1")
    several = sorted(adapters - {""})
    check(len(several) < 2, f"{path}: holds the adapters {' and '.join(several)}, expected one")
    for name, named in unknown.items():
        flat = lora_names.flat(name if named is None else named.part)
        near = "" if len(wrong) >= SHOWN else _depth(flat, linears) or suggestion(flat, linears)
        wrong.append(f"{name} is unknown{near}")
    if ignored:
        hosts.say(f"{path}: empty tensors ignored: {listed(ignored)}")
    return _once(path, list(parts.values())), wrong


def _same(a: Any, b: Any) -> bool:
    return a.shape == b.shape and np.array_equal(np.asarray(a), np.asarray(b))


def _depth(flat: str, linears: Mapping[str, Linear]) -> str:
    """For the name of a block that is not there: how many such blocks there are."""
    found = re.search(r"((?:single_transformer|transformer|double|single)_blocks_)(\d+)_", flat)
    if found is None:
        return ""
    numbers = (re.match(rf"{found[1]}(\d+)_", name) for name in linears)
    depth = 1 + max((int(m[1]) for m in numbers if m), default=-1)
    return f", this model has {depth} such blocks" if int(found[2]) >= depth else ""


def _once(path: Path, parts: Parts) -> Parts:
    """Without the linears by BFL's names whose places the file changes by diffusers' names too.

    Such files hold one LoRA twice. diffusers reads them in this way
    (lora_conversion_utils.py, _convert_kohya_flux_lora_to_diffusers).
    """
    taken: dict[tuple, int] = {}  # outputs by diffusers' names, of each place
    for linear, _ in parts:
        if linear.layout == "diffusers":
            for place, count in _places(linear).items():
                taken[place] = taken.get(place, 0) + count
    twice = set()
    for linear, _ in parts:
        places = _places(linear)
        if linear.layout == "diffusers" or not places.keys() & taken.keys():
            continue
        whole = all(taken.get(place, 0) >= count for place, count in places.items())
        check(
            whole,
            f"{path}: holds {linear.name}, and parts of it by diffusers' names too, expected one or"
            " the other",
        )
        twice.add(linear.name)
    if twice:
        first = f"{len(twice)} linears by BFL's names ({min(twice)}, …)"
        hosts.say(f"{path}: {first} left out, which it holds by diffusers' names too")
    return [(linear, roles) for linear, roles in parts if linear.name not in twice]


def _places(linear: Linear) -> dict[tuple, int]:
    """Where a linear's outputs lie in our parameters, and how many of them do in each place."""
    found: dict[tuple, int] = {}
    for entry in linear.weight.entries:
        rows = linear.weight.shape[0]
        if entry.their_part is not None and entry.their_part.axis == 0:
            rows = len(np.arange(entry.their_part.stop)[entry.their_part.index])
        place = entry.ours, entry.index
        found[place] = found.get(place, 0) + rows
    return found


def _changes(linear: Linear, roles: dict[str, Any], said: Stated, scale: float) -> list[Change]:
    """What the tensors of one linear do to its weight and its bias. ConfigError, without the
    linear's name, where they do not fit it."""
    difference, factor = _difference(linear, roles, said, scale)
    changes = []
    if difference is not None:
        changes.append(Change(linear.weight, difference))
    for role, make, strength in (
        ("bias", Whole, factor),
        ("diff_b", Whole, scale),
        ("whole_bias", Replacement, scale),
    ):
        if role in roles:
            if linear.bias is None:
                raise ConfigError("has a bias, expected none")
            found, expected = tuple(roles[role].shape), linear.bias.shape
            check(found == expected, f"has a bias {list(found)}, expected {list(expected)}")
            changes.append(Change(linear.bias, make(roles[role], strength)))
    check(len(changes) > 0, f"has {' and '.join(roles)} alone, expected a difference")
    return changes


def _difference(
    linear: Linear, roles: dict[str, Any], said: Stated, scale: float
) -> tuple[Difference | None, float]:
    """The change of the weight, and what a bias beside it is multiplied by."""
    kinds = {kind for start, kind in KINDS.items() for role in roles if _of(role, start)}
    check(len(kinds) < 2, f"is changed in {len(kinds)} ways at once ({', '.join(sorted(kinds))})")
    kind, factor = next(iter(kinds), None), scale
    if kind == "LoRA":
        up, down = _pair(roles, "up", "down")
        factor = scale * _strength(linear, roles, said, down.shape[0])
        difference = LowRank(up, down, factor)
    elif kind == "LoHa":
        pairs = [_pair(roles, f"hada_{w}_a", f"hada_{w}_b") for w in ("w1", "w2")]
        factor = scale * _strength(linear, roles, said, pairs[0][1].shape[0])
        difference = Hadamard(pairs[0], pairs[1], factor)
        first, second = (LowRank(*pair, 1.0).shape for pair in pairs)
        check(
            first == second, f"has products {list(first)} and {list(second)}, expected equal ones"
        )
    elif kind == "LoKr":
        factors = [_factor_of_lokr(roles, w) for w in ("lokr_w1", "lokr_w2")]
        ranks = [parts[1].shape[0] for parts in factors if len(parts) == 2]
        factor = scale * _strength(linear, roles, said, ranks[-1] if ranks else None)
        difference = Kronecker(factors[0], factors[1], factor)
    elif kind is not None:
        make = {"diff": Whole, "weight": Replacement}[kind]
        difference = make(roles[kind], scale)
    else:
        difference = None
    if difference is not None:
        found, expected = difference.shape, linear.weight.shape
        check(found == expected, f"changes {list(found)}, expected {list(expected)}")
        fills = "reshape" not in roles or _reshape(roles) == list(expected)
        check(fills, f"fills the weight up, expected {list(expected)} as it is")
    if "magnitude" in roles or (said.dora and kind == "LoRA"):
        check("magnitude" in roles, "lacks the magnitude of a DoRA, which its settings promise")
        if difference is None or kind not in ("LoRA", "LoHa", "LoKr"):
            raise ConfigError("has the magnitude of a DoRA alone")
        difference = Decomposed(difference, roles["magnitude"])
        found = list(roles["magnitude"].shape)
        check(
            difference.fits, f"has a magnitude {found}, expected one for {list(difference.shape)}"
        )
    return difference, factor


def _of(role: str, start: str) -> bool:
    return role == start or role.startswith(f"{start}_w")


def _pair(roles: Mapping[str, Any], first: str, second: str) -> tuple[Any, Any]:
    """Two matrices to multiply."""
    absent = [role for role in (first, second) if role not in roles]
    check(not absent, f"has {' and '.join(roles)}, expected {' and '.join(absent)} too")
    a, b = (tuple(roles[role].shape) for role in (first, second))
    fit = len(a) == len(b) == 2 and a[1] == b[0] > 0
    check(fit, f"has {first} {list(a)} and {second} {list(b)}, expected two matrices to multiply")
    return roles[first], roles[second]


def _factor_of_lokr(roles: Mapping[str, Any], name: str) -> tuple[Any, ...]:
    if name not in roles:
        return _pair(roles, f"{name}_a", f"{name}_b")
    check(f"{name}_a" not in roles, f"has {name} and {name}_a, expected one of them")
    shape = list(roles[name].shape)
    check(len(shape) == 2, f"has {name} {shape}, expected a matrix")
    return (roles[name],)


def _strength(linear: Linear, roles: Mapping[str, Any], said: Stated, rank: int | None) -> float:
    """alpha / rank of a linear, 1 where nothing says otherwise; rank None: a LoKr of two whole
    factors, where alpha counts in PEFT's files only (LyCORIS, modules/lokr.py)."""
    stated, alpha = said.alpha_of(linear.name), None
    if rank is not None:
        ranks = said.ranks_of(linear.name)
        check(
            not ranks or rank in ranks,
            f"has rank {rank}, {said.where} says {' or '.join(map(str, ranks))}",
        )
        if "alpha" in roles:
            shape = list(roles["alpha"].shape)
            check(math.prod(shape) == 1, f"has alpha {shape}, expected one number")
            alpha = float(np.asarray(roles["alpha"]).astype(np.float32).reshape(()))
    elif stated is not None:
        rank = said.ranks_of(linear.name)[0]
    both = alpha is not None and stated is not None
    check(not both or alpha == stated, f"has alpha {alpha}, {said.where} says {stated}")
    alpha = stated if alpha is None else alpha
    if alpha is None or rank is None:
        return 1.0
    check(math.isfinite(alpha) and alpha != 0, f"has alpha {alpha}, expected a number other than 0")
    return alpha / said.divisor(rank)


def merge(
    params: Mapping[str, Parameter],
    exact: Mapping[str, Parameter],
    loras: Sequence[list[Change]],
) -> dict[str, Parameter]:
    """`params` with LoRAs added; `exact` are the same in float32: there is one rounding, at the
    end. Each is computed from the model as it is in `exact`, so that their order does not count."""
    by_name: dict[str, list[tuple[Entry, Change]]] = {}
    for change in (change for lora in loras for change in lora):
        for entry in change.tensor.entries:
            by_name.setdefault(entry.ours, []).append((entry, change))
    last: dict[int, np.ndarray] = {}

    def array(change: Change) -> np.ndarray:
        """Kept until the next: the experts of an FFN have a part each."""
        if id(change) not in last:
            last.clear()
            last[id(change)] = change.array(exact)
        return last[id(change)]

    return dict(params) | {
        name: _merged(params[name], exact[name], array, changes)
        for name, changes in by_name.items()
    }


def _merged(
    param: Parameter,
    exact: Parameter,
    array: Callable[[Change], np.ndarray],
    changes: list[tuple[Entry, Change]],
) -> Parameter:
    by_index: dict[tuple[int, ...], list[tuple[Entry, Change]]] = {}
    for entry, change in changes:
        by_index.setdefault(entry.index, []).append((entry, change))

    def take(region: tuple[slice, ...]):
        out = np.array(param[region])  # a model directory's arrays cannot be written to
        for index, some in by_index.items():
            block = tuple(slice(i, i + 1) for i in index) + region[len(index) :]
            block = overlap(block, region)
            if block is None:
                continue
            total = np.array(exact[block])
            for entry, change in some:
                box = entry.box(param.shape)
                common = overlap(box, block)
                if common is not None:
                    piece = entry.piece_of_theirs(array(change))
                    piece = piece[relative(common, box)[len(index) :]]
                    total[relative(common, block)] += piece
            out[relative(block, region)] = total.astype(out.dtype)
        return out

    return Parameter(param.shape, param.dtype, take)
