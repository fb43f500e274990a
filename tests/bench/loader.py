"""Loaders side by side: images per second at 224 px from encoded pictures to a normalised float32 batch on the device.

python tests/bench/loader.py [--pictures 2000 --batch 128 --workers 2 --images FOLDER]

Contenders, on the same cores: our torch and DALI loaders; the released code's DALI pipeline (fn.readers.mxnet, random
crop, resize, mirror, normalise); open_clip's webdataset loader with its training transform. Each is started, runs until
its queues are drained and is then timed. The pictures are synthetic photographs (1/f noise, 500 x 375, JPEG 88, 80 kB
each, the same everywhere) or, with --images, those of a folder fitted to that size. Check: asked for the whole picture,
every loader gives what PIL gives.
"""

from __future__ import annotations

import importlib.util
import io
import os
import tarfile
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from harness import Report, argument_parser, synchronize
from PIL import Image, ImageOps

from rwkv_clip.data.records import Header, RecordSet, RecordWriter, pack
from rwkv_clip.training.data import make_loader
from rwkv_clip.training.data.batch import Plan
from rwkv_clip.training.settings import DataSettings
from rwkv_clip.transform import CLIP_MEAN, CLIP_STD, normalize

WIDTH, HEIGHT, QUALITY, SIZE = 500, 375, 88, 224
CHECKED = 64  # pictures compared with PIL's
LIMIT = 2 / 255  # mean difference of a pixel
ENDLESS = 10**6  # batches, more than are ever taken

Batches = Iterator[tuple[torch.Tensor, list[int]]]  # normalised float32 (B, 3, 224, 224), picture numbers


@dataclass(frozen=True)
class Setting:
    """What every contender gets. `whole`: no crop and no mirror, for the check."""

    folder: Path
    device: torch.device
    batch: int
    workers: int
    whole: bool = False


def draw_picture(seed: int) -> Image.Image:
    """1/f noise in one luminance and two colour planes: the statistics of photographs for a JPEG decoder."""
    random = np.random.default_rng(seed)
    across, down = np.fft.rfftfreq(WIDTH)[None], np.fft.fftfreq(HEIGHT)[:, None]
    size = 1 / np.maximum(np.hypot(down, across), 1 / WIDTH) ** 1.2

    def plane() -> np.ndarray:
        values = np.fft.irfft2(size * np.exp(2j * np.pi * random.random(size.shape)), (HEIGHT, WIDTH))
        return values / values.std()

    light, red, blue = plane(), plane(), plane()
    colors = np.stack([light + 0.3 * red, light - 0.2 * red - 0.2 * blue, light + 0.3 * blue], -1)
    return Image.fromarray((115 + 45 * colors).clip(0, 255).astype(np.uint8))


def encode_pictures(count: int, images: Path | None) -> list[bytes]:
    """JPEGs; drawn ones repeat after 250."""
    files = (
        sorted(path for path in images.iterdir() if path.suffix.lower() in (".jpg", ".jpeg", ".png")) if images else []
    )
    if images and not files:
        raise SystemExit(f"--images: {images} holds no .jpg or .png; name a folder of pictures")
    encoded = []
    for i in range(min(count, len(files) or 250)):
        picture = ImageOps.fit(Image.open(files[i]).convert("RGB"), (WIDTH, HEIGHT)) if files else draw_picture(i)
        file = io.BytesIO()
        picture.save(file, "JPEG", quality=QUALITY)
        encoded.append(file.getvalue())
    return [encoded[i % len(encoded)] for i in range(count)]


