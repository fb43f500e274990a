"""The three texts per scene of the demo set in Chinese: noisy alt-text, terse caption, full description."""

from __future__ import annotations

from random import Random

from .captions import USELESS_FRACTION, choose_attributes, name_in_any_order, order_three, relate, write_each
from .scenes import COLORS, MIDDLE, SHAPES, Scene, Thing

SHAPES_ZH = dict(zip(SHAPES, ("圆形", "正方形", "三角形", "五角星", "心形", "菱形", "十字", "圆环")))
COLORS_ZH = dict(zip(COLORS, ("红色", "橙色", "黄色", "绿色", "蓝色", "紫色", "粉色", "黑色")))
SIZES_ZH = {"small": "小", "large": "大"}
TEXTURES_ZH = {"plain": "纯色", "striped": "条纹", "dotted": "圆点"}
GROUNDS_ZH = {"paper": "纸", "sky": "天空", "night": "夜空", "sand": "沙地", "bricks": "砖墙", "grass": "草地"}
_ON = {name: f"{word}上" for name, word in GROUNDS_ZH.items()} | {"sky": "天空中", "night": "夜空中"}
_RELATIONS = {"above": "上方", "below": "下方", "left of": "左边", "right of": "右边"}
_ROWS, _COLUMNS = ("上", "下"), ("左", "右")
_BEFORE = ("免费下载", "新款", "热卖", "可爱", "高清", "正品", "复古", "促销", "手工")
_AFTER = ("壁纸", "图片", "贴纸", "素材", "包邮", "装饰画", "儿童玩具", "现货", "缩略图")
_FILES = ("IMG_{}.jpg", "微信图片{}.jpg", "图片{}.png", "未命名{}")


def name_classes(attribute: str) -> dict[str, str]:
    """English class of "shape" or "color" -> its Chinese name."""
    return SHAPES_ZH if attribute == "shape" else COLORS_ZH


def list_templates(attribute: str) -> list[str]:
    """Prompts for the classes of "shape" or "color": `{}` takes the class, the other attribute varies."""
    if attribute == "shape":
        return [f"中间有一个{color}纯色大{{}}" for color in COLORS_ZH.values()]
    return [f"中间有一个{{}}纯色大{shape}" for shape in SHAPES_ZH.values()]


def _name_kind(thing: Thing, colored: bool) -> str:
    return f"一个{COLORS_ZH[thing.color] if colored else ''}{SHAPES_ZH[thing.shape]}"


def _name_fully(thing: Thing) -> str:
    return f"{COLORS_ZH[thing.color]}{TEXTURES_ZH[thing.texture]}{SIZES_ZH[thing.size]}{SHAPES_ZH[thing.shape]}"


def _name_place(thing: Thing) -> str:
    return "中间" if thing.place == MIDDLE else f"{_COLUMNS[thing.place[1]]}{_ROWS[thing.place[0]]}角"


def _where(a: Thing, b: Thing) -> str:
    return _RELATIONS[relate(a, b)]


def write_synthetic(scene: Scene, rng: Random) -> str:
    """A terse caption: shapes and their arrangement, in two scenes of five their colors, sometimes the background."""
    things = rng.sample(scene.things, len(scene.things))
    ground = f"{_ON[scene.background]}的" if rng.random() < 0.4 else ""
    colored = rng.random() < 0.4
    if len(things) == 1:
        return f"{ground}{_name_kind(things[0], colored)}"
    if len(things) == 2:
        a, b = things
        return f"{ground}{_name_kind(a, colored)}在{_name_kind(b, colored)}的{_where(a, b)}"
    if rng.random() < 0.5:
        a, b, c = order_three(scene.things)
        names = [_name_kind(thing, colored) for thing in (a, b, c)]
        return f"{ground}{names[0]}，{_where(b, a)}是{names[1]}，{_where(c, a)}是{names[2]}"
    first, second, third = (_name_kind(thing, colored) for thing in things)
    return f"{ground}{first}、{second}和{third}"


def write_generated(scene: Scene, rng: Random) -> str:
    """A description that names every attribute and every place: it fits one scene only."""
    ground = _ON[scene.background]
    if len(scene.things) == 1:
        (thing,) = scene.things
        return f"{ground}，{_name_place(thing)}有一个{_name_fully(thing)}"
    if len(scene.things) == 2:
        a, b = rng.sample(scene.things, 2)
        if a.place[0] == b.place[0]:
            side = f"{_ROWS[a.place[0]]}方"
        elif a.place[1] == b.place[1]:
            side = f"{_COLUMNS[a.place[1]]}侧"
        else:
            return f"{ground}，{_name_place(a)}有一个{_name_fully(a)}，{_name_place(b)}有一个{_name_fully(b)}"
        return f"{ground}，{side}有一个{_name_fully(a)}，在{_name_fully(b)}的{_where(a, b)}"
    a, b, c = order_three(scene.things)
    first = f"有一个{_name_fully(a)}，{_where(b, a)}是{_name_fully(b)}"
    return f"{ground}{first}，{_where(c, a)}是{_name_fully(c)}"


def _name_loosely(thing: Thing, rng: Random, wrong: bool) -> str:
    """Some of the thing's words."""
    color, shape = choose_attributes(thing, rng, wrong)
    words = [COLORS_ZH[color]] if rng.random() < 0.85 else []
    words += [TEXTURES_ZH[thing.texture]] if rng.random() < 0.3 else []
    words += [SIZES_ZH[thing.size]] if rng.random() < 0.3 else []
    return "".join([*words, SHAPES_ZH[shape]])


def write_raw(scene: Scene, rng: Random) -> str:
    """A shop's title: loose words with noise around them, sometimes wrong, sometimes only a file name."""
    file = rng.choice(_FILES).format(rng.randint(10, 9999))
    if rng.random() < USELESS_FRACTION:
        return rng.choice((file, f"{rng.choice(_BEFORE)} {file}", " ".join(rng.sample(_AFTER, 3))))
    named = name_in_any_order(scene, rng, _name_loosely)
    if rng.random() < 0.3:
        named.append(GROUNDS_ZH[scene.background])
    text = rng.choice((" ", "、", "和", "-")).join(named)
    before, after = rng.choice((("", ""), (file, ""), (rng.choice(_BEFORE), ""), ("", rng.choice(_AFTER))))
    return f"{before} {text} {after}".strip()


def write_texts(scene: Scene) -> dict[str, str]:
    """The three texts of a scene by name; the same scene gives the same texts."""
    return write_each(scene, (write_raw, write_synthetic, write_generated), "zh/")
