"""The embedded demo set: generated and seeded, so that a fresh clone trains and is tested without a download.

    python -m rwkv_clip.demo --output data/demo --contact-sheet figure/demo_set.png

    OUTPUT/train.rec .idx .json        scenes with three texts each (raw, synthetic, generated)
    OUTPUT/retrieval.jsonl images/     held-out scenes, one full description each
    OUTPUT/classification/shape color  a folder of pictures per class, names.json with the templates
    OUTPUT/demo.json                   the settings; written last, so it marks a finished set

With `--language zh` the same scenes have Chinese texts, tokenized for Chinese-CLIP.

Pictures of a test or classification set are PNG; training pictures are JPEG, as in real shards.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import zip_longest
from pathlib import Path
from types import ModuleType
from typing import Literal, NamedTuple

from tqdm import tqdm

from ..tokenizer import BERT_CHINESE, CLIP_BPE
from . import captions, chinese
from .captions import TEXT_NAMES
from .pictures import draw_picture, encode_picture
from .scenes import BACKGROUNDS, Scene, draw_class_scenes, draw_test_scenes, draw_train_scene

SCHEMA = 2  # of the generator: raise it when the same settings give different images or texts
STAMP = "demo.json"
ATTRIBUTES = ("shape", "color")


class Language(NamedTuple):
    """What differs between the languages of the set."""

    words: ModuleType  # writes the texts, names the classes, lists the templates
    tokenizer: str
    context: int


LANGUAGES = {"en": Language(captions, CLIP_BPE, 32), "zh": Language(chinese, BERT_CHINESE, 48)}


@dataclass(frozen=True)
class DemoSettings:
    """What determines the set."""

    seed: int = 0
    """A different seed gives different scenes; what is held out for testing stays the same."""
    train: int = 6_000
    """Training scenes."""
    test: int = 256
    """Held-out scenes for retrieval."""
    per_class: int = 32
    """Pictures per class of the classification sets."""
    size: int = 48
    """Pixels on a side."""
    language: Literal["en", "zh"] = "en"
    """Of the texts: English or Chinese."""
    context: int | None = None
    """Tokens per text; by default 32 in English, 48 in Chinese: all texts fit, with room for "a photo of "."""
    tokenizer: str | None = None
    """Tokenizer of the training records; by default clip-bpe in English, bert-chinese in Chinese."""

    def __post_init__(self):
        if self.language not in LANGUAGES:
            raise ValueError(f"language: {self.language!r} is not one of {', '.join(LANGUAGES)}")
        language = LANGUAGES[self.language]
        for name in ("context", "tokenizer"):
            if getattr(self, name) is None:
                object.__setattr__(self, name, getattr(language, name))
        for name, least in (("train", 1), ("test", 1), ("per_class", 1), ("size", 16), ("context", 2)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: {getattr(self, name)} is too small for a demo set; use at least {least}")

    @property
    def words(self) -> ModuleType:
        """The module that writes the texts."""
        return LANGUAGES[self.language].words

    def to_json(self) -> dict[str, object]:
        """As the stamp has them; without the language where it is English, as before there were others."""
        return {key: value for key, value in asdict(self).items() if (key, value) != ("language", "en")}


@dataclass(frozen=True)
class DemoPaths:
    """Where the sets are in the folder `output`."""

    output: Path

    @property
    def train_records(self) -> Path:
        """A prefix: add .rec, .idx or .json."""
        return self.output / "train"

    @property
    def retrieval_jsonl(self) -> Path:
        return self.output / "retrieval.jsonl"

    @property
    def classification(self) -> dict[str, Path]:
        return {name: self.output / "classification" / name for name in ATTRIBUTES}


def _build_train(staging: Path, settings: DemoSettings) -> None:
    """Draw the training scenes and pack them with the same builder as users' data."""
    from ..data.build import build_records

    folder = staging / "train-images"
    folder.mkdir()
    listing = folder / "train.jsonl"
    with listing.open("w", encoding="utf-8") as file:
        for index in tqdm(range(settings.train), desc="drawing", unit="scene", disable=None):
            scene, name = draw_train_scene(settings.seed, index), f"{index:06d}.jpg"
            (folder / name).write_bytes(encode_picture(draw_picture(scene, settings.size), "jpeg"))
            os.utime(folder / name, (0, 0))  # the records' .json depends on it
            file.write(json.dumps({"image": name, **settings.words.write_texts(scene)}, ensure_ascii=False) + "\n")
    # One process draws and packs: starting more, each with its own torch, takes longer than the work.
    build_records(
        str(listing),
        str(staging / "train"),
        texts=TEXT_NAMES,
        tokenizer=settings.tokenizer,
        context=settings.context,
    )
    shutil.rmtree(folder)


def _write_retrieval(staging: Path, settings: DemoSettings) -> None:
    (staging / "images").mkdir()
    with DemoPaths(staging).retrieval_jsonl.open("w", encoding="utf-8") as file:
        for index, scene in enumerate(draw_test_scenes(settings.seed, settings.test)):
            name = f"images/{index:04d}.png"
            (staging / name).write_bytes(encode_picture(draw_picture(scene, settings.size), "png"))
            caption = settings.words.write_texts(scene)["generated"]
            file.write(json.dumps({"image": name, "caption": caption}, ensure_ascii=False) + "\n")


