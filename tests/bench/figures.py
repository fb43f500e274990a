"""The pictures of the documents, drawn from the results that are in the repository.

python tests/bench/figures.py [architecture resolution flickr8k noise alip chinese third_text open_clip]
python tests/bench/figures.py flickr8k --runs logs/flickr8k-*    # keeps the recalls of these runs, draws them

Without names all of them, into --output (figure). No model runs: `flickr8k` reads figure/flickr8k.json; the others but
`architecture` read the newest result of their bench in tests/bench/results. `bash shell/make_figures.sh` makes these
and the pictures of a demo run.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

from architecture import draw_architecture

ROOT = Path(__file__).resolve().parents[2]
RESULTS, FIGURES = ROOT / "tests" / "bench" / "results", ROOT / "figure"
DPI = 150
RED, GREY, BLUE, GREEN, ORANGE = "#c1272d", "#6f6f6f", "#0072b2", "#2a7f62", "#d55e00"

METHODS = {  # of tests/bench/noise.py: what a reader calls them, color, line
    "RWKV towers, one of two": ("RWKV towers, one of two texts", RED, "-"),
    "RWKV towers, ALIP": ("RWKV towers, ALIP", RED, "--"),
    "ALIP": ("ViT towers, ALIP", BLUE, "--"),
    "CLIP, one of two": ("ViT towers, one of two texts", BLUE, "-"),
    "CLIP, raw": ("ViT towers, raw text (CLIP)", GREY, "-"),
}
CHINESE = {  # of tests/bench/chinese.py
    "RWKV both ways": ("RWKV image and text towers", RED, "-"),
    "RWKV + BERT": ("RWKV image tower, BERT", ORANGE, "-"),
    "ViT + BERT": ("ViT, BERT", BLUE, "-"),
    "fine-tuned": ("ViT, BERT, fine-tuned", GREY, "--"),
    "fine-tuned, --positives mask": ("the same with --positives mask", GREEN, "--"),
}
THIRD_TEXT = {  # of tests/bench/third_text.py
    "all three": ("one of raw, synthetic, generated", RED, "-"),
    "raw + synthetic": ("one of raw, synthetic", BLUE, "-"),
    "generated only": ("generated only", GREEN, "-"),
    "raw": ("raw only", GREY, "-"),
}
WAYS_SHORT = {"text_to_image": "t2i", "image_to_text": "i2t"}
CUTS = (1, 5, 10)


def newest(bench: str, folder: Path = RESULTS) -> dict:
    """The newest result of a bench. ValueError if there is none."""
    found = [json.loads(path.read_text()) for path in folder.glob(f"{bench}-*.json")]
    if not found:
        raise ValueError(f"{folder.name}: no result of the bench {bench!r}; run it first (bash shell/bench.sh {bench})")
    return max(found, key=lambda result: result["date"])


def new_figure(columns: int, width: float, height: float):
    """A figure on opaque white and its axes, side by side."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    panels = figure.subplots(1, columns)
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
        axes.set_axisbelow(True)
    return figure, panels


# ---- resolution ----------------------------------------------------------------------------------------------------


