"""Checks before work begins: records, model and objective fit together, and all ranks are going to do the same."""

from __future__ import annotations

import hashlib
import logging
import socket
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import rwkv_clip
from rwkv_clip.config import ConfigError, to_dict
from rwkv_clip.data.mixture import Mixture, identify
from rwkv_clip.data.records import Records
from rwkv_clip.device import autocast_dtype
from rwkv_clip.dist import World, gather, judge_all
from rwkv_clip.losses import FACTS, Objective
from rwkv_clip.models.outputs import NAMES, SCALARS
from rwkv_clip.models.specification import ModelSpec

from .settings import ParallelSettings, Settings

# Settings that may differ between ranks: where files are and how they are read. Records, model and weights are compared
# by content; what only the main rank uses does not matter to the others.
OWN = {"train_data", "index", "image_folder", "model", "logs", "device", "workers", "loader", "report_to"}
OWN |= {"wandb_project_name", "wandb_notes", "wandb_tags"}
PLACES = {
    "pretrained",
    "pretrained_image",
    "pretrained_text",
    "val_data",
    "imagenet_val",
    "imagenet_v2",
    "resume",
    "distill_model",
    "distill_pretrained",
    "distill_features",
}  # the location may differ, but must be given
SOURCES = {".py", ".cpp", ".h", ".cu", ".cuh"}
NAMED = 5  # differences that an error lists

log = logging.getLogger(__name__)


def check_records(records: Records, spec: ModelSpec, path: str, texts: int | None = None) -> None:
    """ConfigError when the records' tokens were not made for the model's text tower.

    Judged by the side file and some records; each record read later is checked against the same vocabulary. Of a
    mixture each source is judged, under its own name instead of `path`."""
    parts = {path: records}
    if isinstance(records, Mixture):
        parts = {source.name: source.records for source in records.sources}
    problems = [problem for name, part in parts.items() for problem in _judge(part, spec, name, texts)]
    if problems:
        raise ConfigError(problems)


def _judge(records: Records, spec: ModelSpec, path: str, texts: int | None) -> list[str]:
    """Problems of the records of one source."""
    tokenizer, vocab = spec.tokenizer(), spec.vocabulary
    problems = []
    if texts is not None and len(records.text_names) < texts:
        held = f"{len(records.text_names)} ({', '.join(records.text_names)})"
        problems.append(
            f"{path}: texts per image: {held}, --texts asks for {texts}; build records with more, or ask for fewer"
        )
    if records.tokenizer is not None and records.tokenizer != tokenizer.name:
        problems.append(f"{path}: tokens come from {records.tokenizer!r}, the model reads {tokenizer.name!r}")
    if records.context != tokenizer.context:
        problems.append(
            f"{path}: {records.context} tokens per text, the model's context is {tokenizer.context}; "
            f"build the records with --context {tokenizer.context}"
        )
    if vocab is not None:
        if records.vocab_size not in (None, vocab):
            problems.append(
                f"{path}: made with a vocabulary of {records.vocab_size}, the model's has {vocab}; "
                f"build the records for this model, or use a model for these records"
            )
        elif largest := records.limit_vocab(vocab):
            problems.append(
                f"{path}: holds the token id {largest}, the model's vocabulary ends at {vocab - 1}; "
                f"build the records with the tokenizer {tokenizer.name!r}"
            )
    return problems


def check_objective(name: str, objective: Objective) -> None:
    """ConfigError when the objective asks for what no model and no batch has."""
    names = (*NAMES, *SCALARS, *FACTS, *objective.made)
    if unknown := [need for need in objective.needs if need not in names]:
        raise ConfigError([f"objective: {name} needs {', '.join(map(repr, unknown))}, valid names: {', '.join(names)}"])


