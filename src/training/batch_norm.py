"""Batch norms that normalise with the statistics of all ranks' rows (--use-bn-sync), as one process would.

Written here because torch's SyncBatchNorm runs on GPUs only. Mean, then variance, are summed over ranks in float32.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rwkv_clip.config import ConfigError
from rwkv_clip.dist import rank_and_size, sum_over_ranks


class _Sum(torch.autograd.Function):
    """Sum over ranks, whose gradient is the sum of all ranks' gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return sum_over_ranks(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad)
        return grad


class _Synchronized(nn.modules.batchnorm._BatchNorm):
    """What a batch norm of one process computes in training from the rows of all ranks."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, ..) -> the same; every rank calls this with its own rows."""
        if not self.training or rank_and_size()[1] == 1:
            return super().forward(x)
        self._check_input_dim(x)
        dims, shape = [0, *range(2, x.dim())], [1, -1, *[1] * (x.dim() - 2)]
        dtype = torch.promote_types(x.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            wide = x.to(dtype)
            rows = wide.new_tensor(x.numel() // x.shape[1])
            total, count = _Sum.apply(torch.cat([wide.sum(dims), rows[None]])).split([x.shape[1], 1])
            mean = total / count.detach()
            centred = wide - mean.view(shape)
            variance = _Sum.apply(centred.square().sum(dims)) / count.detach()
            out = centred * (variance + self.eps).rsqrt().view(shape)
            if self.affine:
                out = out * self.weight.view(shape) + self.bias.view(shape)
            self._move_statistics(mean.detach(), variance.detach() * (count / (count - 1)).detach())
        return out.to(x.dtype)

    @torch.no_grad()
    def _move_statistics(self, mean: Tensor, variance: Tensor) -> None:
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked.add_(1)
        share = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), share)
        self.running_var.lerp_(variance.to(self.running_var.dtype), share)


class _Synchronized1d(_Synchronized, nn.BatchNorm1d):
    pass


class _Synchronized2d(_Synchronized, nn.BatchNorm2d):
    pass


KINDS: dict[type, type] = {nn.BatchNorm1d: _Synchronized1d, nn.BatchNorm2d: _Synchronized2d}


def synchronize_norms(model: nn.Module) -> int:
    """Have the batch norms of a model compute with all ranks' rows while training, in place; names of parameters and
    frozen statistics stay. Returns their number. ConfigError for a model without any, or with another kind of them."""
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    others = sorted({type(norm).__name__ for norm in norms if type(norm) not in KINDS})
    if others:
        raise ConfigError([f"use_bn_sync: {', '.join(others)} cannot be synchronised; leave it out"])
    if not norms:
        raise ConfigError(["use_bn_sync: the model has no batch norms; leave it out"])
    for norm in norms:
        norm.__class__ = KINDS[type(norm)]
    return len(norms)