def draw_resolution(path: Path, result: dict | None = None) -> None:
    """Time and memory per token over the image's side, ours and open_clip's."""
    result = result or newest("resolution")
    figure, panels = new_figure(2, 10, 3.9)
    quantities = {
        "microseconds_per_token": ("time per token (µs)", (100, 200, 500, 1000, 2000, 5000)),
        "kib_per_token": ("peak memory per token (KiB)", (10, 20, 50, 100, 200, 500)),
    }
    for axes, (key, (name, ticks)) in zip(panels, quantities.items()):
        for contender, label, color in (
            ("ours", "RWKV-CLIP-B-16", RED),
            ("open_clip ViT-B-16", "open_clip ViT-B-16", GREY),
        ):
            rows = [row for row in result["rows"] if row["contender"] == contender and "figures" in row]
            sizes = [int(row["case"].split()[0]) for row in rows]
            values = [row["figures"][key] for row in rows]
            axes.plot(sizes, values, "o-", color=color, linewidth=2, markersize=6, label=label)
            for size, value in zip(sizes[-1:], values[-1:]):
                place = (0, 7) if contender == "ours" else (-8, 0)
                where = {"ha": "center"} if contender == "ours" else {"ha": "right", "va": "center"}
                axes.annotate(f"{value:,.0f}", (size, value), place, textcoords="offset points", color=color, **where)
        axes.set(xscale="log", yscale="log", xlabel="image side (pixels)", ylabel=name)
        axes.set_xticks(sizes, [f"{size}\n{(size // 16) ** 2:,} tokens" for size in sizes], fontsize=9)
        low, high = axes.get_ylim()
        axes.set_yticks(ticks, [f"{tick:,}" for tick in ticks])
        axes.set_ylim(min(low, ticks[0] * 2), max(high, ticks[-1] * 0.9))
        axes.minorticks_off()
    panels[0].legend(frameon=False, loc="upper left")
    figure.suptitle(f"Image encoders, B/16, bfloat16, {result['device']}: lower is better", fontsize=11)
    figure.savefig(path, dpi=DPI)


# ---- Flickr8k ------------------------------------------------------------------------------------------------------


def chance(images: int, captions: int) -> dict[str, float]:
    """Recall in percent of a random order; of an image the best of its captions counts."""
    each = captions // images
    figures = {}
    for way, short in WAYS_SHORT.items():
        for k in CUTS:
            found = min(k / images, 1)
            if way.startswith("image"):
                found = 1 - math.comb(captions - each, k) / math.comb(captions, k)
            figures[f"{short}_R{k}"] = 100 * found
    return figures | {"mean_recall": statistics.fmean(figures.values())}


def shorten_recall(name: str) -> str:
    """text_to_image_R@1 -> t2i_R1."""
    way, _, k = name.partition("_R@")
    return f"{WAYS_SHORT[way]}_R{k}"


