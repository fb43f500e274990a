"""An objective forward + backward in float32: time and peak memory, ours beside plain forms and open_clip's losses.

python tests/bench/loss.py [--objective infonce|siglip|distill|alip --sizes 2048 8192 32768 --width 640]

Plain: two cross-entropies on two score matrices, as in the released code; plain, one matrix: the second one on the
transpose of the first; ALIP's plain form has four. SigLIP's is one matrix of scores and one of labels; that of
distillation (with InfoNCE, as in open_clip) has four, two of a teacher of the same width.

What no way can do without, for B pairs of width D: the scores and the gradients of either side, three products of
2 B^2 D operations each for InfoNCE and SigLIP, six for ALIP's two texts, four for distillation with the teacher's
scores; and 16 B D bytes, to read both sides and write their gradients. A way that stores no scores computes them again
for the backward pass: ours of InfoNCE takes four products, of ALIP eight, of distillation ten (each loss computes the
student's scores for itself). SigLIP takes the three, because a pair's gradient needs no other pair. `least_gflops`:
those least operations per second of the median call.

Peak memory is what a step adds to its features, each contender in
a process of its own. On a CPU the larger sizes are called less often; at 32,768 the one call whose memory is measured
is the one that is timed. What does not fit the memory is not measured.
"""

from __future__ import annotations

import functools
import multiprocessing
import re
import statistics
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from harness import Report, alternate, argument_parser, peak_memory
from torch import Tensor

from rwkv_clip.losses import ALIP, InfoNCE, SigLIP
from rwkv_clip.losses.distill import Distilled

try:
    from open_clip.loss import ClipLoss, DistillClipLoss, SigLipLoss
except ImportError:
    ClipLoss = None

TEACHER_SCALE = 100.0
TITLES = {"siglip": ", SigLIP", "distill": ", distillation", "alip": ", ALIP"}
LEAST_PRODUCTS = {"infonce": 3, "siglip": 3, "distill": 4, "alip": 6}
CPU_PAIRS = 2**15  # batch size times calls on a CPU: at most 16 calls at 2,048, 4 at 8,192, 1 at 32,768


