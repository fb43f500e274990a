"""Three texts per scene of the demo set, as in RWKV-CLIP: noisy alt-text, terse caption, rich description."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random

from .scenes import BACKGROUNDS, COLORS, MIDDLE, SHAPES, Scene, Thing

TEXT_NAMES = ("raw", "synthetic", "generated")
WRONG_FRACTION = 0.15  # of raw texts have one wrong attribute
USELESS_FRACTION = 0.08  # of raw texts say nothing about the picture

_ON = {name: f"on {name}" for name in BACKGROUNDS} | {"sky": "in the sky", "night": "in the night"}
_ROWS, _COLUMNS = ("top", "bottom"), ("left", "right")
_FILES = ("IMG_{}.jpg", "DSC_{}.JPG", "image{}.png", "photo-{}.jpeg", "untitled {}")
_BEFORE = ("free download", "buy", "new", "stock photo", "cute", "best", "vintage", "sale!", "DIY")
_AFTER = ("wallpaper", "clip art", "sticker", "for kids", "vector", "print", "free shipping", "| shop", "thumbnail")
_TAGS = ("#art", "#shapes", "#design", "#love", "#photo", "#fun", "#instagood", "#decor")


def name_classes(attribute: str) -> dict[str, str]:
    """Class of "shape" or "color" -> its name in prompts."""
    return {name: name for name in (SHAPES if attribute == "shape" else COLORS)}


def list_templates(attribute: str) -> list[str]:
    """Prompts for the classes of "shape" or "color": `{}` takes the class, the other attribute varies."""
    if attribute == "shape":
        return [f"a large plain {color} {{}} in the middle" for color in COLORS]
    return [f"a large plain {{}} {shape} in the middle" for shape in SHAPES]


def _with_article(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _name_kind(thing: Thing, colored: bool) -> str:
    return _with_article(f"{thing.color} {thing.shape}" if colored else thing.shape)


def _name_fully(thing: Thing) -> str:
    return _with_article(f"{thing.size} {thing.texture} {thing.color} {thing.shape}")


def relate(a: Thing, b: Thing) -> str:
    """Where a is as seen from b, as a preposition; rows come before columns."""
    if a.place[0] != b.place[0]:
        return "above" if a.place[0] < b.place[0] else "below"
    return "left of" if a.place[1] < b.place[1] else "right of"


def _name_place(thing: Thing) -> str:
    if thing.place == MIDDLE:
        return "in the middle"
    return f"at the {_ROWS[thing.place[0]]} {_COLUMNS[thing.place[1]]}"


def order_three(things: tuple[Thing, ...]) -> tuple[Thing, Thing, Thing]:
    """(pivot, its neighbour in the row, its neighbour in the column) of three things in three quarters."""
    pivot = next(
        t
        for t in things
        if any(o.place[0] == t.place[0] for o in things if o is not t)
        and any(o.place[1] == t.place[1] for o in things if o is not t)
    )
    row = next(t for t in things if t is not pivot and t.place[0] == pivot.place[0])
    column = next(t for t in things if t is not pivot and t is not row)
    return pivot, row, column


def write_synthetic(scene: Scene, rng: Random) -> str:
    """A terse caption: shapes and their arrangement, in two scenes of five their colors, sometimes the background.

    Without colors it fits many scenes, as a captioner's terse sentences do; and it can be matched by shape alone, which
    would otherwise hardly help next to color, texture, place and background.
    """
    things = rng.sample(scene.things, len(scene.things))
    ground = f" {_ON[scene.background]}" if rng.random() < 0.4 else ""
    colored = rng.random() < 0.4
    if len(things) == 1:
        return f"{_name_kind(things[0], colored)}{ground}"
    if len(things) == 2:
        a, b = things
        return f"{_name_kind(a, colored)} {relate(a, b)} {_name_kind(b, colored)}{ground}"
    if rng.random() < 0.5:
        a, b, c = order_three(scene.things)
        near, far = f"{_name_kind(b, colored)} {relate(b, a)}", f"{_name_kind(c, colored)} {relate(c, a)}"
        return f"{near} {_name_kind(a, colored)} and {far} it{ground}"
    a, b, c = (_name_kind(thing, colored) for thing in things)
    return f"{a}, {b} and {c}{ground}"


def write_generated(scene: Scene, rng: Random) -> str:
    """A description that names every attribute and every place: it fits one scene only."""
    ground = _ON[scene.background]
    if len(scene.things) == 1:
        (thing,) = scene.things
        return f"{_name_fully(thing)} {_name_place(thing)}, {ground}"
    if len(scene.things) == 2:
        a, b = rng.sample(scene.things, 2)
        if a.place[0] == b.place[0]:
            side = f"at the {_ROWS[a.place[0]]}"
        elif a.place[1] == b.place[1]:
            side = f"on the {_COLUMNS[a.place[1]]}"
        else:
            return f"{_name_fully(a)} {_name_place(a)} and {_name_fully(b)} {_name_place(b)}, {ground}"
        return f"{_name_fully(a)} {relate(a, b)} {_name_fully(b)} {side}, {ground}"
    a, b, c = order_three(scene.things)
    first = f"{_name_fully(b)} {relate(b, a)} {_name_fully(a)}"
    return f"{first} with {_name_fully(c)} {relate(c, a)} it, {ground}"


def choose_attributes(thing: Thing, rng: Random, wrong: bool) -> tuple[str, str]:
    """Color and shape that a text gives a thing; `wrong` substitutes another of one of them."""
    if wrong and rng.random() < 0.5:
        return rng.choice([c for c in COLORS if c != thing.color]), thing.shape
    if wrong:
        return thing.color, rng.choice([s for s in SHAPES if s != thing.shape])
    return thing.color, thing.shape


def _name_loosely(thing: Thing, rng: Random, wrong: bool) -> str:
    """Some of the thing's words."""
    color, shape = choose_attributes(thing, rng, wrong)
    words = [word for word in (thing.size, thing.texture) if rng.random() < 0.3]
    words += [color] if rng.random() < 0.85 else []
    return " ".join([*words, shape])


