"""WKV6 in matrix-product form: the product tree, for sequences that are not long (chunked.py cuts the others).

The decay between t and s, D[t,s] = product of w strictly between them, is symmetric in (t, s) and splits at any border
between them. Aligned blocks of 2h tokens are cut into a left and a right half for h = 1, 2, 4, ..; each pair t != s is
cut by exactly one level, and there D[t,s] = f[t] f[s], where f is the product of w from the token to the cut:

    f[t] = product over [start of its half, t)   for t in a right half
    f[s] = product over (s, end of its half]     for s in a left half

One level costs two matrix products, (r f)(k f)^T and that times v, for both directions at once. Every f is a product of
numbers in [0, 1]: nothing overflows, divides or cancels, whatever the decay; this also holds in the backward pass,
where the gradient of log w_j is a plain sum over the pairs that straddle j.

Levels below BLOCK share one masked BLOCK x BLOCK matrix; above it left halves meet right halves only. Tensors inside
are (M, T', N) with M = B * H and T' the next power of two (r = k = v = 0, w = 1 beyond T); a level touches no more than
the blocks that T needs.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import torch
from torch import Tensor

from .reference import MAX_RAW_DECAY

BLOCK = 8  # measured best of 8, 16, 32 on CPU: three masked levels, plain products above


def compute_dtype(x: Tensor) -> torch.dtype:
    """float64 stays float64; everything else is computed in float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _round_up(t: int) -> int:
    return -(-t // BLOCK) * BLOCK


def _to_rows(x: Tensor, dtype: torch.dtype, fill: float = 0.0) -> Tensor:
    """(B, T, H, N) -> (B*H, T', N), positions beyond T set to `fill`."""
    b, t, h, n = x.shape
    padded = max(BLOCK, 1 << (t - 1).bit_length())
    rows = torch.empty(b, h, padded, n, dtype=dtype, device=x.device)
    rows[:, :, :t] = x.transpose(1, 2)
    rows[:, :, t:] = fill
    return rows.view(b * h, padded, n)


def _from_rows(x: Tensor, like: Tensor) -> Tensor:
    """(B*H, T', N) -> (B, T, H, N), contiguous, with the shape and dtype of `like`."""
    b, t, h, n = like.shape
    y = torch.empty(like.shape, dtype=like.dtype, device=x.device)
    return y.copy_(x.view(b, h, x.shape[1], n)[:, :, :t].transpose(1, 2))


def _blocks(x: Tensor, size: int, t: int) -> Tensor:
    """(M, T', N) -> view (M, ceil(t / size), size, N): the blocks that hold the first t tokens."""
    count = -(-t // size)
    return x[:, : count * size].unflatten(1, (count, size))


def _halves(x: Tensor, h: int, t: int) -> tuple[Tensor, Tensor]:
    """Left and right halves (M, P, h, N) of the blocks of 2h tokens."""
    pairs = _blocks(x, 2 * h, t).unflatten(2, (2, h))
    return pairs[:, :, 0], pairs[:, :, 1]


def _levels(w: Tensor, t: int) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield (h, prefix, suffix) for h = 1, 2, 4, .. < t: products of w in [start of the h-block, i) and (i, its end].

    Both (M, T', N) and updated in place between yields: doubling a block multiplies the half after the cut by the
    whole of the other half.
    """
    prefix, suffix, whole = torch.ones_like(w), torch.ones_like(w), w
    h = 1
    while h < t:
        yield h, prefix, suffix
        left_whole, right_whole = whole[:, 0::2], whole[:, 1::2]
        count = -(-t // (2 * h))
        _halves(prefix, h, t)[1].mul_(left_whole[:, :count].unsqueeze(2))
        _halves(suffix, h, t)[0].mul_(right_whole[:, :count].unsqueeze(2))
        whole = left_whole * right_whole
        h *= 2


@lru_cache(maxsize=8)
def _block_tables(dtype: torch.dtype, device: torch.device) -> tuple[list[Tensor], list[Tensor]]:
    """Per level h < BLOCK, two 0/1 matrices (BLOCK, BLOCK): the pairs of the level; and for each j the tokens of its
    half beyond it as seen from the cut (later in a right half, earlier in a left half). The pairs of those tokens are
    the ones with w_j strictly inside."""
    i = torch.arange(BLOCK, device=device)
    masks, beyonds = [], []
    for h in (1 << level for level in range(BLOCK.bit_length() - 1)):
        half = i // h
        same_half = half[:, None] == half[None, :]
        same_pair = half[:, None] // 2 == half[None, :] // 2
        later = i[None, :] > i[:, None]
        beyond = torch.where((half % 2 == 1)[:, None], later, later.T)
        masks.append((same_pair & ~same_half).to(dtype))
        beyonds.append((beyond & same_half).to(dtype))
    return masks, beyonds


def _inner_factor(prefix: Tensor, suffix: Tensor, h: int, t: int) -> Tensor:
    """f of a level h < BLOCK, in blocks (M, t / BLOCK, BLOCK, N)."""
    f = torch.stack([_halves(suffix, h, t)[0], _halves(prefix, h, t)[1]], 2)
    return f.view(f.shape[0], t // BLOCK, BLOCK, f.shape[-1])


def _transposed(x: Tensor) -> Tensor:
    return x.transpose(-1, -2)


class _Rows:
    """The inputs as padded rows (M, T', N), and `t`, the number of tokens rounded up to whole blocks."""

    def __init__(self, r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor):
        dtype = compute_dtype(r)
        self.t = _round_up(r.shape[1])
        self.r, self.k, self.v = (_to_rows(x, dtype) for x in (r, k, v))
        # exp(-exp(.)) is 0 long before the cap, and its gradient too; the cap only keeps 0 * inf away.
        self.log_w = -torch.exp(w.to(dtype).clamp(max=MAX_RAW_DECAY))
        self.w = _to_rows(torch.exp(self.log_w), dtype, 1.0)
        self.u = u.to(dtype).repeat(r.shape[0], 1)[:, None, None]  # (M, 1, 1, N)

    def blocks(self, x: Tensor) -> Tensor:
        return _blocks(x, BLOCK, self.t)


@torch.no_grad()
def forward(r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor) -> Tensor:
    """r, k, v, w (B, T, H, N), w raw decay; u (H, N) -> y (B, T, H, N) in v's dtype. T >= 1, M >= 1."""
    x = _Rows(r, k, v, w, u)
    rb, kb, vb = x.blocks(x.r), x.blocks(x.k), x.blocks(x.v)
    masks, _ = _block_tables(x.r.dtype, r.device)
    y = torch.zeros_like(x.v)
    inner = torch.diag_embed((rb * kb * x.u).sum(-1))
    for h, prefix, suffix in _levels(x.w, x.t):
        if h < BLOCK:
            f = _inner_factor(prefix, suffix, h, x.t)
            inner.addcmul_((rb * f) @ _transposed(kb * f), masks[h.bit_length() - 1])
            continue
        fl, fr = _halves(suffix, h, x.t)[0], _halves(prefix, h, x.t)[1]
        (rl, rr), (kl, kr), (vl, vr), (yl, yr) = (_halves(z, h, x.t) for z in (x.r, x.k, x.v, y))
        yr += ((rr * fr) @ _transposed(kl * fl)) @ vl
        yl += ((rl * fl) @ _transposed(kr * fr)) @ vr
    x.blocks(y).add_(inner @ vb)
    return _from_rows(y, v)


@torch.no_grad()
def backward(
    gy: Tensor, r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of r, k, v, w (raw decay) and u, each in the dtype of its input. Recomputes every factor."""
    x = _Rows(r, k, v, w, u)
    gy_rows = _to_rows(gy, x.r.dtype)
    rb, kb, vb, gyb = (x.blocks(z) for z in (x.r, x.k, x.v, gy_rows))
    masks, beyonds = _block_tables(x.r.dtype, r.device)
    gr, gk, gv, glog = (torch.zeros_like(x.r) for _ in range(4))
    grb, gkb, glogb = x.blocks(gr), x.blocks(gk), x.blocks(glog)

    weights_grad = gyb @ _transposed(vb)  # of the BLOCK x BLOCK matrix
    diagonal_grad = weights_grad.diagonal(dim1=-2, dim2=-1).unsqueeze(-1)
    inner = torch.diag_embed((rb * kb * x.u).sum(-1))
    grb += diagonal_grad * x.u * kb
    gkb += diagonal_grad * x.u * rb
    gu = (diagonal_grad * rb * kb).sum((1, 2)).view(r.shape[0], *u.shape).sum(0)

    for h, prefix, suffix in _levels(x.w, x.t):
        if h < BLOCK:
            level = h.bit_length() - 1
            f = _inner_factor(prefix, suffix, h, x.t)
            rf, kf, masked = rb * f, kb * f, weights_grad * masks[level]
            inner.addcmul_(rf @ _transposed(kf), masks[level])
            grf, gkf = masked @ kf, _transposed(masked) @ rf
            grb.addcmul_(grf, f)
            gkb.addcmul_(gkf, f)
            glogb += beyonds[level] @ (rf * grf + kf * gkf)
            continue
        fl, fr = _halves(suffix, h, x.t)[0], _halves(prefix, h, x.t)[1]
        halves = [_halves(z, h, x.t) for z in (x.r, x.k, x.v, gy_rows, gr, gk, gv, glog)]
        _cross_backward(*zip(*halves), fl, fr)
    x.blocks(gv).add_(_transposed(inner) @ gyb)
    gw = _from_rows(glog, x.log_w).mul_(x.log_w)  # d log w / d raw decay = log w
    return _from_rows(gr, r), _from_rows(gk, k), _from_rows(gv, v), gw.to(w.dtype), gu.to(u.dtype)


def _cross_backward(left: tuple[Tensor, ...], right: tuple[Tensor, ...], fl: Tensor, fr: Tensor) -> None:
    """Add one level's gradients in place. left, right: (r, k, v, gy, gr, gk, gv, glog), each (M, P, h, N)."""
    rl, kl, vl, gyl, grl, gkl, gvl, glogl = left
    rr, kr, vr, gyr, grr, gkr, gvr, glogr = right
    rfl, kfl, rfr, kfr = rl * fl, kl * fl, rr * fr, kr * fr
    to_right, to_left = (
        gyr @ _transposed(vl),
        gyl @ _transposed(vr),
    )  # gradients of both weight matrices (h, h)
    gvl += (kfl @ _transposed(rfr)) @ gyr
    gvr += (kfr @ _transposed(rfl)) @ gyl
    grfr, gkfl = to_right @ kfl, _transposed(to_right) @ rfr
    grfl, gkfr = to_left @ kfr, _transposed(to_left) @ rfl
    later = torch.ones(fl.shape[-2], fl.shape[-2], dtype=fl.dtype, device=fl.device).triu_(1)
    glogr += later @ (rfr * grfr + kfr * gkfr)
    glogl += later.T @ (rfl * grfl + kfl * gkfl)
    grl.addcmul_(grfl, fl)
    grr.addcmul_(grfr, fr)
    gkl.addcmul_(gkfl, fl)
    gkr.addcmul_(gkfr, fr)
