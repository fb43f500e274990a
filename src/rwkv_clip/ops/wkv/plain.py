"""WKV6 in a few standard operations of any tensor library, for graphs that leave PyTorch: nothing is written in place.

A sequence is one chunk, or is cut into chunks of about CHUNK tokens. Within a chunk the scores of all pairs are made as
in the product tree (`tree.py`): aligned blocks of 2h tokens are cut into halves, and the decay of a pair that a cut
divides is the product of two factors in [0, 1], each from a token to the cut. The exponents of all tokens are one
product with a constant matrix, `exp(-reach @ exp(w))`; every sum in it has one sign. A level is two scalings and one
product, whose result is taken where its pairs are (`torch.where`): as cheap to start as to compute, which is what
counts in an interpreter of graphs.

Blocks of BLOCK tokens are not cut any further: their factors are taken from the block's middle, and one of the two is
above 1, by up to MIDDLE steps. The exponent of a step is therefore cut off at STEEP, so that exp(MIDDLE * STEEP) fits
with room for r and k; a factor of a step that should be smaller is exp(-STEEP), 1.6e-6 (float64: 1e-50), beside the
neighbour's of 1. Larger blocks would have fewer levels and a larger error; 13 gives 49 tokens two levels.

Chunks meet in states, as in `chunked.py`; here each state is one weighted sum over all chunks, with the products of
the whole chunks between them, so that no loop depends on the length.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK, MIDDLE = 13, 6
CHUNK = 4 * BLOCK
STEEP = {torch.float32: 80.0 / MIDDLE, torch.float64: 690.0 / MIDDLE}


def wkv6_plain(r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor) -> Tensor:
    """r, k, v, w (B, T, H, N), w the raw decay; u (H, N) -> y (B, T, H, N) in v's dtype.

    Differentiable in every way, forward mode included. Under torch.export B and T may be symbolic. float64 is computed
    in float64, everything else in float32.
    """
    dtype = torch.float64 if r.dtype == torch.float64 else torch.float32
    tokens = r.shape[1] if isinstance(r.shape[1], torch.SymInt) else int(r.shape[1])
    with torch.autocast(r.device.type, enabled=False):
        rows = [x.to(dtype).transpose(1, 2) for x in (r, k, v, w)]  # (B, H, T, N)
        steep = torch.exp(rows.pop()).clamp(max=STEEP[dtype])
        u = u.to(dtype).unsqueeze(1)
        if isinstance(tokens, int) and tokens <= 2 * CHUNK:
            y = _score(*rows, steep, u) @ rows[2]
        else:
            y = _run_chunks(*rows, steep, u, tokens)
        return y.transpose(1, 2).to(v.dtype).contiguous()


def _score(r: Tensor, k: Tensor, v: Tensor, steep: Tensor, u: Tensor) -> Tensor:
    """What every token of a chunk reads of every other: r, k, steep (.., H, C, N), u (H, 1, N) -> (.., H, C, C)."""
    tables = _find_tables(r)
    scores = ((r * k) @ u.transpose(-1, -2)).expand(*r.shape[:-1], r.shape[-2])  # right on the diagonal
    early, late = (torch.exp(tables.block[i] @ steep) for i in range(2))
    scores = torch.where(tables.later, (r * early) @ (k * late).transpose(-1, -2), scores)
    scores = torch.where(tables.earlier, (r * late) @ (k * early).transpose(-1, -2), scores)
    for reach, pairs in zip(tables.reaches, tables.pairs):
        factor = torch.exp(reach @ steep)
        scores = torch.where(pairs, (r * factor) @ (k * factor).transpose(-1, -2), scores)
    return scores


class _Tables:
    """Constants of a chunk of C tokens, all (C, C).

    block: exponents of a block's factors by step: of token t seen from later ones, of t seen from earlier ones.
    later, earlier: the pairs (t, s) of one block with s < t and with s > t. reaches, pairs: a level's exponents, and
    the pairs that it holds.
    """

    def __init__(self, count: int, dtype: torch.dtype, device: torch.device):
        i = torch.arange(count, device=device)
        t, j = i[:, None], i[None, :]
        same = t // BLOCK == j // BLOCK
        start = t // BLOCK * BLOCK
        middle = start + MIDDLE
        # Sums from the middle of a block up to a token, without it (for the later of a pair) or with it: of one sign
        # each, positive where the token comes before the middle. The first token of a block is never the later one, nor
        # the last one the earlier: without their sums, none has more than MIDDLE steps.
        self.block = [
            (((j >= t) & (j < middle)).to(dtype) - ((j >= middle) & (j < t)).to(dtype)) * (same & (t > start)),
            (((j >= middle) & (j <= t)).to(dtype) - ((j > t) & (j < middle)).to(dtype))
            * (same & (t < start + BLOCK - 1)),
        ]
        self.later, self.earlier = same & (j < t), same & (j > t)
        self.reaches, self.pairs = [], []
        h = BLOCK
        while h < count:
            own = t // h == j // h
            is_right = (t // h) % 2 == 1
            self.reaches.append(-(torch.where(is_right, j < t, j > t) & own).to(dtype))
            self.pairs.append((t // (2 * h) == j // (2 * h)) & ~own)
            h *= 2


@lru_cache(maxsize=16)
def _keep_tables(count: int, dtype: torch.dtype, device: torch.device) -> _Tables:
    with torch.inference_mode(False):  # a later call may want gradients
        return _Tables(count, dtype, device)


def _find_tables(r: Tensor) -> _Tables:
    """Those for the chunks of r (.., C, N); kept between calls, but for those that only describe tensors."""
    described = type(r) is not Tensor or torch.compiler.is_compiling() or torch.jit.is_tracing()
    make = _Tables if described or torch._C._functorch.peek_interpreter_stack() else _keep_tables
    return make(int(r.shape[-2]), r.dtype, r.device)


def _run_chunks(r: Tensor, k: Tensor, v: Tensor, steep: Tensor, u: Tensor, tokens: int) -> Tensor:
    """(B, H, T, N) -> y of the same shape."""
    size = CHUNK
    if isinstance(tokens, int):  # equal chunks: less padding
        size = -(-tokens // -(-tokens // CHUNK))
    count = (tokens + size - 1) // size
    batch, heads, _, width = r.shape

    def cut(x: Tensor) -> Tensor:
        """-> (B, chunks, H, C, N); nothing is read, and nothing decays, beyond the end."""
        x = F.pad(x, (0, 0, 0, count * size - tokens))
        return x.reshape(batch, heads, count, size, width).transpose(1, 2)

    r, k, v, steep = cut(r), cut(k), cut(v), cut(steep)
    y = _score(r, k, v, steep, u) @ v
    i = torch.arange(size, device=r.device)
    before = torch.exp(-(i[None, :] < i[:, None]).to(r.dtype) @ steep)  # from the chunk's start, to its end
    after = torch.exp(-(i[None, :] > i[:, None]).to(r.dtype) @ steep)
    left, right = _between(steep.sum(-2))
    y = y + (r * before) @ _gather_states(left, (k * after).transpose(-1, -2) @ v)
    y = y + (r * after) @ _gather_states(right, (k * before).transpose(-1, -2) @ v)
    return y.transpose(1, 2).reshape(batch, heads, count * size, width)[:, :, :tokens]


def _between(whole: Tensor) -> tuple[Tensor, Tensor]:
    """Exponents of whole chunks (B, chunks, H, N) -> the decay from chunk c to a later or an earlier chunk d, both
    (B, H, N, chunks of d, chunks of c), 0 elsewhere."""
    count = whole.shape[1]
    i = torch.arange(count, device=whole.device)
    d, c, j = i[:, None, None], i[None, :, None], i[None, None, :]
    inside = ((j > torch.minimum(c, d)) & (j < torch.maximum(c, d))).to(whole.dtype)
    steps = whole.permute(0, 2, 3, 1).unsqueeze(-1)  # (B, H, N, chunks, 1)
    decay = torch.exp(-(inside.reshape(count * count, count) @ steps))
    decay = decay.reshape(*steps.shape[:3], count, count)
    return torch.where(c[..., 0] < d[..., 0], decay, 0.0), torch.where(c[..., 0] > d[..., 0], decay, 0.0)


def _gather_states(decay: Tensor, states: Tensor) -> Tensor:
    """Own states of chunks (B, chunks, H, N, N) -> the sums that each chunk reads, by `_between`."""
    return (decay @ states.permute(0, 2, 3, 1, 4)).permute(0, 3, 1, 2, 4)
