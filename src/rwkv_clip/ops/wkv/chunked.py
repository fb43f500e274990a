"""WKV6 in PyTorch for any length: the product tree on short sequences, chunks and states on long ones (linear in T).

A long sequence is cut into chunks of CHUNK tokens. Pairs within a chunk go to the tree; a pair across chunks has its
decay split at their borders, R_t . (product of the chunks between) . L_s, where R and L are the products of w from the
start of a chunk and to its end. What is summed over all chunks on one side is a state of N x N per head, which one step
carries over a chunk with product W:

    left[c]  = diag(W[c-1]) left[c-1]  + (k L)[c-1]^T v[c-1]        y[c] += (r R)[c] left[c] + (r L)[c] right[c]
    right[c] = diag(W[c+1]) right[c+1] + (k R)[c+1]^T v[c+1]

The gradients of the states run the other way by the same rule, with r and gy in the place of k and v. As in the tree
every factor is a product of numbers in [0, 1], and the gradient of log w_j is a plain sum over the pairs that straddle
j.

Tensors inside are (B, chunks, H, CHUNK, N), states (B, chunks, H, N, N).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import tree
from .reference import MAX_RAW_DECAY

CHUNK = 64
LONG = 256  # tokens from which chunks are used: the tree is quadratic, and as fast at about 2 N


def supports(r: Tensor) -> bool:
    """Every dtype, size and device."""
    return True


@torch.no_grad()
def forward(r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor) -> Tensor:
    """r, k, v, w (B, T, H, N), w raw decay; u (H, N) -> y (B, T, H, N) in v's dtype. B, T >= 1."""
    if r.shape[1] < LONG:
        return tree.forward(r, k, v, w, u)
    x = _Chunks(r, k, v, w)
    y = x.cut(tree.forward(x.r_tokens, x.k_tokens, x.v_tokens, x.w_tokens, u))
    left, right = x.sum_sides(x.kl, x.kr, x.v)
    y = y + x.rr @ left + x.rl @ right
    return x.join(y, v.dtype)


@torch.no_grad()
def backward(
    gy: Tensor, r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of r, k, v, w (raw decay) and u, each in the dtype of its input. Recomputes everything."""
    if r.shape[1] < LONG:
        return tree.backward(gy, r, k, v, w, u)
    x = _Chunks(r, k, v, w)
    gy_tokens = x.pad(gy)
    *within, gu = tree.backward(gy_tokens, x.r_tokens, x.k_tokens, x.v_tokens, x.w_tokens, u)
    gr, gk, gv, gw = (x.cut(g) for g in within)
    gy = x.cut(gy_tokens)
    left, right = x.sum_sides(x.kl, x.kr, x.v)
    g_right, g_left = x.sum_sides(x.rl, x.rr, gy)  # what reads a chunk's k and v: tokens left of it, right of it
    grr, grl = gy @ left.mT, gy @ right.mT
    gkl, gkr = x.v @ g_left.mT, x.v @ g_right.mT
    gv = gv + x.kl @ g_left + x.kr @ g_right
    # A decay lies inside the pairs that straddle its chunk, that enter the chunk from the left and end after it, and
    # that enter from the right and end before it.
    glog = (x.whole * (left * g_left + right * g_right).sum(-1)).unsqueeze(-2)
    glog = glog + _later(x.rr * grr + x.kr * gkr) + _later((x.rl * grl + x.kl * gkl).flip(-2)).flip(-2)
    gr = gr + grr * x.start + grl * x.end
    gk = gk + gkl * x.end + gkr * x.start
    gw = gw + glog * x.log_w
    return x.join(gr, r.dtype), x.join(gk, k.dtype), x.join(gv, v.dtype), x.join(gw, w.dtype), gu


class _Chunks:
    """The inputs cut into chunks: `*_tokens` (B * chunks, CHUNK, H, N) for the tree, the others as described above.

    start, end: R and L. rr, rl, kr, kl: r and k times them. whole: W (B, chunks, H, N).
    """

    def __init__(self, r: Tensor, k: Tensor, v: Tensor, w: Tensor):
        self.tokens, self.batch, self.dtype = r.shape[1], r.shape[0], tree.compute_dtype(r)
        self.r_tokens, self.k_tokens, self.v_tokens = self.pad(r), self.pad(k), self.pad(v)
        self.w_tokens = self.pad(w, float("-inf"))  # a factor of 1
        r, k, self.v = self.cut(self.r_tokens), self.cut(self.k_tokens), self.cut(self.v_tokens)
        self.log_w = -torch.exp(self.cut(self.w_tokens).clamp(max=MAX_RAW_DECAY))
        factor = torch.exp(self.log_w)
        self.start = F.pad(factor[..., :-1, :], (0, 0, 1, 0), value=1.0).cumprod(-2)
        self.end = F.pad(factor[..., 1:, :], (0, 0, 0, 1), value=1.0).flip(-2).cumprod(-2).flip(-2)
        self.whole = self.start[..., -1, :] * factor[..., -1, :]
        self.rr, self.rl, self.kr, self.kl = r * self.start, r * self.end, k * self.start, k * self.end

    def pad(self, x: Tensor, value: float = 0.0) -> Tensor:
        """(B, T, H, N) -> (B * chunks, CHUNK, H, N) in the dtype of the sums."""
        x = F.pad(x.to(self.dtype), (0, 0, 0, 0, 0, -self.tokens % CHUNK), value=value)
        return x.reshape(-1, CHUNK, *x.shape[2:])

    def cut(self, x: Tensor) -> Tensor:
        """(B * chunks, CHUNK, H, N) -> (B, chunks, H, CHUNK, N)."""
        return x.unflatten(0, (self.batch, -1)).transpose(2, 3)

    def join(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """(B, chunks, H, CHUNK, N) -> (B, T, H, N), contiguous."""
        return x.transpose(2, 3).flatten(1, 2)[:, : self.tokens].to(dtype).contiguous()

    def sum_sides(self, x_end: Tensor, x_start: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """States from the pairs (x, z), x times L and times R: the sums left of every chunk, and right of it."""
        left, right = x_end.mT @ z, x_start.mT @ z
        for sums, order in ((left, range(z.shape[1])), (right, reversed(range(z.shape[1])))):
            state = torch.zeros_like(sums[:, 0])
            for c in order:
                own = sums[:, c].clone()
                sums[:, c] = state
                state = own.addcmul_(state, self.whole[:, c].unsqueeze(-1))
        return left, right


def _later(x: Tensor) -> Tensor:
    """For each token of a chunk the sum over the later ones, without subtractions."""
    return F.pad(x.flip(-2).cumsum(-2).flip(-2)[..., 1:, :], (0, 0, 0, 1))
