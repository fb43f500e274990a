"""What the demo set shows: scenes of one to three things (pictures.py draws, captions.py describes them).

Held-out rule. Two things of a scene form a group: the set of their shapes and the set of their colors. One
group in five, chosen by a hash and so the same for every seed, is kept for testing: a training scene has no
such group, and in a test scene *every* two things form one. So no two things of a test picture were ever seen
together in training, not even with their colors exchanged.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from random import Random

SHAPES = ("circle", "square", "triangle", "star", "heart", "diamond", "cross", "ring")
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "black")
SIZES = ("small", "large")
TEXTURES = ("plain", "striped", "dotted")
BACKGROUNDS = ("paper", "sky", "night", "sand", "bricks", "grass")

MIDDLE = (-1, -1)
CORNERS = tuple(itertools.product((0, 1), (0, 1)))  # (row, column), row 0 on top
HELD_OUT_EVERY = 5  # one group in this many
TWIN_EVERY = 8  # one test scene in this many belongs to a pair of twins
_MOST_DRAWS = 2_000  # draws per wanted scene before the test set is declared too large


@dataclass(frozen=True)
class Thing:
    """One object. `place` is (row, column) of a quarter of the picture, or MIDDLE."""

    shape: str
    color: str
    size: str
    texture: str
    place: tuple[int, int]


@dataclass(frozen=True)
class Scene:
    """Things on a background. `key` seeds everything that is not an attribute: jitter, wording, noise."""

    things: tuple[Thing, ...]
    background: str
    key: str

    @property
    def signature(self) -> tuple:
        """All attributes, the same for a scene and its mirror image, whatever the order of the things.

        Mirrored scenes count as one, because training may mirror pictures at random.
        """
        places = [t.place for t in self.things]
        mirrored = [place if place == MIDDLE else (place[0], 1 - place[1]) for place in places]
        sides = (
            sorted((t.shape, t.color, t.size, t.texture, place) for t, place in zip(self.things, side))
            for side in (places, mirrored)
        )
        return (self.background, *min(sides))


Group = tuple[tuple[str, ...], tuple[str, ...]]


def list_groups(scene: Scene) -> list[Group]:
    """The (shapes, colors) group of every two things of a scene, both sorted; empty for a single thing."""
    return [
        (tuple(sorted((a.shape, b.shape))), tuple(sorted((a.color, b.color))))
        for a, b in itertools.combinations(scene.things, 2)
    ]


@cache
def is_held_out(group: Group) -> bool:
    """Whether this group of shapes and colors is kept for testing."""
    digest = hashlib.sha256(repr(group).encode()).digest()
    return digest[0] * 256 + digest[1] < 65536 // HELD_OUT_EVERY


def _draw_thing(rng: Random, place: tuple[int, int]) -> Thing:
    return Thing(rng.choice(SHAPES), rng.choice(COLORS), rng.choice(SIZES), rng.choice(TEXTURES), place)


def _draw_scene(rng: Random, key: str, count: int) -> Scene:
    """A scene of `count` things of different kinds (shape, color), each in its own quarter."""
    places = [MIDDLE if rng.random() < 0.6 else rng.choice(CORNERS)] if count == 1 else rng.sample(CORNERS, count)
    while True:
        things = tuple(_draw_thing(rng, place) for place in places)
        if len({(t.shape, t.color) for t in things}) == count:
            return Scene(things, rng.choice(BACKGROUNDS), key)


def draw_train_scene(seed: int, index: int) -> Scene:
    """Training scene `index`, a pure function of both numbers: one to three things, no held-out group."""
    key = f"{seed}/train/{index}"
    rng = Random(f"{key}/scene")
    count = rng.choice((1, 1, 2, 2, 3, 3))
    while True:
        scene = _draw_scene(rng, key, count)
        if not any(map(is_held_out, list_groups(scene))):
            return scene


def _twin(scene: Scene, kind: int, key: str) -> Scene | None:
    """The same two things with colors exchanged (kind 0) or with upper and lower exchanged (kind 1)."""
    a, b = scene.things
    if kind == 0 and a.color != b.color and a.shape != b.shape:
        return Scene((replace(a, color=b.color), replace(b, color=a.color)), scene.background, key)
    if kind == 1 and a.place[0] != b.place[0]:
        return Scene((replace(a, place=b.place), replace(b, place=a.place)), scene.background, key)
    return None


def draw_test_scenes(seed: int, count: int) -> list[Scene]:
    """`count` different scenes of two or three things with held-out groups only; ValueError for too many.

    One in eight belongs to a pair of twins that only binding can tell apart: the same words, with colors or
    places exchanged. All are different from each other even when mirrored.
    """
    rng = Random(f"{seed}/test/scenes")
    scenes: list[Scene] = []
    seen: set[tuple] = set()
    twins = 2 * (count // (2 * TWIN_EVERY))
    for _ in range(_MOST_DRAWS * count):
        at = len(scenes)
        if at == count:
            return scenes
        new: list[Scene | None] = [_draw_scene(rng, f"{seed}/test/{at}", 2 if at < twins else 2 + at % 2)]
        if not all(map(is_held_out, list_groups(new[0]))):
            continue
        if at < twins:
            new.append(_twin(new[0], at // 2 % 2, f"{seed}/test/{at + 1}"))
        signatures = {scene.signature for scene in new if scene is not None}
        if len(signatures) < len(new) or signatures & seen:
            continue
        seen |= signatures
        scenes += new
    raise ValueError(f"test: {count} different held-out scenes could not be found; ask for fewer")


def draw_class_scenes(seed: int, attribute: str, per_class: int) -> Iterator[tuple[str, Scene]]:
    """(class, scene) of a classification set for "shape" or "color": one large thing in the middle each.

    The other of the two attributes cycles through its values, so that it is spread evenly over each class.
    """
    classes, others = (SHAPES, COLORS) if attribute == "shape" else (COLORS, SHAPES)
    other = "color" if attribute == "shape" else "shape"
    for name, index in itertools.product(classes, range(per_class)):
        key = f"{seed}/{attribute}/{name}/{index}"
        rng = Random(f"{key}/scene")
        chosen = {attribute: name, other: others[index % len(others)], "size": "large"}
        yield name, Scene((replace(_draw_thing(rng, MIDDLE), **chosen),), rng.choice(BACKGROUNDS), key)
