"""Composers: rules, any OpenAI-compatible server, vLLM in this process, recorded answers."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rwkv_clip.files import hash_file
from rwkv_clip.keys import find_key

from ..client import Client, Limits
from ..instruct import check_template
from ..job import Job
from ..prompt import Prompt
from ..settings import CaptionSettings, ComposeSettings, ServerSettings, parse_extra
from ..vision_captioner import VisionCaptioner
from .composer import Composer
from .openai import Asking, OpenAI
from .replay import Replay
from .rules import Rules


def make_composer(settings: ComposeSettings) -> Composer:
    """The composer that the settings name. ValueError for what does not go together."""
    if settings.composer == "rules":
        return Rules(seed=settings.seed, variant=settings.variant, context=settings.context)
    prompt = make_prompt(settings)
    if settings.composer == "replay":
        return _make_replay(settings, prompt)
    asking = Asking(
        settings.model or "",
        **{name: getattr(settings, name) for name in ("revision", "temperature", "max_tokens", "seed", "schema")},
        **{name: getattr(settings, name) for name in ("attempts", "context", "price_in", "price_out", "max_cost")},
        extra=parse_extra(settings.extra_body),
    )
    if settings.composer == "openai":
        return OpenAI(make_client(settings), prompt, asking)
    from .vllm import VLLM

    return VLLM(prompt, asking)


def make_vision_captioner(settings: CaptionSettings) -> VisionCaptioner:
    """What asks a server for captions."""
    asking = Asking(
        settings.caption_model or settings.model or "",
        revision=settings.revision,
        max_tokens=settings.caption_tokens,
        extra=parse_extra(settings.extra_body),
    )
    return VisionCaptioner(make_client(settings, settings.caption_url), asking, longest=settings.caption_side)


def make_prompt(settings: ComposeSettings) -> Prompt:
    """The prompt, which must be that of the training where the model is a student."""
    prompt = Prompt.load(settings.prompt)
    if settings.student_of:
        check_template(Path(settings.student_of), prompt)
    return prompt.ascii() if settings.ascii else prompt


def make_client(settings: ServerSettings, url: str | None = None) -> Client:
    """What asks the server, or the one at `url`. ValueError for an address that is none."""
    limits = Limits(
        concurrency=settings.concurrency,
        read=settings.deadline,
        total=settings.deadline,
        stop_after=settings.stop_after,
    )
    return Client(url or settings.base_url or "", find_key(settings.key_variable), limits)


def _make_replay(settings: ComposeSettings, prompt: Prompt) -> Replay:
    place = Path(settings.answers or "")
    records: Path | Iterable[Mapping[str, Any]] = place
    files = [place]
    if place.is_dir():
        job = Job(place)
        records, files = job.read("compose"), [job.part("compose", number) for number in range(job.count_parts())]
    replay = Replay(records, prompt, settings.attempts, settings.context, settings.schema)
    replay.decides["answers"] = hashlib.sha256(" ".join(map(hash_file, files)).encode()).hexdigest()
    return replay
