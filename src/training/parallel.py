"""What each rank holds of a model: all of it (DDP), a shard (FSDP2), or a shard within its node (HSDP).

With shards, every block of a tower is gathered when it is needed, forward and backward, and freed again. The optimizer
is unaware of this: `Shards.own` are plain tensors, this rank's rows of every parameter in the parameter's own memory,
and AdamW, clipping and the gradient scaler work element by element. So are checkpoints: they hold whole tensors, which
are gathered and sharded one at a time.

Weights start as one whole model in every rank's host memory, made from the same seed, and move to a GPU block by block:
models larger than host memory are out of scope.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from rwkv_clip.config import ConfigError
from rwkv_clip.dist import World, rank_and_size, sum_over_ranks
from rwkv_clip.models.specification import ContrastiveModel

from .settings import ParallelSettings


def is_sharded(settings: ParallelSettings, world: World) -> bool:
    """Whether ranks hold shards of the model; a single process holds all of it."""
    return settings.parallel != "ddp" and world.size > 1


def distribute_model(model: nn.Module, objective: nn.Module, settings: ParallelSettings, world: World) -> nn.Module:
    """Compile and distribute a model and the parameters of its objective, in place; returns what to call for the model
    in training.

    ConfigError where hsdp does not fit the nodes. A model to be sharded may be in host memory.
    """
    if is_sharded(settings, world):
        mesh = _make_mesh(settings, world)
        if any(True for _ in objective.parameters()):
            _shard(objective, mesh, compiled=False)
        return _shard(model, mesh, settings.torchcompile)
    if settings.torchcompile:
        model.compile()  # in place: parameter names do not change
    if world.size == 1 or settings.deterministic:  # --deterministic adds the gradients itself
        return model
    return DistributedDataParallel(model, device_ids=[world.device] if world.device.type == "cuda" else None)


def _make_mesh(settings: ParallelSettings, world: World) -> DeviceMesh:
    """Mesh of the ranks that hold one model together: all, or those of a node, which are numbered consecutively."""
    if settings.parallel == "fsdp":
        return init_device_mesh(world.device.type, (world.size,), mesh_dim_names=("shard",))
    nodes, rest = divmod(world.size, world.local_size)
    if rest:
        raise ConfigError(
            [f"parallel: hsdp needs equal nodes; {world.size} ranks, but {world.local_size} on this one; use fsdp"]
        )
    return init_device_mesh(world.device.type, (nodes, world.local_size), mesh_dim_names=("copy", "shard"))


def _shard(model: nn.Module, mesh: DeviceMesh, compiled: bool) -> nn.Module:
    """Shard the members of all ModuleLists, which are a tower's blocks, then the rest; scalars stay whole."""
    scalars = {parameter for parameter in model.parameters() if not parameter.dim()}
    for scalar in scalars:
        scalar.data = scalar.data.to(mesh.device_type)
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    blocks = dict.fromkeys(block for blocks in reversed(lists) for block in blocks)  # inner ones first
    for block in blocks:
        if not scalars.issuperset(block.parameters()):
            if compiled:  # by block: a graph ends where parameters are gathered
                block.compile()
            fully_shard(block, mesh=mesh, ignored_params=scalars)
    # The rest, too, is freed after a forward pass: one without a backward pass would keep it, and soon it is old.
    fully_shard(model, mesh=mesh, ignored_params=scalars, reshard_after_forward=True)
    return model


@contextlib.contextmanager
def synchronized(parallel: nn.Module, last: bool) -> Iterator[None]:
    """For a backward pass through the result of `distribute_model`; after a step's last, gradients are means over
    ranks.

    Gradients are reduced to shards in every pass, since until then they take the memory of the whole model; the
    exchange between nodes waits for the last.
    """
    if isinstance(parallel, FSDPModule):
        parallel.set_requires_all_reduce(last)
    with parallel.no_sync() if isinstance(parallel, DistributedDataParallel) and not last else contextlib.nullcontext():
        yield
    if last and isinstance(parallel, FSDPModule):
        average_gradients(parallel)


def average_gradients(module: nn.Module) -> None:
    """Average over ranks the gradients of parameters that all ranks hold whole, as neither DDP nor FSDP does it for
    them."""
    size = rank_and_size()[1]
    if size > 1:
        for parameter in module.parameters():
            if not isinstance(parameter, DTensor) and parameter.grad is not None:
                parameter.grad = sum_over_ranks(parameter.grad) / size


def whole_tensors(tensors: Mapping[str, Tensor], keep: bool) -> dict[str, Tensor]:
    """Gather tensors of which ranks hold shards, one at a time; all ranks call this.

    They arrive in host memory where `keep` is true; other ranks keep nothing and return nothing.
    """
    whole = {}
    for key, tensor in tensors.items():
        if isinstance(tensor, DTensor):
            tensor = tensor.full_tensor()
            tensor = tensor.cpu() if keep else tensor
        if keep:
            whole[key] = tensor
    return whole


def own_shard(whole: Tensor, like: Tensor) -> Tensor:
    """This rank's rows of a tensor of the shape of `like`."""
    if not isinstance(like, DTensor) or not whole.dim():
        return whole
    shard = distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None).to_local()
    return shard.clone()  # a view would keep the whole tensor in memory


def norms_of(groups: Mapping[str, list[Tensor]]) -> dict[str, Tensor]:
    """Norm of each list of tensors, other ranks' shards included: the same on all ranks."""
    meshes = [tensor.device_mesh for tensors in groups.values() for tensor in tensors if isinstance(tensor, DTensor)]
    if not meshes:
        return {name: nn.utils.get_total_norm(tensors) for name, tensors in groups.items()}
    first = meshes[0].get_local_rank("shard") == 0  # the rank that counts what all of them hold
    norms = [
        nn.utils.get_total_norm(
            [t.to_local() if isinstance(t, DTensor) else t if first else torch.zeros_like(t) for t in tensors]
        )
        for tensors in groups.values()
    ]
    squares = torch.stack(norms).square()
    dist.all_reduce(squares, group=meshes[0].get_group("shard"))
    return dict(zip(groups, squares.sqrt().unbind()))


