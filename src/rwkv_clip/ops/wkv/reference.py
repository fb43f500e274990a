"""The plain recurrence: the readable specification of WKV6. Every other backend is tested against it.

For one sample and head, with factor w_t = exp(-exp(decay_t)) per channel,

    y_t = r_t (diag(u) k_t v_t^T + F_{t-1} + G_{t+1})
    F_t = diag(w_t) F_{t-1} + k_t v_t^T        (left to right)
    G_t = diag(w_t) G_{t+1} + k_t v_t^T        (right to left)

so a pair (t, s) is weighted by the product of w strictly between t and s, and the diagonal by u.
"""

from __future__ import annotations

import torch
from torch import Tensor

# exp(-exp(x)) is exactly 0 in float32 from 4.7 and in float64 from 6.6; a cap keeps exp(x) finite, so that
# 0 * inf can never make a NaN in a gradient.
MAX_RAW_DECAY = 80.0


def wkv6_reference(r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor) -> Tensor:
    """Bidirectional WKV6, step by step; differentiable by autograd.

    r, k, v, w: (B, T, H, N), w the raw decay; u: (H, N). Returns (B, T, H, N) in v's dtype; sums are kept in
    float32, or in float64 for float64 input.
    """
    dtype = torch.float64 if r.dtype == torch.float64 else torch.float32
    with torch.autocast(r.device.type, enabled=False):
        factor = torch.exp(-torch.exp(w.to(dtype).clamp(max=MAX_RAW_DECAY)))
        rs, ks, vs, ws = (x.to(dtype).unbind(1) for x in (r, k, v, factor))
        steps = range(len(rs))
        ys = [(rs[t] * u.to(dtype) * ks[t]).sum(-1, keepdim=True) * vs[t] for t in steps]
        for order in (steps, reversed(steps)):
            state = r.new_zeros(r.shape[0], r.shape[2], r.shape[3], r.shape[3], dtype=dtype)
            for t in order:
                # A product and a sum, not a matmul: that one's gradient would follow an ambient autocast.
                ys[t] = ys[t] + (rs[t].unsqueeze(-1) * state).sum(-2)
                state = ws[t].unsqueeze(-1) * state + ks[t].unsqueeze(-1) * vs[t].unsqueeze(-2)
        return torch.stack(ys, 1).to(v.dtype)