def name_in_any_order(scene: Scene, rng: Random, name: Callable[[Thing, Random, bool], str]) -> list[str]:
    """What `name(thing, rng, wrong)` calls each thing, in random order; one of them may be wrong."""
    wrong = rng.randrange(len(scene.things)) if rng.random() < WRONG_FRACTION else -1
    order = rng.sample(range(len(scene.things)), len(scene.things))
    return [name(scene.things[i], rng, i == wrong) for i in order]


def write_raw(scene: Scene, rng: Random) -> str:
    """A web alt-text: loose words with noise around them, sometimes wrong, sometimes only a file name."""
    file = rng.choice(_FILES).format(rng.randint(10, 9999))
    if rng.random() < USELESS_FRACTION:
        return rng.choice((file, f"{rng.choice(_BEFORE)} {file}", " ".join(rng.sample(_TAGS, 3))))
    named = name_in_any_order(scene, rng, _name_loosely)
    if rng.random() < 0.3:
        named.append(scene.background)
    text = rng.choice((" ", ", ", " and ", " - ")).join(named)
    style = rng.randrange(6)
    if style == 0:
        text = f"{file} {text}"
    elif style == 1:
        text = f"{rng.choice(_BEFORE)} {text}"
    elif style == 2:
        text = f"{text} {rng.choice(_AFTER)}"
    elif style == 3:
        text = f"{text} {' '.join(rng.sample(_TAGS, 2))}"
    elif style == 4:
        text = text.upper() if rng.random() < 0.5 else text.title()
    return text


def write_texts(scene: Scene) -> dict[str, str]:
    """The three texts of a scene by name; the same scene gives the same texts."""
    return write_each(scene, (write_raw, write_synthetic, write_generated))


def write_each(scene: Scene, writers: Sequence[Callable[[Scene, Random], str]], language: str = "") -> dict[str, str]:
    """Raw, synthetic and generated text by these writers; their random numbers follow from scene, language and name."""
    named = zip(TEXT_NAMES, writers)
    return {name: write(scene, Random(f"{scene.key}/{language}{name}")) for name, write in named}
