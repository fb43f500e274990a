"""What an optimizer keeps, as tensors for a file and numbers for JSON, whichever optimizer it is."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

SLOTS = ("step", "exp_avg", "exp_avg_sq")  # what AdamW keeps for every parameter
OWN_KEYS = {"params", "lr", "lr_scale", "side", "weight_decay", "use_fallback"}  # of groups, by `build_groups`
COUNTERS = {"float32": torch.float32, "float64": torch.float64, "int64": torch.int64}
PLAIN = (bool, int, float, str, type(None))


def pack_state(optimizer: torch.optim.Optimizer, own: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """Optimizer state as tensors named `parameter/slot`; independent of the order of groups. own: by name."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in own.items()}
    return {
        f"{names[parameter]}/{slot}": value
        for parameter, slots in optimizer.state.items()
        for slot, value in slots.items()
        if isinstance(value, Tensor)
    }


def pack_numbers(optimizer: torch.optim.Optimizer, own: Mapping[str, nn.Parameter]) -> dict[str, Any]:
    """The rest of the state, JSON data: `numbers` that are no tensors, by slot and parameter, `groups`, numbers that
    all parameter groups count alike, and `slots`, how many parameters have a tensor of each. {} for AdamW.

    ValueError for anything else, which no checkpoint could hold."""
    names: dict[Any, str] = {parameter: name for name, parameter in own.items()}
    numbers: dict[str, dict[str, Any]] = {}
    slots: dict[str, int] = {}
    for parameter, kept in optimizer.state.items():
        if parameter not in names:
            raise ValueError(f"it keeps {str(parameter)[:40]!r} for no parameter")
        for slot, value in kept.items():
            if isinstance(value, Tensor):
                slots[slot] = slots.get(slot, 0) + 1
            elif isinstance(value, PLAIN) and (not isinstance(value, float) or math.isfinite(value)):
                numbers.setdefault(slot, {})[names[parameter]] = value
            else:
                raise ValueError(f"it keeps {slot}, a {type(value).__name__}, which is no tensor or number")
    groups = _pack_groups(optimizer)
    if not numbers and not groups and slots.keys() <= set(SLOTS):
        return {}
    return {"slots": slots, "numbers": numbers, "groups": groups}


