"""Sums in an order that does not depend on the number of ranks: what --deterministic adds gradients with."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rwkv_clip.dist import rank_and_size

BUCKET = 2**23  # elements that travel at a time: 32 MiB in float32


def sum_in_order(tensors: list[Tensor]) -> None:
    """Sum over a power of two of ranks, in place, as a balanced binary tree: ((0 + 1) + (2 + 3)) + ..

    An all-reduce adds in an order of its own that depends on the number of ranks. Here each rank adds the ranks' parts
    of its share of the numbers; with partial sums that are such trees themselves (`TreeSum`), the result is the same
    bits for 1, 2, 4, .. ranks. It sends and holds no more than an all-reduce of `BUCKET` elements does.
    """
    size = rank_and_size()[1]
    if size == 1:
        return
    under_way = None
    for bucket in _buckets(tensors):  # while one bucket is added, the next is on its way
        following = bucket, *_send(bucket, size)
        if under_way:
            _add(*under_way)
        under_way = following
    if under_way:
        _add(*under_way)


def _send(bucket: list[Tensor], size: int) -> tuple[Tensor, Tensor, dist.Work]:
    """Each rank's share of the bucket to that rank -> (buffer of a whole bucket, what comes here, the exchange)."""
    count = sum(tensor.numel() for tensor in bucket)
    share = -(-count // size)
    whole = bucket[0].new_empty(size * share)
    torch.cat([tensor.reshape(-1) for tensor in bucket], out=whole[:count])
    whole[count:].zero_()
    parts = torch.empty_like(whole)
    return whole, parts, dist.all_to_all_single(parts, whole, async_op=True)


def _add(bucket: list[Tensor], whole: Tensor, parts: Tensor, exchange: dist.Work) -> None:
    exchange.wait()
    level = list(parts.view(rank_and_size()[1], -1))
    while len(level) > 1:
        level = [a.add_(b) for a, b in zip(level[::2], level[1::2])]
    dist.all_gather_into_tensor(whole, level[0])
    start = 0
    for tensor in bucket:
        tensor.copy_(whole[start : start + tensor.numel()].view_as(tensor))
        start += tensor.numel()


def _buckets(tensors: list[Tensor]) -> Iterator[list[Tensor]]:
    """Neighbours of one dtype, about BUCKET elements together."""
    bucket: list[Tensor] = []
    for tensor in tensors:
        if bucket and (tensor.dtype != bucket[0].dtype or sum(t.numel() for t in bucket) + tensor.numel() > BUCKET):
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket


class TreeSum:
    """Sums the gradients of several backward passes as a balanced binary tree over the passes.

    Each gradient leaves its parameter and is added while it is still in the cache, where it is made. Between the passes
    there is one partial sum per level: log2(passes) at most. The passes must be a power of two.
    """

    def __init__(self, parameters: list[nn.Parameter]):
        self.parameters = parameters
        self._sums: dict[nn.Parameter, list[tuple[int, Tensor]]] = {parameter: [] for parameter in parameters}
        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(self._take)

    def _take(self, parameter: nn.Parameter) -> None:
        total, parameter.grad = parameter.grad, None
        level, sums = 0, self._sums[parameter]
        while sums and sums[-1][0] == level:
            total = sums.pop()[1].add_(total)
            level += 1
        sums.append((level, total))

    def finish(self) -> list[Tensor]:
        """Put the sums into `.grad` and return them; a parameter that no pass has reached has none."""
        found = []
        for parameter, sums in self._sums.items():
            assert len({level for level, _ in sums}) <= 1 and len(sums) <= 1, "not every pass has reached a parameter"
            if sums:
                parameter.grad = sums.pop()[1]
                found.append(parameter.grad)
        return found