def write_data(jpegs: list[bytes], folder: Path, shards: int) -> None:
    """The pictures as train.rec with the labels of three texts, and as `shards` webdataset tars with one text."""
    with RecordWriter(folder / "train") as writer:
        for i, jpeg in enumerate(jpegs):
            writer.write(i, pack(Header(0, np.full(231, i, np.float32), i, 0), jpeg))
    for shard in range(shards):
        with tarfile.open(folder / f"train-{shard}.tar", "w") as tar:
            for i in range(shard, len(jpegs), shards):
                for ending, content in ((".jpg", jpegs[i]), (".txt", f"picture {i}".encode())):
                    member = tarfile.TarInfo(f"{i:06}{ending}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))


def ours(setting: Setting, kind: str) -> Batches:
    """Our loader, and the normalisation of the training step."""
    whole = {"crop_area": (1.0, 1.0), "crop_aspect": (WIDTH / HEIGHT,) * 2, "flip": 0.0} if setting.whole else {}
    settings = DataSettings(workers=setting.workers, loader=kind, **whole)
    plan = Plan(global_batch=setting.batch, steps=ENDLESS)
    loader = make_loader(RecordSet(setting.folder / "train.rec"), plan, SIZE, settings, device=setting.device)
    try:
        for batch in loader:
            yield normalize(batch.image.to(setting.device, non_blocking=True)), batch.ids.tolist()
    finally:
        loader.close()


def plain_dali(setting: Setting) -> Batches:
    """The pipeline of the released code, with its iterator."""
    from nvidia.dali import fn, pipeline_def, types
    from nvidia.dali.plugin.pytorch import DALIGenericIterator

    gpu = setting.device.type == "cuda"
    area, aspect = ([1.0, 1.0], [WIDTH / HEIGHT] * 2) if setting.whole else ([0.7, 1.0], [0.8, 1.25])
    settings = {"batch_size": setting.batch, "num_threads": setting.workers, "device_id": 0 if gpu else None}

    @pipeline_def(**settings, prefetch_queue_depth=2)
    def pipeline():
        jpeg, label = fn.readers.mxnet(
            path=[str(setting.folder / "train.rec")],
            index_path=[str(setting.folder / "train.idx")],
            random_shuffle=not setting.whole,
            name="train",
        )
        image = fn.decoders.image_random_crop(
            jpeg,
            device="mixed" if gpu else "cpu",
            output_type=types.RGB,
            random_area=area,
            random_aspect_ratio=aspect,
        )
        image = fn.resize(image, size=(SIZE, SIZE), interp_type=types.INTERP_LINEAR, antialias=True)
        image = fn.crop_mirror_normalize(
            image,
            dtype=types.FLOAT,
            output_layout="CHW",
            mean=[255 * value for value in CLIP_MEAN],
            std=[255 * value for value in CLIP_STD],
            mirror=0 if setting.whole else fn.random.coin_flip(probability=0.5),
        )
        return image, label

    for (batch,) in DALIGenericIterator([pipeline()], ["image", "label"]):  # without a size: endless
        yield batch["image"], batch["label"][:, 0].long().tolist()


def open_clip_loader(setting: Setting) -> Batches:
    """open_clip's own webdataset loader, training transform and tokenizer."""
    import open_clip
    from open_clip_train.data import get_wds_dataset

    shards = len(list(setting.folder.glob("train-*.tar")))
    arguments = Namespace(
        train_data=str(setting.folder / f"train-{{0..{shards - 1}}}.tar"),
        train_num_samples=ENDLESS * setting.batch,
        train_data_upsampling_factors=None,
        dataset_resampled=True,  # else it ends after the last shard
        batch_size=setting.batch,
        workers=setting.workers,
        world_size=1,
        seed=0,
    )
    how = open_clip.AugmentationCfg(scale=(1.0, 1.0)) if setting.whole else None  # default: area 0.9 to 1
    transform = open_clip.image_transform(SIZE, is_train=True, aug_cfg=how)
    words = open_clip.get_tokenizer("ViT-B-32")
    start, end = words([""])[0][:2].tolist()
    for image, text in get_wds_dataset(arguments, transform, True, tokenizer=words).dataloader:
        yield image.to(setting.device), [read_number(row, start, end, words) for row in text] if setting.whole else []


def read_number(tokens: torch.Tensor, start: int, end: int, words) -> int:
    """'picture 17', tokenised -> 17."""
    inner = [token for token in tokens.tolist() if token not in (0, start, end)]
    return int(words.decode(inner).split("picture")[1].replace(" ", ""))


def find_contenders() -> tuple[dict[str, Callable[[Setting], Batches]], dict[str, str]]:
    """(name -> what runs it, name -> why it cannot run here)."""
    needed = {
        "ours, torch": (lambda s: ours(s, "torch"), ()),
        "ours, DALI": (lambda s: ours(s, "dali"), ("nvidia.dali",)),
        "plain DALI": (plain_dali, ("nvidia.dali",)),
        "open_clip": (open_clip_loader, ("open_clip", "webdataset", "pandas")),
    }
    found, missing = {}, {}
    for name, (run, packages) in needed.items():
        absent = [package for package in packages if not has_package(package)]
        if absent:
            missing[name] = f"{', '.join(absent)} not installed (pip install -e '.[bench,dali]')"
        else:
            found[name] = run
    return found, missing


def has_package(name: str) -> bool:
    """Whether it can be imported, without importing it."""
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def check(report: Report, name: str, run: Callable[[Setting], Batches], setting: Setting, jpegs: list[bytes]) -> None:
    """The first pictures, uncropped, against PIL's resize: linear, but bicubic for open_clip, whose choice that is."""
    how = Image.Resampling.BICUBIC if name == "open_clip" else Image.Resampling.BILINEAR
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    total, seen, batches = 0.0, 0, run(setting)
    for image, numbers in batches:
        for pixels, number in zip(image.cpu(), numbers):
            picture = Image.open(io.BytesIO(jpegs[number])).resize((SIZE, SIZE), how)
            expected = torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1) / 255
            total += float((pixels * std + mean - expected).abs().mean())
            seen += 1
        if seen >= CHECKED:
            break
    batches.close()
    report.gate(f"{name}: pixels", total / seen, LIMIT)