def _pack_groups(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """What steps have added to parameter groups: counters, which are the same in all of them."""
    found: dict[str, Any] = {}
    for group in optimizer.param_groups:
        for key, value in group.items():
            if key in OWN_KEYS or key in optimizer.defaults:
                continue
            value = _to_number(value)
            if not isinstance(value, (*PLAIN, dict)) or found.setdefault(key, value) != value:
                raise ValueError(f"its parameter groups keep {key}, which is no number that all have in common")
    return found


def _to_number(value: Any) -> Any:
    """A counter that is a tensor as JSON data, other values as they are."""
    if isinstance(value, Tensor) and not value.dim() and value.dtype in COUNTERS.values():
        return {"dtype": str(value.dtype).removeprefix("torch."), "value": value.item()}
    return value


def _from_number(value: Any) -> Any:
    """Inverse of `_to_number`. ValueError for anything else."""
    if isinstance(value, dict):
        dtype, number = COUNTERS.get(str(value.get("dtype"))), value.get("value")
        if dtype is None or not isinstance(number, (int, float)):
            raise ValueError("is no counter")
        return torch.tensor(number, dtype=dtype)
    if not isinstance(value, PLAIN):
        raise ValueError("is no number")
    return value


def unpack_state(
    optimizer: torch.optim.Optimizer,
    own: Mapping[str, nn.Parameter],
    tensors: Mapping[str, Tensor],
    may_begin: bool = False,
    numbers: Mapping[str, Any] | None = None,
) -> None:
    """Inverse of `pack_state` and, with `numbers`, of `pack_numbers`. ValueError when the state of a parameter of `own`
    is missing or left over.

    may_begin: parameters without any state begin to train now, as after another freezing."""
    adam = isinstance(optimizer, torch.optim.AdamW) and not numbers
    counts: dict[str, int] = {}
    for key, value in tensors.items():
        name, _, slot = key.rpartition("/")
        if name not in own:
            raise ValueError(f"optim.safetensors: {key} belongs to no parameter of this model")
        parameter = own[name]
        counts[slot] = counts.get(slot, 0) + 1
        if adam:
            if slot != "step" and value.shape != parameter.shape:
                shapes = f"{tuple(value.shape)}, should be {tuple(parameter.shape)}"
                raise ValueError(f"optim.safetensors: shape of {key}: {shapes}")
            # AdamW's step counters are float32 and live with the parameter when the fused kernel is used.
            value = value.to(parameter.device, torch.float32 if slot == "step" else parameter.dtype)
        elif slot != "step" or optimizer.defaults.get("fused"):  # others count on the host
            value = value.to(parameter.device)
        optimizer.state[parameter][slot] = value
    if adam:
        _check_slots(own, tensors, may_begin)
    elif numbers:
        _unpack_numbers(optimizer, own, counts, numbers)


def drop_state(
    name: str, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any] | None
) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """What `pack_state` and `pack_numbers` found, without the parameter `name`. Damaged numbers stay as they are."""
    slots = {key.rpartition("/")[2] for key in tensors if key.rpartition("/")[0] == name}
    kept = {key: value for key, value in tensors.items() if key.rpartition("/")[0] != name}
    if not numbers:
        return kept, None
    left = copy.deepcopy(dict(numbers))
    for slot in slots:
        if isinstance(counts := left.get("slots"), dict) and isinstance(counts.get(slot), int):
            counts[slot] -= 1
    for by_name in left["numbers"].values() if isinstance(left.get("numbers"), dict) else ():
        if isinstance(by_name, dict):
            by_name.pop(name, None)
    return kept, left


def _check_slots(own: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor], may_begin: bool) -> None:
    wanted = [f"{name}/{slot}" for name, p in own.items() if p.requires_grad for slot in SLOTS]
    if may_begin:
        held = {key.rpartition("/")[0] for key in tensors}
        wanted = [key for key in wanted if key.rpartition("/")[0] in held]
    lacking = [key for key in wanted if key not in tensors]
    if tensors and lacking:
        raise ValueError(f"optim.safetensors: {len(lacking)} tensors are missing, the first is {lacking[0]}")


def _unpack_numbers(
    optimizer: torch.optim.Optimizer,
    own: Mapping[str, nn.Parameter],
    counts: Mapping[str, int],
    numbers: Mapping[str, Any],
) -> None:
    """ValueError where the numbers are damaged or are those of more tensors than there are."""
    slots, plain, groups = (numbers.get(key) for key in ("slots", "numbers", "groups"))
    if not (isinstance(slots, dict) and isinstance(plain, dict) and isinstance(groups, dict)):
        raise ValueError("state.json: optimizer is damaged; it has to hold the tables slots, numbers and groups")
    for slot in slots:
        if counts.get(slot, 0) != slots[slot]:
            raise ValueError(f"optim.safetensors: holds {counts.get(slot, 0)} tensors {slot}, should be {slots[slot]}")
    for slot, by_name in plain.items():
        for name, value in _entries(by_name):
            if name not in own or not isinstance(value, PLAIN):
                raise ValueError(f"state.json: optimizer: {slot} of {str(name)[:60]} is damaged")
            optimizer.state[own[name]][slot] = value
    for key, value in groups.items():
        for group in optimizer.param_groups:
            try:
                if key in OWN_KEYS or key in optimizer.defaults:
                    raise ValueError("is no counter")
                group[key] = _from_number(value)
            except ValueError as error:
                raise ValueError(f"state.json: optimizer: {str(key)[:60]} of the groups {error}") from None


def _entries(table: Any) -> Iterable[tuple[Any, Any]]:
    return table.items() if isinstance(table, dict) else [(None, None)]