def plain(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    target = torch.arange(len(image), device=image.device)
    of_images, of_texts = scale * image @ text.T, scale * text @ image.T
    return (F.cross_entropy(of_images, target) + F.cross_entropy(of_texts, target)) / 2


def plain_one_matrix(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    target, scores = torch.arange(len(image), device=image.device), scale * image @ text.T
    return (F.cross_entropy(scores, target) + F.cross_entropy(scores.T, target)) / 2


def ours(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    return InfoNCE()(image, text, scale)[0]["contrastive"]


def plain_alip(image: Tensor, texts: Tensor, scale: Tensor) -> Tensor:
    """A first step, as in the released code."""
    target, (raw, caption) = torch.arange(len(image), device=image.device), texts.unbind(1)

    def losses(text: Tensor) -> Tensor:
        of_images, of_texts = scale * image @ text.T, scale * text @ image.T
        pair = [F.cross_entropy(scores, target, reduction="none") for scores in (of_images, of_texts)]
        return (pair[0] + pair[1]) / 2

    def above_mean(a: Tensor, b: Tensor) -> Tensor:
        similarity = (a * b).sum(1)
        return torch.exp(2 * (similarity - (0.99 + 0.01 * similarity.mean())))

    with torch.no_grad():
        agreement = above_mean(raw, caption)
        of_raw, of_caption = (torch.where(agreement < 1, above_mean(image, text), 1) for text in (raw, caption))
        weights = agreement.clamp(max=1)
    return (weights * of_raw * losses(raw)).mean() + (weights * of_caption * losses(caption)).mean()


def our_alip(image: Tensor, texts: Tensor, scale: Tensor) -> Tensor:
    return sum(ALIP().to(image.device, image.dtype)(image, texts, scale)[0].values())


def plain_siglip(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    labels = 2 * torch.eye(len(image), device=image.device, dtype=image.dtype) - 1
    return -F.logsigmoid(labels * (scale * image @ text.T + bias)).sum() / len(image)


def our_siglip(*leaves: Tensor) -> Tensor:
    return SigLIP()(*leaves)[0]["contrastive"]


def plain_distill(image: Tensor, text: Tensor, scale: Tensor, other_image: Tensor, other_text: Tensor) -> Tensor:
    soft = []
    for a, b, c, d in ((image, text, other_image, other_text), (text, image, other_text, other_image)):
        targets = (TEACHER_SCALE * c @ d.T).softmax(1)
        soft.append(-(targets * (scale * a @ b.T).log_softmax(1)).sum(1).mean())
    return plain(image, text, scale) + sum(soft) / 2


class Known:
    """A teacher whose features are given."""

    recalls, sources, scale = (), {}, TEACHER_SCALE


def our_distill(image: Tensor, text: Tensor, scale: Tensor, other_image: Tensor, other_text: Tensor) -> Tensor:
    features = {"image": image, "text": text, "logit_scale": scale}
    losses, _ = Distilled(InfoNCE(), Known())(**features, teacher_image=other_image, teacher_text=other_text)
    return sum(losses.values())


LOSSES = {
    "infonce": {"plain": plain, "plain, one matrix": plain_one_matrix, "ours": ours},
    "siglip": {"plain": plain_siglip, "ours": our_siglip},
    "distill": {"plain": plain_distill, "ours": our_distill},
    "alip": {"plain": plain_alip, "ours": our_alip},
}
if ClipLoss is not None:
    LOSSES["infonce"]["open_clip"] = ClipLoss()
    LOSSES["siglip"]["open_clip"] = SigLipLoss()
    LOSSES["distill"]["open_clip"] = lambda *x: sum(DistillClipLoss()(*x, TEACHER_SCALE))


def make_features(objective: str, batch: int, width: int, device: torch.device) -> list[Tensor]:
    """Normalised pictures, texts that resemble them (two each for ALIP), and the initial scale of CLIP; for SigLIP its
    initial scale and bias; for distillation also those of a teacher, without gradients."""
    g = torch.Generator().manual_seed(0)
    image = F.normalize(torch.randn(batch, width, generator=g), dim=-1)
    texts = [
        F.normalize(image + 1.5 * F.normalize(torch.randn(batch, width, generator=g), dim=-1), dim=-1) for _ in range(2)
    ]
    text = torch.stack(texts, 1) if objective == "alip" else texts[0]
    scalars = [torch.tensor(x) for x in ((10.0, -10.0) if objective == "siglip" else (1 / 0.07,))]
    leaves = [x.to(device).requires_grad_() for x in (image, text, *scalars)]
    if objective == "distill":
        leaves += [x.detach().to(device) for x in (F.normalize(image + texts[1], dim=-1), texts[1])]
    return leaves


def step(objective: str, name: str, leaves: list[Tensor]) -> list[Tensor]:
    """Value and gradients."""
    value = LOSSES[objective][name](*leaves)
    return [value.detach(), *torch.autograd.grad(value, [x for x in leaves if x.requires_grad])]


def prepare(objective: str, name: str, batch: int, width: int, device: str, seconds):
    """A call for `peak_memory`, which puts its time into `seconds`; a small one first starts threads and libraries."""
    step(objective, name, make_features(objective, 64, width, torch.device(device)))
    leaves = make_features(objective, batch, width, torch.device(device))

    def call() -> None:
        start = time.perf_counter()
        step(objective, name, leaves)
        seconds.value = time.perf_counter() - start

    return call


def free_mib(device: torch.device) -> float:
    """Memory that is free now, in MiB; without end where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] / 2**20
    try:
        return int(re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())[1]) / 2**10
    except OSError:
        return float("inf")


def median(seconds: float | list[float]) -> float:
    """Of one call or several."""
    return statistics.median(seconds if isinstance(seconds, list) else [seconds])


def check(report: Report, objective: str, width: int, device: torch.device) -> None:
    """Every contender against the plain form in float64, at a size that is no multiple of a chunk."""
    leaves = make_features(objective, 1100, width, device)
    exact = step(objective, "plain", [x.detach().double().requires_grad_(x.requires_grad) for x in leaves])
    for name in LOSSES[objective]:
        errors = [(x.double() - y).norm() / y.norm() for x, y in zip(step(objective, name, leaves), exact)]
        # float32 products of 640 numbers are off by 1e-6 themselves, on some CPUs a little more, in the plain form too;
        # the teacher's are multiplied by 100 before their exponentials
        limit = 2e-5 if objective == "distill" else 2e-6
        report.gate(f"{objective}, {name}: value and gradients against float64", float(max(errors)), limit)


def measure(
    report: Report, objective: str, batch: int, width: int, device: torch.device, per_score: dict, repeats: int
) -> None:
    """Memory and time of the contenders that fit, judged by per_score, their MiB per score at a smaller size."""
    case, peaks, times = f"{batch} x {width}" + TITLES.get(objective, ""), {}, {}
    for name in LOSSES[objective]:
        need, free = per_score.get(name, 0) * batch**2, free_mib(device)
        if need > 0.95 * free:
            report.missing(case, name, f"needs {need / 1024:.1f} GiB, {free / 1024:.1f} are free")
            continue
        seconds = multiprocessing.get_context("spawn").Value("d")
        peaks[name] = peak_memory(prepare, objective, name, batch, width, str(device), seconds, device=device)
        per_score[name], times[name] = peaks[name] / batch**2, seconds.value
    if device.type == "cuda" or batch < CPU_PAIRS:
        leaves = make_features(objective, batch, width, device)
        calls = {name: functools.partial(step, objective, name, leaves) for name in peaks}
        repeats = repeats if device.type == "cuda" else min(repeats, max(1, CPU_PAIRS // batch))
        times = alternate(calls, repeats=repeats, warmup=2 if device.type == "cuda" else 1, device=device)
    for name, seconds in times.items():
        goal = 0.9 if name == "ours" else None
        least = LEAST_PRODUCTS[objective] * 2e-9 * batch**2 * width
        figures = {"peak_mib": peaks[name], "least_gflops": least / median(seconds)}
        report.add(case, name, seconds=seconds, baseline="plain", goal=goal, **figures)
    for name in [name for name in ("plain", "open_clip") if name in peaks and "ours" in peaks]:
        goal = 10 if batch >= 32768 else None
        report.ratio(case, f"peak memory of {name} / ours", peaks[name] / peaks["ours"], goal=goal)
    if "ours" in times and "open_clip" in times:
        report.ratio(case, "time of open_clip / ours", median(times["open_clip"]) / median(times["ours"]))
    if ClipLoss is None and objective != "alip":
        report.missing(case, "open_clip", "open_clip_torch is not installed")


def main() -> None:
    """Check, then memory and time at every size."""
    parser = argument_parser(__doc__)
    parser.add_argument(
        "--sizes", type=int, nargs="+", help="pairs in the global batch (2048 8192, on a GPU 32768 too)"
    )
    parser.add_argument("--objective", choices=sorted(LOSSES), help="default: all")
    parser.add_argument("--width", type=int, default=640, help="numbers per feature (640, B/32's)")
    args = parser.parse_args()
    report = Report("loss", args.device, commit=args.commit)
    sizes = args.sizes or ([2048, 8192] if args.device.type == "cpu" else [2048, 8192, 32768])  # that takes minutes
    for objective in [args.objective] if args.objective else list(LOSSES):
        check(report, objective, args.width, args.device)
        per_score: dict[str, float] = {}
        for batch in sorted(sizes):
            measure(report, objective, batch, args.width, args.device, per_score, args.repeats)
    report.finish(args.output)


if __name__ == "__main__":
    main()