def take_time(batches: Batches, device: torch.device, before: int, timed: int) -> float:
    """Seconds per batch once `before` batches have emptied the queues that filled while everything started."""
    for _ in range(before):
        next(batches)
    synchronize(device)
    start = time.perf_counter()
    for _ in range(timed):
        next(batches)
    synchronize(device)
    taken = time.perf_counter() - start
    batches.close()
    return taken / timed


def main() -> None:
    """Command line."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    parser = argument_parser(__doc__, repeats=5)
    parser.add_argument("--pictures", type=int, default=2000)
    parser.add_argument("--batch", type=int, nargs="+", help="32 and 128 on a CPU, 512 on a GPU")
    parser.add_argument("--workers", type=int, default=cores, help=f"processes or threads ({cores})")
    parser.add_argument("--timed", type=int, default=1280, help="pictures per measurement, at least 5 batches (1280)")
    parser.add_argument("--images", type=Path, help="folder of pictures instead of drawn ones")
    args = parser.parse_args()
    batches = args.batch or ([512] if args.device.type == "cuda" else [32, 128])
    if args.device.type == "cpu":
        torch.set_num_threads(1)  # the cores are the workers'
    report = Report("loader", args.device, commit=args.commit)
    with tempfile.TemporaryDirectory() as name:
        folder, jpegs = Path(name), encode_pictures(args.pictures, args.images)
        write_data(jpegs, folder, shards=max(args.workers, 1))
        contenders, missing = find_contenders()
        for name, run in contenders.items():
            check(report, name, run, Setting(folder, args.device, CHECKED, args.workers, whole=True), jpegs)
        for batch in batches:
            setting, timed = Setting(folder, args.device, batch, args.workers), max(5, args.timed // batch)
            seconds: dict[str, list[float]] = {name: [] for name in contenders}
            for _ in range(args.repeats):
                for name, run in contenders.items():
                    seconds[name].append(take_time(run(setting), args.device, 8, timed))
            add_rows(report, f"batch {batch}, {args.workers} workers", batch, seconds, missing)
    report.finish(args.output)


def add_rows(report: Report, case: str, batch: int, seconds: dict[str, list[float]], missing: dict[str, str]) -> None:
    """A row per contender; our loaders against both peers."""
    goals = {"plain DALI": 0.95, "open_clip": 1.3}
    peers = {"ours, torch": "open_clip", "ours, DALI": "plain DALI"}
    speed = {name: batch / float(np.median(values)) for name, values in seconds.items()}
    for name, values in seconds.items():
        peer = peers.get(name)
        report.add(case, name, seconds=values, baseline=peer, goal=goals.get(peer), images_per_second=speed[name])
    for name, why in missing.items():
        report.missing(case, name, why)
    for name, peer in (("ours, torch", "plain DALI"), ("ours, DALI", "open_clip")):
        if name in speed and peer in speed:
            report.ratio(case, f"{name} over {peer}", speed[name] / speed[peer], goal=goals[peer])


if __name__ == "__main__":
    main()