def check_texts(records: Records, settings: Settings, objective: Objective) -> None:
    """ConfigError when the objective compares a different number of texts per image than it would get, or when there
    are not as many probabilities as texts."""
    names, choice = records.text_names[: settings.data.texts], settings.data.text_choice
    if (probs := settings.data.text_probs) is not None and len(probs) != len(names):
        raise ConfigError([f"text_probs: {len(probs)} numbers for the texts {', '.join(names)}; give one for each"])
    given = len(names) if choice == "all" else 1
    if objective.texts not in (None, given):
        raise ConfigError(
            [
                f"objective: {settings.loss.objective} compares {objective.texts} texts per image, but --text-choice "
                f"{choice} and texts {', '.join(names)} give it {given}; use --text-choice all "
                f"--texts {objective.texts}, and records with that many"
            ]
        )


def check_batch(settings: ParallelSettings, world: World, count: int) -> None:
    """ConfigError when a step's pairs have no negatives, or are their own. count: number of records.

    A batch in which an epoch ends may still hold a record twice: once from each epoch."""
    pairs = settings.batch_size * settings.accum_freq * world.size
    step = f"{settings.batch_size} x accum_freq {settings.accum_freq} x {world.size} ranks"
    if count < 2:
        raise ConfigError([f"train_data: {count} record, which has no negatives; at least two records are needed"])
    if pairs == 1:
        raise ConfigError([f"batch_size: {step} is one pair per step, which has no negatives; use 2 or more"])
    if pairs > count:
        raise ConfigError(
            [
                f"batch_size: {step} is {pairs} pairs per step, but there are {count} records: a pair would be its own "
                f"negative; use a smaller --batch-size, at most {count} pairs per step, or more records"
            ]
        )


def warn_of_rate(settings: Settings, world: World) -> None:
    """Warn on the main rank where the batch is at most a quarter of the recipe's, and the learning rate is not at all
    lower in proportion: fine-tuning then may end below where it began (users of Chinese-CLIP report it)."""
    recipe, parallel, lr = settings.optimizer.published, settings.parallel, settings.optimizer.lr
    pairs = parallel.batch_size * parallel.accum_freq * world.size
    if recipe.lr is None or recipe.batch is None or 4 * pairs > recipe.batch:
        return
    proposed = recipe.lr * pairs / recipe.batch
    if lr > 2 * proposed and world.is_main:
        log.warning(
            "lr: %g was published for %d pairs a step, this run has %d with lr %g; in proportion that is --lr %.1e, or "
            "take the published batch with a larger --accum-freq",
            *(recipe.lr, recipe.batch, pairs, lr, proposed),
        )


def warn_of_precision(precision: str, world: World) -> None:
    """Warn on the main rank of float16 on a CPU, which is slow there and overflows where bfloat16 does not."""
    if world.is_main and world.device.type == "cpu" and autocast_dtype(precision, world.device) == torch.float16:
        log.warning(
            "precision: %s computes in float16, which is for GPUs; on a CPU use --precision fp32, amp_bf16 or auto",
            precision,
        )


# ---- ranks -----------------------------------------------------------------------------------------------------------


def check_ranks(settings: Settings, spec: ModelSpec, records: Records, world: World) -> None:
    """ConfigError on the main rank, and its message and exit code on the others (MainRankFailed), unless all ranks have
    the same settings, model, records, version and code. It names rank and setting with both values."""
    if world.size == 1:
        return
    plan = {"host": socket.gethostname(), **describe_plan(settings, spec, records, world)}
    judge_all(world, "plan", plan, compare_plans)


def check_sources(objective: Objective, world: World) -> None:
    """ConfigError on the main rank, and its message on the others, unless what an objective reads has the same content
    on all ranks."""
    if objective.sources and world.size > 1:
        judge_all(world, "sources", {"host": socket.gethostname(), **objective.sources}, compare_plans)


def describe_plan(settings: Settings, spec: ModelSpec, records: Records, world: World) -> dict[str, Any]:
    """What must be the same on all ranks, by name; JSON data."""
    chosen = {key: value for key, value in to_dict(settings).items() if key not in OWN}
    for key in PLACES:
        if chosen[key] not in (None, "latest"):
            chosen[key] = "given"
    precision = settings.parallel.precision
    return {
        **flatten_table("", chosen),
        **flatten_table("model.", spec.to_json()),
        "precision": f"{precision} ({autocast_dtype(precision, world.device) or torch.float32})",
        **{name: describe_records(facts) for name, facts in name_sources(identify(records)).items()},
        "version": rwkv_clip.__version__,
        "code": hash_sources()[:12],
        "torch": torch.__version__,
    }


