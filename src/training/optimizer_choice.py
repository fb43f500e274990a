"""Optimizers by name, of torch and timm, and what can be relied on with each: told by a trial on a few numbers.

A run promises exact resume, sharded weights and skipped steps without a trace. Whether an optimizer keeps these is
tried before any work, with its options, so that a list of names cannot be wrong or out of date.
"""

from __future__ import annotations

import ast
import copy
import difflib
import functools
import inspect
import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .optimizer_state import pack_numbers, pack_state, unpack_state

ADAMW = "adamw"  # torch's, fused where the device has it
# Of torch.optim: all but AdamW itself, LBFGS, which evaluates the loss several times, and SparseAdam.
TORCH = (
    "Adadelta",
    "Adafactor",
    "Adagrad",
    "Adam",
    "Adamax",
    "ASGD",
    "Muon",
    "NAdam",
    "RAdam",
    "RMSprop",
    "Rprop",
    "SGD",
)
FLAGS = {"lr": "--lr", "weight_decay": "--wd", "params": "--freeze"}  # options that are no --opt-kwargs
FOREIGN = (
    "foreach",
    "fused",
    "capturable",
    "differentiable",
)  # options of how a step is computed, which is not for the user
EPS = 1e-8  # default of --eps, and of the optimizers that it is for

Options = tuple[tuple[str, Any], ...]  # of an optimizer, by name


@dataclass(frozen=True)
class Choice:
    """An optimizer by name. home: torch or timm, which knows it as `name`."""

    home: str
    name: str

    def __str__(self) -> str:
        return f"{self.home}/{self.name}"

    @property
    def signature(self) -> Mapping[str, inspect.Parameter]:
        """What it can be told, by name."""
        return inspect.signature(self._find_class().__init__).parameters

    @property
    def has_betas(self) -> bool:
        """Whether it is told --beta1 and --beta2: a pair of betas, as AdamW has."""
        betas = self.signature.get("betas")
        return betas is not None and isinstance(betas.default, tuple) and len(betas.default) == 2

    @property
    def has_eps(self) -> bool:
        """Whether it is told --eps. Where the default is another number, so is its part in the formula."""
        eps = self.signature.get("eps")
        return eps is not None and eps.default == EPS

    @property
    def is_muon(self) -> bool:
        """Whether it is for the matrices of blocks, and AdamW takes the rest."""
        return self._find_class().__name__ == "Muon"

    def build(self, groups: list[dict[str, Any]], lr: float, options: Options) -> torch.optim.Optimizer:
        """The optimizer of these parameter groups, each with a `weight_decay`."""
        chosen = dict(options)
        if self.home == "timm":
            from timm.optim import create_optimizer_v2

            return create_optimizer_v2(groups, self.name, lr=lr, **chosen)
        if self.is_muon:
            betas = chosen.pop("betas", (0.9, 0.98))
            others = [group for group in groups if group.get("use_fallback") or not _is_flat(group)]
            matrices = [group for group in groups if not any(group is other for other in others)]
            parts = [self._find_class()(matrices, lr=lr, **chosen)] if matrices else []
            return Joined([*parts, *([torch.optim.AdamW(others, lr=lr, betas=betas)] if others else [])])
        return self._find_class()(groups, lr=lr, **chosen)

    def _find_class(self) -> Any:
        if self.home == "timm":
            from timm.optim import get_optimizer_class

            return get_optimizer_class(self.name, bind_defaults=False)
        return getattr(torch.optim, next(name for name in TORCH if name.lower() == self.name))


def _is_flat(group: Mapping[str, Any]) -> bool:
    return all(parameter.dim() == 2 for parameter in group["params"])


