"""Logistic regression by L-BFGS and the search for its L2 penalty, as in the linear probe of the CLIP paper.

Minimised is C * sum of cross entropies + |W|^2 / 2 with C = 1 / l2 and a free bias: scikit-learn's
LogisticRegression(C=1 / l2). Everything is float64 with gradients in closed form, chunk by chunk, so no matrix of all
scores exists. L-BFGS works on centred features, which only moves the bias, along their principal axes, scaled by the
loss's curvature: the same minimum in a fraction of the iterations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from rwkv_clip.metrics import tied_ranks

MAX_ITERATIONS = 1000  # of L-BFGS, as in the CLIP paper (arXiv 2103.00020, appendix A.3)
TOLERANCE = 1e-7  # largest entry of the mean loss's gradient in scaled coordinates; scikit-learn stops at 1e-4
STEPS_PER_DECADE, FIRST_DECADE, LAST_DECADE = 8, -6, 6  # the paper's 96 steps from 1e-6 to 1e6
_CELLS = 2**22  # elements of a chunk
_WHOLE = 2**28  # elements of features that are converted once (2 GiB), not again in each pass


@dataclass(frozen=True)
class Classifier:
    """A linear classifier: scores = features @ weights.T + bias. `gradient`: largest entry of the loss's gradient."""

    weights: Tensor  # float64 (classes, C)
    bias: Tensor  # float64 (classes,)
    iterations: int
    gradient: float

    @property
    def converged(self) -> bool:
        return self.gradient <= TOLERANCE

    def ranks(self, features: Tensor, labels: Tensor) -> Tensor:
        """Rank (from 0) of each sample's right class, int64 on the CPU; equal scores of other classes come first."""
        parts = _chunks(features, labels, self.weights)
        ranks = [tied_ranks(torch.addmm(self.bias, x, self.weights.T), label).cpu() for x, label in parts]
        return torch.cat(ranks) if ranks else torch.zeros(0, dtype=torch.int64)


def fit(features: Tensor, labels: Tensor, classes: int, l2: float, device: str | torch.device) -> Classifier:
    """The classifier of features (n, C) and labels (n,) for an L2 penalty (lambda of the CLIP paper).

    Starts from zero, so the same numbers give the same bits (as long as the number of threads is the same). A class
    without samples still takes part.
    """
    if not l2 > 0:
        raise ValueError(f"l2: {l2}; give a positive number")
    if not len(features) or len(features) != len(labels):
        raise ValueError(f"{len(features)} features and {len(labels)} labels: give one label for each, at least one")
    device = torch.device(device)
    device = torch.device("cpu") if device.type == "mps" else device  # which has no float64
    features, labels = features.to(device), labels.to(device)
    center = features.mean(0, dtype=torch.float64)
    penalty = l2 / len(features)  # the mean of the loss instead of its sum: the scale of gradients is fixed
    shift: Tensor | None = center
    if features.numel() <= _WHOLE:
        features, shift = features - center, None
    # At the start the loss curves by covariance / classes + penalty: in these coordinates by 1 in all directions.
    variances, axes = torch.linalg.eigh(_covariance(features, labels, shift))
    axes *= (variances.clamp_min(0) / classes + penalty).rsqrt()
    theta = torch.zeros(classes, features.shape[1] + 1, dtype=torch.float64, device=device)
    optimizer = torch.optim.LBFGS(
        [theta],
        max_iter=MAX_ITERATIONS,
        max_eval=2 * MAX_ITERATIONS,
        tolerance_grad=TOLERANCE,
        tolerance_change=0.0,
        line_search_fn="strong_wolfe",
    )

    def evaluate() -> Tensor:
        weights = theta[:, :-1] @ axes.T
        loss, by_weights, by_bias = loss_and_gradient(features, labels, weights, theta[:, -1], penalty, shift)
        theta.grad = torch.cat([by_weights @ axes, by_bias[:, None]], 1)
        return loss

    optimizer.step(evaluate)
    evaluate()  # the line search may have evaluated another point last
    weights = theta[:, :-1] @ axes.T
    iterations = optimizer.state[theta]["n_iter"]
    return Classifier(weights, theta[:, -1] - weights @ center, iterations, float(theta.grad.abs().max()))


def find_l2(score: Callable[[float], float]) -> float:
    """The penalty with the highest score.

    The CLIP paper's search: seven values from 1e-6 to 1e6, then ever closer neighbours of the best one down to eight
    steps per decade. Of equally good ones the largest penalty wins.
    """
    scores: dict[int, float] = {}
    last, step = (LAST_DECADE - FIRST_DECADE) * STEPS_PER_DECADE, 2 * STEPS_PER_DECADE
    wanted = list(range(0, last + 1, step))
    while True:
        for place in wanted:
            if 0 <= place <= last and place not in scores:
                scores[place] = score(l2_at(place))
        best = max(scores, key=lambda place: (scores[place], place))
        if step == 1:
            return l2_at(best)
        step //= 2
        wanted = [best - step, best + step]


def l2_at(place: int) -> float:
    """The penalty at a position on the paper's scale, 0 .. 96."""
    return 10.0 ** (FIRST_DECADE + place / STEPS_PER_DECADE)


def hold_out(labels: Tensor, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Indices of samples to keep and to hold out, both ascending: of each class `fraction`, rounded, drawn by `seed`.

    A class keeps at least one sample and gives at least one if it has more than one.
    """
    generator = torch.Generator().manual_seed(seed)
    held = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique().tolist():
        places = torch.nonzero(labels == label).flatten()
        count = min(max(1, round(fraction * len(places))), len(places) - 1)
        held[places[torch.randperm(len(places), generator=generator)[:count]]] = True
    return torch.nonzero(~held).flatten(), torch.nonzero(held).flatten()


def loss_and_gradient(
    features: Tensor, labels: Tensor, weights: Tensor, bias: Tensor, penalty: float, center: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean cross entropy of (features - center) + penalty / 2 * |weights|^2, and its gradients by weights and bias.

    The gradient by the scores is softmax - one hot.
    """
    total, by_weights, by_bias = bias.new_zeros(()), penalty * weights, torch.zeros_like(bias)
    for x, label in _chunks(features, labels, weights):
        x = x if center is None else x - center
        scores = torch.addmm(bias, x, weights.T)
        normaliser = scores.logsumexp(1, keepdim=True)
        total += (normaliser - scores.gather(1, label[:, None])).sum() / len(features)
        surplus = (scores - normaliser).exp_()
        surplus.scatter_add_(1, label[:, None], torch.full_like(surplus[:, :1], -1.0))
        by_weights += surplus.T @ x / len(features)
        by_bias += surplus.sum(0) / len(features)
    return total + penalty / 2 * weights.square().sum(), by_weights, by_bias


def _covariance(features: Tensor, labels: Tensor, center: Tensor | None) -> Tensor:
    total = torch.zeros(features.shape[1], features.shape[1], dtype=torch.float64, device=features.device)
    for x, _ in _chunks(features, labels, total):
        x = x if center is None else x - center
        total += x.T @ x
    return total / len(features)


def _chunks(features: Tensor, labels: Tensor, weights: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows as float64 on the device of the weights, few enough that their scores stay small."""
    rows = max(1, _CELLS // max(weights.shape))
    for x, label in zip(features.split(rows), labels.split(rows)):
        yield x.to(weights.device, torch.float64), label.to(weights.device)
