"""Prompt templates and class names of zero-shot classification: those of the CLIP paper's public prompt list.

`{}` in a template takes the class name. Sets that are not named here take their names from torchvision or
from the class folders, underscores and slashes read as spaces; SPOKEN has the exceptions. ImageNet's come from
open_clip, in Chinese from clip_benchmark.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

PLAIN = ("a photo of a {}.",)

CIFAR = (
    "a photo of a {}.",
    "a blurry photo of a {}.",
    "a black and white photo of a {}.",
    "a low contrast photo of a {}.",
    "a high contrast photo of a {}.",
    "a bad photo of a {}.",
    "a good photo of a {}.",
    "a photo of a small {}.",
    "a photo of a big {}.",
    "a photo of the {}.",
    "a blurry photo of the {}.",
    "a black and white photo of the {}.",
    "a low contrast photo of the {}.",
    "a high contrast photo of the {}.",
    "a bad photo of the {}.",
    "a good photo of the {}.",
    "a photo of the small {}.",
    "a photo of the big {}.",
)

FOOD = ("a photo of {}, a type of food.",)
PETS = ("a photo of a {}, a type of pet.",)
FLOWERS = ("a photo of a {}, a type of flower.",)
SCENES = ("a photo of a {}.", "a photo of the {}.")
AIRCRAFT = ("a photo of a {}, a type of aircraft.", "a photo of the {}, a type of aircraft.")

CARS = (
    "a photo of a {}.",
    "a photo of the {}.",
    "a photo of my {}.",
    "i love my {}!",
    "a photo of my dirty {}.",
    "a photo of my clean {}.",
    "a photo of my new {}.",
    "a photo of my old {}.",
)

TEXTURES = tuple(
    f"a photo of {article} {{}} {kind}."
    for article in ("a", "the")
    for kind in ("texture", "pattern", "thing", "object")
)

CALTECH = tuple(
    template
    for article in ("a", "the")
    for template in (
        f"a photo of {article} {{}}.",
        f"a painting of {article} {{}}.",
        f"{article} plastic {{}}.",
        f"a sculpture of {article} {{}}.",
        f"a sketch of {article} {{}}.",
        f"a tattoo of {article} {{}}.",
        f"{article} toy {{}}.",
        f"a rendition of {article} {{}}.",
        f"{article} embroidered {{}}.",
        f"{article} cartoon {{}}.",
        f"{article} {{}} in a video game.",
        f"{article} plushie {{}}.",
        f"{article} origami {{}}.",
        f"art of {article} {{}}.",
        f"graffiti of {article} {{}}.",
        f"a drawing of {article} {{}}.",
        f"a doodle of {article} {{}}.",
    )
)

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

_CIFAR100 = """
apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can
castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin
elephant flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard
lobster man maple_tree motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear
pickup_truck pine_tree plain plate poppy porcupine possum rabbit raccoon ray road rocket rose sea seal shark
shrew skunk skyscraper snail snake spider squirrel streetcar sunflower sweet_pepper table tank telephone
television tiger tractor train trout tulip turtle wardrobe whale willow_tree wolf woman worm
"""
CIFAR100_CLASSES = tuple(_CIFAR100.split())

SPOKEN = {
    "caltech101": {
        "Faces": "off-center face",
        "Faces_easy": "centered face",
        "Leopards": "leopard",
        "Motorbikes": "motorbike",
        "airplanes": "airplane",
        "car_side": "side of a car",
        "cougar_body": "body of a cougar cat",
        "cougar_face": "face of a cougar cat",
        "crocodile_head": "head of a crocodile",
        "flamingo_head": "head of a flamingo",
        "snoopy": "snoopy (cartoon beagle)",
        "yin_yang": "yin and yang symbol",
    },
    "flowers": {
        "globe-flower": "globe flower",
        "pink-yellow dahlia?": "pink and yellow dahlia",
        "ball moss": "air plant",
    },
}


def spoken(name: str, dataset: str = "") -> str:
    """A class of a set as people say it."""
    return SPOKEN.get(dataset, {}).get(name) or name.replace("_", " ").replace("/", " ")


def imagenet_prompts(language: str) -> tuple[list[str], tuple[str, ...]]:
    """The 1000 names in the order of the sorted folder names, and 80 templates. ValueError where they are not here."""
    if language == "en":
        from open_clip.zero_shot_metadata import IMAGENET_CLASSNAMES, OPENAI_IMAGENET_TEMPLATES

        return list(IMAGENET_CLASSNAMES), tuple(template("{}") for template in OPENAI_IMAGENET_TEMPLATES)
    package = importlib.util.find_spec("clip_benchmark")
    if package is None:
        raise ValueError("language: zh takes its names from clip-benchmark; pip install -e .[clip-benchmark]")
    folder = Path(package.origin).parent / "datasets"
    names, templates = (
        json.loads((folder / f"cn_{kind}.json").read_text(encoding="utf-8"))["imagenet1k"]
        for kind in ("classnames", "zeroshot_classification_templates")
    )
    return names, tuple(template.replace("{c}", "{}") for template in templates)