class Joined(torch.optim.Optimizer):
    """Several optimizers as one: their groups, and one state."""

    def __init__(self, parts: list[torch.optim.Optimizer]):
        self.parts = parts
        self.state = defaultdict(dict)
        self.defaults = {key: value for part in parts for key, value in part.defaults.items()}
        for part in parts:
            part.state = self.state
        self.param_groups = [group for part in parts for group in part.param_groups]

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step of each."""
        for part in self.parts:
            part.step()


# ---- names and options -----------------------------------------------------------------------------------------------


def list_optimizers() -> list[str]:
    """Names that --opt takes, besides those of torch and timm with `torch/` and `timm/` before them."""
    return sorted({ADAMW, *_list_timm(), *_list_torch()})


@functools.cache
def _list_timm() -> tuple[str, ...]:
    from timm import optim

    names = [name for name in optim.list_optimizers() if isinstance(name, str)]
    infos: dict[str, Any] = {name: optim.get_optimizer_info(name) for name in names}
    # Others are of apex or bitsandbytes (named by a text), take gradients of gradients, or draw random numbers (Kron).
    plain = [name for name in names if not isinstance(infos[name].opt_class, str) and not infos[name].second_order]
    return tuple(name for name in plain if infos[name].opt_class.__name__ != "Kron")


@functools.cache
def _list_torch() -> tuple[str, ...]:
    return tuple(name.lower() for name in TORCH if hasattr(torch.optim, name))  # Muon is there since 2.9


def find_optimizer(name: str) -> Choice | None:
    """The optimizer that --opt names: NAME (timm's, else torch's), timm/NAME or torch/NAME, in any case; None for
    torch's AdamW. ValueError, with the nearest names, for anything else."""
    wanted = name.lower()
    if wanted in (ADAMW, f"torch/{ADAMW}"):
        return None
    home, slash, short = wanted.rpartition("/")
    known = {"timm": _list_timm(), "torch": _list_torch()}
    for place in known if not slash else [home]:
        if short in known.get(place, ()):
            return Choice(place, short)
    near = difflib.get_close_matches(short, list_optimizers(), n=3)
    hint = f"did you mean {' or '.join(near)}?" if near else f"known are {', '.join(list_optimizers())}"
    raise ValueError(f"opt: {name!r} is no optimizer of torch or timm that a run can use; {hint}")


def parse_options(pairs: Iterable[str]) -> Options:
    """KEY=VALUE of --opt-kwargs: values as Python writes them, texts without quotes (open_clip's form). ValueError for
    anything else."""
    found: dict[str, Any] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals or not key.isidentifier():
            raise ValueError(f"opt_kwargs: {pair!r} is not KEY=VALUE, such as amsgrad=True")
        if key in found:
            raise ValueError(f"opt_kwargs: {key} is given twice; leave one out")
        try:
            found[key] = _freeze(ast.literal_eval(text))
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            found[key] = text
    return tuple(found.items())


def _freeze(value: Any) -> Any:
    """Lists as tuples."""
    if isinstance(value, (list, tuple)):
        return tuple(map(_freeze, value))
    if isinstance(value, (set, dict)):
        raise ValueError("no optimizer takes one")
    return value


def choose_options(
    choice: Choice | None, pairs: Iterable[str], betas: tuple[float, float], eps: float, momentum: float | None
) -> Options:
    """What the optimizer is told besides rate and weight decay; of AdamW what is not told by flags. ValueError for
    options that it does not have, or that have a flag."""
    options = dict(parse_options(pairs))
    flags = FLAGS if choice else FLAGS | {"betas": "--beta1 and --beta2", "eps": "--eps"}
    name = str(choice) if choice else ADAMW
    signature = choice.signature if choice else inspect.signature(torch.optim.AdamW.__init__).parameters
    valid = [key for key in signature if key not in ("self", *flags, *FOREIGN)]
    for key in options:
        if key in flags:
            raise ValueError(f"opt_kwargs: {key} is set by {flags[key]}; leave it out")
        if key not in valid:
            near = difflib.get_close_matches(key, valid, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(valid)}"
            raise ValueError(f"opt_kwargs: {name} has no {key!r}; {hint}")
        if isinstance(signature[key].default, bool) and not isinstance(options[key], bool):
            raise ValueError(f"opt_kwargs: {key}: {options[key]!r} is not True or False")
    if momentum is not None:
        if "momentum" not in signature:
            raise ValueError(f"momentum: {name} has none; leave it out")
        if "momentum" in options:
            raise ValueError("opt_kwargs: momentum is set by --momentum, too; leave one out")
        options["momentum"] = momentum
    if choice is None:
        return tuple(options.items())
    if choice.has_betas or (choice.is_muon and choice.home == "torch"):
        options.setdefault("betas", betas)
    if choice.has_eps:
        options.setdefault("eps", eps)
    elif eps != EPS:
        raise ValueError(f"eps: {eps:g} is AdamW's, {name} has another; use --eps {EPS:g}, and --opt-kwargs eps=..")
    return tuple(sorted(options.items()))