def name_sources(facts: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What `identify` says of each source, by a name that tells nothing of its place."""
    if "sources" not in facts:
        return {"train_data": facts}
    return {f"train_data source {i}": source for i, source in enumerate(facts["sources"], 1)}


def describe_records(records: dict[str, Any]) -> str:
    """Number and shortened digest, for messages."""
    return f"{records.get('count')} records ({str(records.get('digest'))[:12]})"


def compare_plans(plans: list[dict[str, Any]]) -> None:
    """ConfigError that lists what differs from rank 0's plan, with the first rank that differs for each entry."""
    first, found = plans[0], {}
    for rank, plan in enumerate(plans):
        for key in {**first, **plan}:
            if key != "host" and key not in found and first.get(key) != plan.get(key):
                found[key] = (
                    f"{key}: rank {rank} on {plan['host']} has {plan.get(key)!r}, rank 0 on {first['host']} "
                    f"{first.get(key)!r}"
                )
    if found:
        listed = list(found.values())
        more = [f".. and {len(listed) - NAMED} others"] if len(listed) > NAMED else []
        raise ConfigError(["ranks: start all with the same settings, records and code", *listed[:NAMED], *more])


def flatten_table(prefix: str, table: dict[str, Any]) -> dict[str, Any]:
    """A nested table flattened to its leaves, by dotted names that start with `prefix`."""
    flat: dict[str, Any] = {}
    for key, value in table.items():
        flat |= flatten_table(f"{prefix}{key}.", value) if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def hash_sources() -> str:
    """sha256, in hexadecimal, of names and contents of the source files of library and training, however installed."""
    library, training = Path(rwkv_clip.__file__).parent, Path(__file__).parent
    files = {f"training/{path.relative_to(training)}": path for path in training.glob("**/*")}
    for path in (library, *library.iterdir()):
        if path.is_dir() and path.name not in ("training", "eval"):
            files |= {str(file.relative_to(library)): file for file in path.glob("*" if path == library else "**/*")}
    found = hashlib.sha256()
    for name in sorted(files):
        if files[name].suffix in SOURCES:
            content = files[name].read_bytes()
            found.update(f"{name} {len(content)}\n".encode())
            found.update(content)
    return found.hexdigest()


def check_weights(modules: Iterable[nn.Module], world: World) -> None:
    """ConfigError, on all ranks, unless all start with the same weights. A collective."""
    if world.size == 1:
        return
    sums = gather(torch.tensor([[hash_weights(module) for module in modules]], device=world.device)).tolist()
    others = [rank for rank, found in enumerate(sums) if found != sums[0]]
    if others:
        raise ConfigError(
            [
                f"weights: rank {others[0]} starts with other weights than rank 0 ({len(others)} of {world.size} ranks "
                f"do); all need the same file of --pretrained weights and the same versions of torch and open_clip"
            ]
        )


def hash_weights(model: nn.Module) -> int:
    """63 bits from names, shapes and the sum of the bits of each tensor. Reads each tensor once, on its device: 0.13 s
    for 150 million parameters on a CPU core."""
    state = model.state_dict()
    if not state:
        return 0
    sums = torch.stack([_sum_bits(x).cpu() for x in state.values()]).tolist()
    text = repr([(key, tuple(x.shape), str(x.dtype), found) for (key, x), found in zip(state.items(), sums)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def _sum_bits(x: Tensor) -> Tensor:
    x = x.detach()
    bits = (x.clone() if x.storage_offset() else x.contiguous()).reshape(-1).view(torch.uint8)
    even = len(bits) // 8 * 8  # 25 times as fast as by 4 bytes
    return bits[:even].view(torch.int64).sum() + bits[even:].sum(dtype=torch.int64)