class Shards:
    """This rank's rows of all parameters of model and objective as plain parameters, `own`, by name; where nothing is
    sharded, the parameters themselves. Names of the objective's begin with `objective.`."""

    def __init__(self, model: nn.Module, objective: nn.Module):
        self.model = model
        self._modules = {"": model, "objective.": objective}
        self.own = {name: _own(parameter) for name, parameter in self.whole()}

    def whole(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The parameters as the modules have them, with their whole shapes."""
        for prefix, module in self._modules.items():
            yield from module.named_parameters(prefix=prefix.rstrip("."))

    def take_gradients(self) -> None:
        """Give `own` the gradients of the parameters, in the same memory."""
        for name, parameter in self.whole():
            if isinstance(parameter, DTensor):
                own = self.own[name]
                assert own.data_ptr() == parameter.to_local().data_ptr(), f"{name} has moved"
                own.grad = parameter.grad.to_local() if isinstance(parameter.grad, DTensor) else None

    def zero_gradients(self) -> None:
        """Forget all gradients."""
        for own in self.own.values():
            own.grad = None
        for _, parameter in self.whole():  # where these differ
            parameter.grad = None

    def gradient_norms(self) -> dict[str, Tensor]:
        """Gradient norm of each tower, and of the objective: parameters by the first word of their names."""
        groups: dict[str, list[Tensor]] = {}
        for name, parameter in self.whole():
            if parameter.grad is not None:
                groups.setdefault(name.partition(".")[0], []).append(parameter.grad)
        return norms_of(groups)

    def cut_state(self, optim: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Whole optimizer state, keyed `parameter/slot` -> that of `own`. Tensors with other keys are returned
        unchanged."""
        whole = dict(self.whole())
        return {key: own_shard(value, whole.get(key.rpartition("/")[0], value)) for key, value in optim.items()}

    def mark_state(self, optim: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Optimizer state of `own` -> the same as DTensors, shards of a whole, which `whole_tensors` gathers."""
        whole = dict(self.whole())
        return {key: _as_shard(value, whole.get(key.rpartition("/")[0], value)) for key, value in optim.items()}


def load_whole(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy whole tensors, one for each key of the module's state dict, into the module. ValueError unless all fit."""
    copy_whole(module.state_dict(), tensors)


@torch.no_grad()
def copy_whole(own: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    """Copy whole tensors into those of the same names, of which this rank may hold shards. ValueError unless all
    fit."""
    problems = [f"{key}: unexpected" for key in tensors if key not in own]
    problems += [f"{key}: missing" for key in own if key not in tensors]
    problems += [
        f"{key}: shape {tuple(tensors[key].shape)}, should be {tuple(value.shape)}"
        for key, value in own.items()
        if key in tensors and tensors[key].shape != value.shape
    ]
    if problems:
        raise ValueError("; ".join(problems))
    for key, value in own.items():
        (value.to_local() if isinstance(value, DTensor) else value).copy_(own_shard(tensors[key], value))


class WholeModel:
    """The model for evaluation on the main rank, or `everywhere`: a full copy where ranks hold only shards of it.

    Made before the model is distributed. The copy takes memory for all weights on the rank's device while it is used,
    and stays in host memory otherwise.
    """

    def __init__(self, model: ContrastiveModel, settings: ParallelSettings, world: World, everywhere: bool = False):
        self.model, self.world, self.copied = model, world, is_sharded(settings, world)
        self.everywhere = everywhere and world.size > 1
        self.copy = copy.deepcopy(model).cpu() if self.copied and (world.is_main or everywhere) else None

    @contextlib.contextmanager
    def gathered(self) -> Iterator[ContrastiveModel | None]:
        """With the current weights; all ranks call this, and ranks other than the main rank may get None."""
        if not self.copied:
            with _buffers_of_main(self.model) if self.everywhere else contextlib.nullcontext():
                yield self.model
            return
        weights = whole_tensors(self.model.state_dict(), keep=self.copy is not None)
        if self.copy is None:
            yield None
            return
        self.copy.load_state_dict(weights)
        del weights
        try:
            net = self.copy.to(self.world.device)
            with _buffers_of_main(net) if self.everywhere else contextlib.nullcontext():
                yield net
        finally:
            self.copy.cpu()


@contextlib.contextmanager
def _buffers_of_main(model: nn.Module) -> Iterator[None]:
    """Inside, all ranks have the buffers that the main rank's checkpoints hold: the running statistics of batch norms
    differ."""
    kept = model.state_dict().keys()
    own = [(buffer, buffer.clone()) for name, buffer in model.named_buffers() if name in kept]
    for buffer, _ in own:
        of_main = buffer.contiguous()
        dist.broadcast(of_main, src=0)
        buffer.copy_(of_main)
    try:
        yield
    finally:
        for buffer, before in own:
            buffer.copy_(before)


def _as_shard(shard: Tensor, like: Tensor) -> Tensor:
    if not isinstance(like, DTensor) or not shard.dim():
        return shard
    return DTensor.from_local(shard, like.device_mesh, like.placements, shape=like.shape, stride=like.stride())


def _own(parameter: nn.Parameter) -> nn.Parameter:
    whole = parameter.detach()
    if not isinstance(whole, DTensor):
        return parameter
    return nn.Parameter(whole.to_local(), parameter.requires_grad)