# ---- the trial -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Findings:
    """What a trial showed. problem: why a run cannot use the optimizer, or ""; sharded: whether rows of a parameter
    are updated as in the whole, so that ranks may hold shards."""

    problem: str
    sharded: bool


STEPS, RESUMED = 4, 2
SHAPES = {"matrix": (144, 132), "small": (6, 4), "vector": (12,), "scalar": ()}  # some factor sides of 128 and more


@functools.cache
def try_optimizer(choice: Choice | None, options: Options) -> Findings:
    """Take a few steps with random gradients: twice, resumed, and by halves. AdamW without options is known."""
    if choice is None and not options:
        return Findings("", True)
    generator = torch.Generator().manual_seed(0)
    begin = {key: torch.randn(shape, generator=generator).double() for key, shape in SHAPES.items()}
    gradients = [
        {key: scale * torch.randn(shape, generator=generator).double() for key, shape in SHAPES.items()}
        for scale in (1e-3, 1.0, 30.0, 1e-2)
    ]

    def begin_trial(values: Mapping[str, Tensor]) -> Trial:
        def build(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
            return choice.build(groups, 1e-2, options) if choice else torch.optim.AdamW(groups, 1e-2, **dict(options))

        return Trial(values, build)

    before = torch.random.get_rng_state(), random.getstate()
    try:
        runs = []
        for seed in (1, 2):
            torch.manual_seed(seed)
            random.seed(seed)
            runs.append(begin_trial(begin).run(gradients))
        if not _agree(*runs):
            return Findings("draws random numbers, which a resumed run cannot repeat", False)
        if not _agree(runs[0], _resume(begin_trial, begin, gradients)):
            return Findings("keeps something between steps that its state does not show", False)
        return Findings("", _by_halves(begin_trial, begin, gradients, runs[0]))
    except Exception as error:  # whatever an optimizer raises, it cannot be used with these options
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        return Findings(f"cannot be used with these options: {reason[:160]}", False)
    finally:
        torch.random.set_rng_state(before[0])
        random.setstate(before[1])


class Trial:
    """Parameters in two groups, and the optimizer to be tried."""

    def __init__(self, values: Mapping[str, Tensor], build: Callable[[list[dict[str, Any]]], torch.optim.Optimizer]):
        self.own = {key: nn.Parameter(value.clone()) for key, value in values.items()}
        decayed, spared = ([p for p in self.own.values() if (p.dim() > 1) == kind] for kind in (True, False))
        self.optimizer = build([{"params": decayed, "weight_decay": 0.1}, {"params": spared, "weight_decay": 0.0}])

    def run(self, gradients: Iterable[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Take a step for each table of gradients; the values then."""
        for step in gradients:
            for key, parameter in self.own.items():
                parameter.grad = step[key].clone()
            self.optimizer.step()
        return {key: parameter.detach().clone() for key, parameter in self.own.items()}


def _agree(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return all(torch.equal(a[key], b[key]) for key in a)


def _resume(begin: Callable[[Mapping[str, Tensor]], Trial], values: Any, gradients: Any) -> dict[str, Tensor]:
    first = begin(values)
    state = first.run(gradients[:RESUMED])
    second = begin(state)
    tensors = {key: value.clone() for key, value in pack_state(first.optimizer, first.own).items()}
    unpack_state(second.optimizer, second.own, tensors, numbers=copy.deepcopy(pack_numbers(first.optimizer, first.own)))
    return second.run(gradients[RESUMED:])


def _by_halves(
    begin: Callable[[Mapping[str, Tensor]], Trial], values: Any, gradients: Any, whole: Mapping[str, Tensor]
) -> bool:
    """Whether two halves of every parameter become what the whole becomes, and keep state of their own shape."""
    halves = []
    for part in (0, 1):

        def cut(table: Mapping[str, Tensor], part: int = part) -> dict[str, Tensor]:
            return {key: value.chunk(2)[part] if value.dim() else value for key, value in table.items()}

        trial = begin(cut(values))
        halves.append(trial.run([cut(step) for step in gradients]))
        for parameter, slots in trial.optimizer.state.items():
            kept = [value for value in slots.values() if isinstance(value, Tensor) and value.dim()]
            if any(value.shape != parameter.shape for value in kept):
                return False
    joined = {key: torch.cat([half[key] for half in halves]) if whole[key].dim() else halves[0][key] for key in whole}
    return all(torch.allclose(joined[key], whole[key], rtol=1e-9, atol=1e-12) for key in whole)