def _write_classes(folder: Path, attribute: str, settings: DemoSettings) -> None:
    names: dict[str, str] = {}
    named = settings.words.name_classes(attribute)
    for index, (name, scene) in enumerate(draw_class_scenes(settings.seed, attribute, settings.per_class)):
        path = folder / name / f"{index % settings.per_class:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode_picture(draw_picture(scene, settings.size), "png"))
        names[name] = named[name]
    about = {"names": names, "templates": settings.words.list_templates(attribute)}
    (folder / "names.json").write_text(json.dumps(about, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _is_finished(output: Path, settings: DemoSettings) -> bool:
    """Whether `output` holds exactly this set; ValueError where it holds anything else."""
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return False
    try:
        found = json.loads((output / STAMP).read_text())
        made = dict(found["settings"])
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(
            f"output: {output} exists and is not a finished demo set; name a new or empty folder"
        ) from None
    wanted = {"language": "en", **settings.to_json()}
    made.setdefault("language", "en")
    changes = [f"{key} {made.get(key)!r} -> {value!r}" for key, value in wanted.items() if made.get(key) != value]
    if found.get("schema") != SCHEMA:
        changes.append(f"schema {found.get('schema')!r} -> {SCHEMA!r}")
    if changes:
        raise ValueError(
            f"output: {output} holds a demo set with other settings ({', '.join(changes)}); "
            "name another folder or remove this one"
        )
    return True


def make_demo(output: str | Path, **settings) -> DemoPaths:
    """Make the demo set in the folder `output`, new or empty, and return where its sets are.

    `settings` are the fields of DemoSettings; the same settings always give the same bytes. A finished set with the
    same settings is kept; one with other settings, or any other content, is a ValueError. The set is made beside
    `output` and moved there when complete.
    """
    output, chosen = Path(output), DemoSettings(**settings)
    if _is_finished(output, chosen):
        return DemoPaths(output)
    staging = output.parent / f".{output.name}.{os.getpid()}.part"
    staging.mkdir(parents=True)
    try:
        _write_retrieval(staging, chosen)
        for attribute, folder in DemoPaths(staging).classification.items():
            _write_classes(folder, attribute, chosen)
        _build_train(staging, chosen)
        stamp = {"schema": SCHEMA, "settings": chosen.to_json(), "views": TEXT_NAMES}
        (staging / STAMP).write_text(json.dumps(stamp, indent=1) + "\n")
        if output.exists():
            output.rmdir()  # empty, or _is_finished would have complained
        os.replace(staging, output)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return DemoPaths(output)


def choose_varied(scenes: list[Scene], count: int) -> list[Scene]:
    """`count` of the scenes, the backgrounds in turn, scenes of several things first."""
    found: dict[str, list[Scene]] = {name: [] for name in BACKGROUNDS}
    for scene in sorted(scenes, key=lambda scene: len(scene.things) < 2):
        found[scene.background].append(scene)
    return [scene for turn in zip_longest(*found.values()) for scene in turn if scene is not None][:count]


def draw_contact_sheet(
    scenes: list[Scene], path: str | Path, *, size: int = 64, columns: int = 2, language: str = "en"
) -> Path:
    """Save a picture of scenes with their three texts, as seen in training: `size` pixels, enlarged. ValueError where
    no installed font has the characters of the language."""
    from PIL import Image, ImageDraw, ImageFont

    side, wide, gap, line = 192, 380, 24, 20
    bold, plain = ImageFont.load_default(13), ImageFont.load_default(15)
    texts = [LANGUAGES[language].words.write_texts(scene) for scene in scenes]
    if language != "en":
        from ..fonts import REMEDY, find_font_file

        file = find_font_file("".join(text for several in texts for text in several.values()))
        if file is None:
            raise ValueError(f"contact_sheet: {REMEDY}")
        plain = ImageFont.truetype(file, 15)
    rows = -(-len(scenes) // columns)
    cell = side + gap + wide + gap
    sheet = Image.new("RGB", (gap + columns * cell, gap + rows * (side + gap)), "white")
    draw = ImageDraw.Draw(sheet)
    for index, scene in enumerate(scenes):
        x, y = gap + index % columns * cell, gap + index // columns * (side + gap)
        sheet.paste(draw_picture(scene, size).resize((side, side), Image.Resampling.BICUBIC), (x, y))
        left, at = x + side + gap // 2 + 4, y
        for name, text in texts[index].items():
            draw.text((left, at), name, font=bold, fill=(46, 110, 170))
            at += line - 2
            for part in _wrap(text, lambda words: draw.textlength(words, font=plain) <= wide):
                draw.text((left, at), part, font=plain, fill=(30, 30, 34))
                at += line
            at += 6
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)
    return path


def _wrap(text: str, fits: Callable[[str], bool]) -> list[str]:
    lines, joint = [""], " " if text.isascii() else ""
    for word in text.split() if joint else text:
        longer = f"{lines[-1]}{joint}{word}".lstrip()
        if fits(longer) or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


def run(output: Path, settings: DemoSettings, contact_sheet: Path | None = None) -> None:
    """Make the embedded demo set: pictures of several things with three texts each, and its test sets.

    Args:
        output: new or empty folder; a finished set of the same settings is kept.
        settings: what is drawn.
        contact_sheet: also save a picture of eight scenes with their texts here.
    """
    paths = make_demo(output, **asdict(settings))
    print(f"demo set: {settings.train} training scenes in {paths.train_records}.rec")
    print(f"  {settings.test} held-out scenes in {paths.retrieval_jsonl}")
    print(f"  classes in {' and '.join(map(str, paths.classification.values()))}")
    if contact_sheet is not None:
        scenes = choose_varied([draw_train_scene(settings.seed, index) for index in range(60)], 8)
        sheet = draw_contact_sheet(scenes, contact_sheet, size=settings.size, language=settings.language)
        print(f"contact sheet: {sheet}")


def main() -> None:
    import tyro

    from ..errors import run_command

    config = (tyro.conf.OmitArgPrefixes,)
    sys.exit(run_command(lambda: tyro.cli(run, prog="python -m rwkv_clip.demo", config=config), "demo"))
