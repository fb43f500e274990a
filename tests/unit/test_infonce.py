"""InfoNCE in chunks is the plain formula: value, gradients, extreme scales, and never a matrix of all scores."""

import contextlib

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from rwkv_clip.losses import InfoNCE, pairs
from rwkv_clip.losses.pairs import contrastive_losses, pair_losses

BATCH, WIDTH = 8, 5


def features(batch=BATCH, width=WIDTH, dtype=torch.float64, scale=14.0):
    g = torch.Generator().manual_seed(0)
    pair = (F.normalize(torch.randn(batch, width, generator=g, dtype=torch.float64), dim=-1) for _ in range(2))
    return [x.to(dtype).requires_grad_() for x in (*pair, torch.tensor(scale, dtype=torch.float64))]


def plain(image, text, scale):
    scores, target = scale * image @ text.T, torch.arange(len(image))
    return (F.cross_entropy(scores, target) + F.cross_entropy(scores.T, target)) / 2


def ours(*leaves):
    return InfoNCE()(*leaves)[0]["contrastive"]


def value_and_gradients(loss, leaves):
    value = loss(*leaves)
    return [value, *torch.autograd.grad(3 * value, leaves)]  # 3: what comes from above is not always 1


@pytest.mark.parametrize("rows", [1, 3, 4, 7, 8, 9])
@pytest.mark.parametrize("scale", [0.0, 1.0, 100.0])
def test_every_chunk_height_is_the_plain_formula(rows, scale, monkeypatch):
    monkeypatch.setattr(pairs, "CPU_ROWS", rows)
    leaves = features(scale=scale)
    for found, expected in zip(value_and_gradients(ours, leaves), value_and_gradients(plain, leaves)):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)


def test_columns_bound_the_height(monkeypatch):
    seen = []
    chunks = pairs.score_chunks
    monkeypatch.setattr(pairs, "score_chunks", lambda *x: (seen.append(y[0]) or y for y in chunks(*x)))
    monkeypatch.setattr(pairs, "CHUNK", 3 * BATCH + 1)
    ours(*features())
    assert seen == [slice(0, 3), slice(3, 6), slice(6, 8)]
    monkeypatch.setattr(pairs, "CHUNK", BATCH - 1)
    seen.clear()
    ours(*features())
    assert len(seen) == BATCH


@pytest.mark.parametrize("first", [0, 3, BATCH])
def test_more_texts_than_images(first):
    """What a rank sees: its own images, everybody's texts, and a weight of its own for each loss."""
    image, _, scale = features(BATCH)
    texts = features(2 * BATCH)[1]
    leaves, weights = (image, texts, scale), torch.linspace(-1, 2, 2 * BATCH, dtype=torch.float64).view(2, BATCH)

    def formula(image, texts, scale):
        scores = scale * image @ texts.T
        matched = scores.diagonal(first)[:BATCH]
        return scores.logsumexp(1) - matched, scores.logsumexp(0)[first : first + BATCH] - matched

    def weigh(losses):
        return (weights * torch.stack(losses)).sum()

    found = pair_losses(*leaves, first)[:2]
    for x, y in zip(found, formula(*leaves)):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-13)
    for x, y in zip(torch.autograd.grad(weigh(found), leaves), torch.autograd.grad(weigh(formula(*leaves)), leaves)):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-13)


def test_gradcheck_and_registration(monkeypatch):
    monkeypatch.setattr(pairs, "CPU_ROWS", 3)
    assert torch.autograd.gradcheck(contrastive_losses, features(5, 3, scale=2.0))
    torch.library.opcheck(pair_losses, (*features(5, 3, torch.float32), 0))


@pytest.mark.parametrize("scale", [14.0, 100.0])
def test_float32_against_float64(scale):
    leaves = features(1100, 64, torch.float32, scale)  # three chunks of the real height
    exact = value_and_gradients(plain, [x.detach().double().requires_grad_() for x in leaves])
    for found, expected in zip(value_and_gradients(ours, leaves), exact):
        assert (found.double() - expected).norm() <= 1e-6 * expected.norm()


def test_scores_far_below_the_largest():
    """A text that is the opposite of every picture: next to the largest score its exponentials are 0 in float32.

    2e-6: a log-sum-exp kept as one number of the size of the scores gives 4e-5 here."""
    g = torch.Generator().manual_seed(0)
    image = F.normalize(torch.randn(BATCH, WIDTH, generator=g) * 0.1 + torch.eye(WIDTH)[0], dim=-1).requires_grad_()
    text = image.detach().clone()
    text[3] = -text[3]
    text.requires_grad_()
    leaves = [image, text, torch.tensor(1000.0, requires_grad=True)]
    exact = value_and_gradients(plain, [x.detach().double().requires_grad_() for x in leaves])
    for found, expected in zip(value_and_gradients(ours, leaves), exact):
        assert (found.double() - expected).norm() <= 2e-6 * expected.norm()
    assert 100 < exact[0] < float("inf")


class Largest(TorchDispatchMode):
    """Numbers in the largest tensor that any operation returns, inside our opaque operators too."""

    def __init__(self):
        super().__init__()
        self.numbers = 0
        named = ("pair_losses", "pair_losses_backward")
        self.inside = {getattr(torch.ops.rwkv_clip, name).default: getattr(pairs, name)._init_fn for name in named}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        body = self.inside.get(func)
        with self if body else contextlib.nullcontext():
            out = (body or func)(*args, **(kwargs or {}))
        tensors = [x for x in (out if isinstance(out, (tuple, list)) else [out]) if isinstance(x, torch.Tensor)]
        self.numbers = max([self.numbers, *(x.numel() for x in tensors)])
        return out


@pytest.mark.parametrize("keys", [(), (torch.arange(256) // 2, torch.arange(256))], ids=["pairs", "mask"])
def test_no_matrix_of_all_scores(monkeypatch, keys):
    monkeypatch.setattr(pairs, "CPU_ROWS", 16)
    leaves = features(256)
    with Largest() as largest:
        value_and_gradients(lambda *x: ours(*x, *keys), leaves)
    assert largest.numbers == 2 * 16 * 256, "two buffers of one chunk"
    with Largest() as largest:
        value_and_gradients(plain, leaves)
    assert largest.numbers == 256 * 256, "the plain form is seen to have it"


@pytest.mark.parametrize("keys", [(), (torch.arange(BATCH),) * 2], ids=["pairs", "mask"])
def test_whole_graph_compiles(keys):
    torch._dynamo.reset()
    leaves = features()
    compiled = torch.compile(lambda *x: ours(*x, *keys), fullgraph=True, backend="aot_eager")
    for found, expected in zip(value_and_gradients(compiled, leaves), value_and_gradients(plain, leaves)):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("shapes", [((4, 3), (5, 3)), ((4, 3), (4, 2)), ((0, 3), (0, 3)), ((4,), (4,))])
def test_features_that_are_no_pairs_are_refused(shapes):
    with pytest.raises(ValueError, match=r"features: images \(.*\) and texts \(.*\); both must be \(B, D\)"):
        InfoNCE()(*(torch.ones(shape) for shape in shapes), torch.tensor(1.0))
