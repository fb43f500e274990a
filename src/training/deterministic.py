"""The variant of a step whose bits do not depend on the number of ranks (--deterministic).

The micro-batches are the same for any number of ranks, every rank computes the objective in full, and the
micro-batches' gradients are added as one binary tree: a step has the same bits on 1, 2, 4, .. ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rwkv_clip.config import ConfigError
from rwkv_clip.dist import World, gather, rank_and_size, single_process
from rwkv_clip.models.freezing import depends_on_the_batch
from rwkv_clip.models.outputs import SCALARS
from rwkv_clip.models.specification import ContrastiveModel

from .gradients import Features, GradientStep, MicroBatches
from .settings import ParallelSettings

BUCKET = 2**23  # elements sent at once: 32 MiB in float32


class DeterministicStep(GradientStep):
    """Gradients summed in a fixed order. ConfigError where batch, ranks and --max-ranks do not fit together."""

    def __init__(self, model: ContrastiveModel, *arguments: Any, **named: Any):
        super().__init__(model, *arguments, **named)
        if any(map(depends_on_the_batch, model.modules())):
            raise ConfigError(
                [
                    "deterministic: the model's batch norms depend on the number of ranks; leave the flag out, or keep "
                    "their statistics with --lock-image --lock-image-freeze-bn-stats"
                ]
            )
        # Gradients of the model's own scalars (logit_scale) come from the objective, computed in full on every rank.
        self.tree = TreeSum([p for name, p in model.named_parameters() if p.requires_grad and name not in SCALARS])

    @staticmethod
    def cut_batch(settings: ParallelSettings, world: World) -> MicroBatches:
        """--max-ranks micro-batches over all ranks, fewer where those do not divide the batch."""
        whole = settings.batch_size * settings.accum_freq * world.size
        count = settings.max_ranks
        while whole % count:
            count //= 2
        size = whole // count
        if count % world.size:
            legal = ", ".join(str(2**i) for i in range(count.bit_length()))
            raise ConfigError(
                [
                    f"deterministic: {world.size} ranks cannot share {count} micro-batches of a global batch of "
                    f"{whole} pairs; use {legal} ranks, or another --max-ranks or batch"
                ]
            )
        if settings.accum_freq > 1 and size > settings.batch_size:
            raise ConfigError(
                [
                    f"max_ranks: {count} micro-batches of {size} pairs, more than --batch-size {settings.batch_size} "
                    f"allows at once; use a power of two of at least {whole // settings.batch_size}"
                ]
            )
        return MicroBatches(size, count // world.size, world.rank * (count // world.size))

    def _called(self) -> nn.Module:
        return self.model

    def _compare(
        self, features: Features, facts: dict[str, Tensor], scale_loss: Callable[[Tensor], Tensor]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor], Features]:
        """With the features of all ranks, as one process would hold them; nothing is exchanged afterwards."""
        everybody = {name: value if name in SCALARS else gather(value) for name, value in features.items()}
        facts = {name: gather(value) for name, value in facts.items()}
        with single_process():
            losses, report, gradients = super()._compare(everybody, facts, scale_loss)
        rows = self.micro_batches.size * self.micro_batches.count
        own = slice(self.world.rank * rows, (self.world.rank + 1) * rows)
        return losses, report, {name: value if name in SCALARS else value[own] for name, value in gradients.items()}

    def _finish(self) -> None:
        sum_in_order(self.tree.finish())


def sum_in_order(tensors: list[Tensor]) -> None:
    """Sum over a power of two of ranks, in place, as a balanced binary tree: ((0 + 1) + (2 + 3)) + ..

    The order in which an all-reduce adds depends on the number of ranks. Here each rank adds all ranks' values of its
    section of the elements; with partial sums that are such trees themselves (`TreeSum`), the result has the same bits
    for 1, 2, 4, .. ranks. It sends and holds no more than an all-reduce of `BUCKET` elements does.
    """
    size = rank_and_size()[1]
    if size == 1:
        return
    under_way = None
    for bucket in _buckets(tensors):  # while one bucket is added, the next is in flight
        following = bucket, *_send(bucket, size)
        if under_way:
            _add(*under_way)
        under_way = following
    if under_way:
        _add(*under_way)


def _send(bucket: list[Tensor], size: int) -> tuple[Tensor, Tensor, dist.Work]:
    """Send each rank its section of the bucket -> (buffer of a whole bucket, sections received, the exchange)."""
    count = sum(tensor.numel() for tensor in bucket)
    section = -(-count // size)
    whole = bucket[0].new_empty(size * section)
    torch.cat([tensor.reshape(-1) for tensor in bucket], out=whole[:count])
    whole[count:].zero_()
    parts = torch.empty_like(whole)
    exchange = dist.all_to_all_single(parts, whole, async_op=True)
    assert exchange is not None, "None only of a group without this rank"
    return whole, parts, exchange


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
    """Consecutive tensors of one dtype, about BUCKET elements together."""
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

    Each gradient is taken from its parameter and added as soon as it is computed, while it is still in the cache.
    Between passes there is one partial sum per level: log2(passes) at most. The number of passes must be a power of
    two.
    """

    def __init__(self, parameters: list[nn.Parameter]):
        self.parameters = parameters
        self._sums: dict[nn.Parameter, list[tuple[int, Tensor]]] = {parameter: [] for parameter in parameters}
        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(self._take)

    def _take(self, parameter: nn.Parameter) -> None:
        total, parameter.grad = parameter.grad, None
        assert total is not None, "the hook runs after the gradient is there"
        level, sums = 0, self._sums[parameter]
        while sums and sums[-1][0] == level:
            total = sums.pop()[1].add_(total)
            level += 1
        sums.append((level, total))

    def finish(self) -> list[Tensor]:
        """Put the sums into `.grad` and return them; a parameter that no pass has reached has no gradient."""
        found = []
        for parameter, sums in self._sums.items():
            assert len({level for level, _ in sums}) <= 1 and len(sums) <= 1, "not every pass has reached a parameter"
            if sums:
                parameter.grad = sums.pop()[1]
                found.append(parameter.grad)
        return found