def draw_recall(path: Path, title: str, methods: dict[str, tuple[str, str, str]], runs: list[dict]) -> None:
    """Recall at 1, 5 and 10 both ways: every run a dot, the mean of a method a line, chance dotted.

    methods: label, color and line style by name; runs: dicts of `method`, counts `images` and `captions`, and recalls
    between 0 and 1, `text_to_image_R@1` and so on.
    """
    figure, panels = new_figure(2, 10, 4.2)
    guess = chance(runs[0]["images"], runs[0]["captions"])
    for axes, (way, short) in zip(panels, WAYS_SHORT.items()):
        for place, (method, (label, color, line)) in enumerate(methods.items()):
            own = [run for run in runs if run["method"] == method]
            found = [[100 * run[f"{way}_R@{k}"] for run in own] for k in CUTS]
            axes.plot(CUTS, list(map(statistics.fmean, found)), line, color=color, linewidth=2, label=label)
            for k, values in zip(CUTS, found):  # beside each other, so that none hides another
                x = k + 0.16 * (place - len(methods) // 2) * (len(values) > 1)
                fill = color if line == "-" else "white"
                axes.plot([x] * len(values), values, "o", color=color, markersize=4, markerfacecolor=fill)
        axes.plot(CUTS, [guess[f"{short}_R{k}"] for k in CUTS], ":", color="black", linewidth=1.8, label="chance")
        axes.set(title=way.replace("_", " "), xlabel="k", ylabel="R@k (%)")
        axes.set_xticks(CUTS)
    top = max(axes.get_ylim()[1] for axes in panels)
    for axes in panels:
        axes.set_ylim(0, top)
    panels[0].legend(frameon=False, fontsize=9, loc="upper left")
    figure.suptitle(title, fontsize=11)
    figure.savefig(path, dpi=DPI)


def draw_noise(path: Path, result: dict | None = None) -> None:
    """The methods of tests/bench/noise.py, every seed."""
    runs = (result or newest("noise"))["runs"]
    seeds = count(len({run["seed"] for run in runs}), "seed")
    title = f"Flickr8k, 30 % of the raw texts swapped, {runs[0]['images']} test images: {seeds} (dots) and their means"
    draw_recall(path, title, {name: look for name, look in METHODS.items() if name in names_of(runs)}, runs)


def draw_chinese(path: Path, result: dict | None = None) -> None:
    """The towers of tests/bench/chinese.py, every seed."""
    runs = (result or newest("chinese"))["runs"]
    seeds = count(len({run["seed"] for run in runs}), "seed")
    title = f"Flickr8k in Chinese, from scratch, {runs[0]['images']} test images: {seeds} (dots) and their means"
    draw_recall(path, title, {name: look for name, look in CHINESE.items() if name in names_of(runs)}, runs)


def draw_third_text(path: Path, result: dict | None = None) -> None:
    """The choices of texts of tests/bench/third_text.py, every seed."""
    runs = (result or newest("third_text"))["runs"]
    seeds = count(len({run["seed"] for run in runs}), "seed")
    title = f"Flickr8k with damaged raw texts, {runs[0]['images']} test images: {seeds} (dots) and their means"
    draw_recall(path, title, {name: look for name, look in THIRD_TEXT.items() if name in names_of(runs)}, runs)


def draw_open_clip(path: Path, result: dict | None = None) -> None:
    """Loss of tests/bench/open_clip_run.py over steps and over seconds, and the recall of every seed."""
    runs = (result or newest("open_clip_run"))["runs"]
    figure, (by_step, by_time, recall) = new_figure(3, 12, 4)
    looks = {"ours": ("rwkv_clip.training", RED), "open_clip": ("open_clip_train", GREY)}
    for place, (program, (label, color)) in enumerate(looks.items()):
        own = [run for run in runs if run["method"] == program]
        for run in own:
            steps, losses, seconds = read_curve(run["curve"])
            look = {"color": color, "linewidth": 1.5, "alpha": 0.7, "label": label if run is own[0] else None}
            by_step.plot(steps, losses, **look)
            by_time.plot(seconds, losses, **look)
        values = [100 * run["mean_recall"] for run in own]
        recall.plot([place] * len(values), values, "o", color=color, markersize=7, alpha=0.7)
        recall.plot([place - 0.15, place + 0.15], [statistics.fmean(values)] * 2, color=color, linewidth=2.5)
    by_step.set(xlabel="step", ylabel="training loss (mean of 5 log lines)", title="The same learning ..")
    by_time.set(xlabel="seconds of training", title=".. in less time")
    least, names = min(100 * run["mean_recall"] for run in runs), [label for label, _ in looks.values()]
    recall.set(
        title="Test recall, every seed and the mean (%)", xlim=(-0.5, 1.5), ylim=(0, None) if least > 0 else None
    )
    recall.set_xticks(range(len(names)), names)
    by_step.legend(frameon=False)
    figure.savefig(path, dpi=DPI)


def read_curve(lines: list[dict], mean: int = 5) -> tuple[list[float], list[float], list[float]]:
    """Steps, losses and seconds since the start of training, each loss the mean of this many log lines."""
    steps, losses, seconds, passed, before = [], [], [], 0.0, 0
    for i, line in enumerate(lines):
        passed, before = passed + (line["step"] - before) * line["seconds_per_step"], line["step"]
        window = [one["loss"] for one in lines[max(0, i + 1 - mean) : i + 1]]
        steps.append(line["step"])
        losses.append(statistics.fmean(window))
        seconds.append(passed)
    return steps, losses, seconds


def draw_flickr8k(path: Path) -> None:
    """The runs of shell/train_Flickr8k_small.sh in the table beside the picture, else in figure/flickr8k.json."""
    table = path.with_suffix(".json")
    runs = json.loads((table if table.exists() else FIGURES / table.name).read_text())["runs"]
    looks = zip(names_of(runs), ((RED, "-"), (BLUE, "-"), (GREEN, "-"), (ORANGE, "-")))
    methods = {}
    for name, look in looks:
        seeds = count(sum(run["method"] == name for run in runs), "seed")
        methods[name] = (f"{name}, {seeds}", *look)
    draw_recall(path, f"Flickr8k from scratch, {runs[0]['images']} test images", methods, runs)


def collect_flickr8k(folders: Sequence[Path], table: Path) -> None:
    """Write the recalls of run folders into a table: model and seed from settings.json, the newest retrieval result.

    ValueError where a folder holds none.
    """
    runs = []
    for folder in folders:
        results = sorted(folder.glob("eval/*retrieval*/result.json"))
        if not results:
            raise ValueError(f"{folder}: holds no eval/*retrieval*/result.json; run shell/test_zero_shot_retrieval.sh")
        settings, metrics = json.loads((folder / "settings.json").read_text()), {}
        for result in json.loads(results[-1].read_text())["results"]:
            metrics |= result.get("metrics", {})
        kept = {
            key: metrics[key] for key in ("images", "captions", *(f"{way}_R@{k}" for way in WAYS_SHORT for k in CUTS))
        }
        runs.append({"method": settings["model"], "seed": settings["seed"], **kept})
    runs.sort(key=lambda run: (run["method"], run["seed"]))
    content = {"command": "FLICKR8K=.. MODEL=.. bash shell/train_Flickr8k_small.sh --seed ..", "runs": runs}
    table.write_text(json.dumps(content, indent=1) + "\n")


def names_of(runs: Sequence[dict]) -> list[str]:
    """Methods in the order of their first runs."""
    return list(dict.fromkeys(run["method"] for run in runs))


def count(number: int, what: str) -> str:
    """3, seed -> 3 seeds."""
    return f"{number} {what}{'' if number == 1 else 's'}"


# ---- ALIP's gates --------------------------------------------------------------------------------------------------


def sample_weight(gap, gamma: float = 2.0):
    """min(exp(gamma_s (S - H)), 1) of the similarity S of the two texts; `gap` is S - H, H the running mean."""
    import numpy as np

    return np.minimum(np.exp(gamma * np.asarray(gap)), 1)


def pair_weight(gap, gamma: float = 2.0):
    """exp(gamma_p (S - H)) of image and text; used where the sample weight is below 1, else 1."""
    import numpy as np

    return np.exp(gamma * np.asarray(gap))


def draw_alip(path: Path, result: dict | None = None) -> None:
    """ALIP's weights: by the gap to the running mean, by the step while the means come down from 1, and as measured."""
    result = result or newest("noise")
    figure, (by_gap, by_step, measured) = new_figure(3, 12, 4)
    _draw_weights(by_gap)
    _draw_warmup(by_step)
    _draw_measured(measured, result)
    figure.savefig(path, dpi=DPI)


def _draw_weights(axes) -> None:
    import numpy as np

    gap = np.linspace(-1, 0.5, 301)
    axes.plot(
        gap,
        pair_weight(gap),
        color=BLUE,
        linewidth=6,
        alpha=0.35,
        label="pair weight: exp(2 gap) where the\ntwo texts disagree, else 1",
    )
    axes.plot(gap, sample_weight(gap), color=RED, linewidth=2, label="sample weight: min(exp(2 gap), 1)")
    axes.plot((0, 0), (0, 2.5), color="black", linewidth=0.8)
    axes.set(
        xlabel="gap: similarity minus its running mean", ylabel="weight in the loss", xlim=(-1, 0.5), ylim=(0, 3.2)
    )
    axes.set_xticks((-1, -0.5, 0, 0.5))
    axes.set_title("the two gates", fontsize=11)
    axes.legend(frameon=False, fontsize=9, loc="upper left")


def _draw_warmup(axes) -> None:
    import numpy as np

    step, momentum = np.arange(1, 601), 0.99
    for similarity, color in ((0.3, GREEN), (0.6, ORANGE)):
        gap = -(1 - similarity) * momentum**step  # H = S + (1 - S) momentum^step
        product = sample_weight(gap) * pair_weight(gap)
        axes.plot(step, product, color=color, linewidth=2, label=f"similarities of {similarity:g}")
    axes.set(xlabel="step", ylabel="sample weight x pair weight", xlim=(0, 600), ylim=(0, 1.05))
    axes.set_title("slow start: the means begin at 1", fontsize=11)
    axes.legend(frameon=False, fontsize=9, loc="lower right")


def _draw_measured(axes, result: dict) -> None:
    """Mean weights of clean and swapped pairs after training, over the seeds."""
    names = {"Ws": "sample", "Wt": "raw pair", "Wc": "synthetic pair", "Ws Wt": "sample x raw pair"}
    towers = {"gates of ALIP": "ViT", "gates of RWKV towers, ALIP": "RWKV"}
    rows = {(row["case"], row["contender"]): row["figures"] for row in result["rows"]}
    labels = {}
    for group, (case, tower) in enumerate(towers.items()):
        for place, (name, words) in enumerate(names.items()):
            y, figures = -(place + 4.6 * group), rows[case, name]
            labels[y] = f"{tower}, {words}"
            axes.plot([figures["swapped"], figures["clean"]], [y, y], color=GREY, linewidth=1.2, zorder=1)
            for part, color in (("clean", BLUE), ("swapped", ORANGE)):
                label = f"{part} pairs" if y == 0 else None
                axes.plot(figures[part], y, "o", color=color, markersize=7, label=label)
    axes.set_yticks(list(labels), labels.values(), fontsize=9)
    axes.set(xlabel="mean weight, three seeds", xlim=(0.7, 1.03), ylim=(min(labels) - 0.7, 1.9))
    axes.set_title("Flickr8k, 30 % swapped, after training", fontsize=11)
    axes.legend(frameon=False, fontsize=9, loc="upper left", ncols=2)


FIGURES_BY_NAME: dict[str, tuple[str, Callable[[Path], None]]] = {
    "architecture": ("architecture.png", draw_architecture),
    "resolution": ("resolution.png", draw_resolution),
    "flickr8k": ("flickr8k.png", draw_flickr8k),
    "noise": ("flickr8k_noise.png", draw_noise),
    "alip": ("alip_weights.png", draw_alip),
    "chinese": ("flickr8k_chinese.png", draw_chinese),
    "third_text": ("third_text.png", draw_third_text),
    "open_clip": ("open_clip_run.png", draw_open_clip),
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(FIGURES_BY_NAME)}; default: all")
    parser.add_argument("--output", type=Path, default=FIGURES, help="folder of the pictures (figure)")
    parser.add_argument(
        "--runs", nargs="+", type=Path, help="run folders whose recalls are drawn, and kept in flickr8k.json"
    )
    args = parser.parse_args(arguments)
    if wrong := [name for name in args.names if name not in FIGURES_BY_NAME]:
        parser.error(f"{wrong[0]!r} is not a figure; use {', '.join(FIGURES_BY_NAME)}")
    args.output.mkdir(parents=True, exist_ok=True)
    if args.runs:
        try:
            collect_flickr8k(args.runs, args.output / "flickr8k.json")
        except ValueError as error:
            parser.error(str(error))
    for name in args.names or FIGURES_BY_NAME:
        file, draw = FIGURES_BY_NAME[name]
        draw(args.output / file)
        print(args.output / file)


if __name__ == "__main__":
    main()
