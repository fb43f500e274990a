"""A tiny run on two sources, and other records beside them."""

from pathlib import Path

from rwkv_clip.data.build import build_records

from .tiny import make_smaller, make_tiny

STEPS = 14
THREE = ("raw", "synthetic", "generated")


def make_mixture(folder: Path) -> dict[str, object]:
    """Settings of a run of one epoch, STEPS steps of 8: `train`, 60 records, once and `few`, 20 records, 2.5 times.

    Beside them: `other` 20 records, `raw` those of `few` with one text, `wide` with another context."""
    settings: dict[str, object] = dict(make_smaller(make_tiny(folder)))
    rows = (folder / "all.jsonl").read_text().splitlines()
    for name, chosen, texts, context in (
        ("few", rows[:20], THREE, 8),
        ("other", rows[20:40], THREE, 8),
        ("raw", rows[:20], THREE[:1], 8),
        ("wide", rows[:20], THREE, 9),
    ):
        (folder / f"{name}.jsonl").write_text("".join(f"{row}\n" for row in chosen))
        build_records(str(folder / f"{name}.jsonl"), str(folder / name), texts=texts, context=context, workers=1)
    del settings["val_data"], settings["max_steps"]
    mixture = {"train_data": f"{folder}/train::{folder}/few", "train_data_upsampling_factors": "1::2.5"}
    return settings | mixture | {"epochs": 1, "save_every_n_steps": 4, "keep_checkpoints": 9}


def beside(settings: dict[str, object], name: str) -> str:
    """Prefix of other records in the folder of `make_mixture`."""
    return str(Path(str(settings["model"])).with_name(name))
