"""What each rank holds of a model: all of it (DDP), a share (FSDP2), or a share within its node (HSDP).

With shares every block of a tower is put together when it is its turn, forward and backward, and forgotten again. The
optimizer does not know: `Shares.own` are plain tensors, this rank's rows of every parameter in the parameter's own
memory, and AdamW, clipping and the gradient scaler go element by element. Checkpoints do not know either: they hold
whole tensors, which are put together and cut one at a time (`whole_tensors`, `part_of`).

Weights begin as one whole model in every rank's host memory, made from the same seed, and move to a GPU block by block:
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
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from rwkv_clip.config import ConfigError, Settings
from rwkv_clip.dist import World, sum_over_ranks


def has_shares(settings: Settings, world: World) -> bool:
    """Whether ranks hold shares of the model; one process alone holds it all."""
    return settings.parallel != "ddp" and world.size > 1


def distribute_model(model: nn.Module, settings: Settings, world: World) -> nn.Module:
    """Compile and distribute a model, in place; returns what to call in training.

    ConfigError where hsdp does not fit the nodes. A model that gets shares may be in host memory.
    """
    if has_shares(settings, world):
        return _shard(model, _make_mesh(settings, world), settings.torchcompile)
    if settings.torchcompile:
        model.compile()  # in place: parameter names stay as they are
    if world.size == 1 or settings.deterministic:  # --deterministic adds the gradients itself
        return model
    return DistributedDataParallel(model, device_ids=[world.device] if world.device.type == "cuda" else None)


def _make_mesh(settings: Settings, world: World) -> DeviceMesh:
    """Ranks that share a model: all, or those of a node, which are neighbours by number."""
    if settings.parallel == "fsdp":
        return init_device_mesh(world.device.type, (world.size,), mesh_dim_names=("share",))
    nodes, rest = divmod(world.size, world.local_size)
    if rest:
        raise ConfigError(
            [f"parallel: hsdp needs equal nodes; {world.size} ranks, but {world.local_size} on this one; use fsdp"]
        )
    return init_device_mesh(world.device.type, (nodes, world.local_size), mesh_dim_names=("copy", "share"))


def _shard(model: nn.Module, mesh: DeviceMesh, compiled: bool) -> nn.Module:
    """Cut the members of all ModuleLists, which are a tower's blocks, then what is left; scalars stay whole."""
    scalars = {parameter for parameter in model.parameters() if not parameter.dim()}
    for scalar in scalars:
        scalar.data = scalar.data.to(mesh.device_type)
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    blocks = dict.fromkeys(block for blocks in reversed(lists) for block in blocks)  # inner ones first
    for block in blocks:
        if not scalars.issuperset(block.parameters()):
            if compiled:  # by block: a graph ends where parameters are put together
                block.compile()
            fully_shard(block, mesh=mesh, ignored_params=scalars)
    # The rest, too, is forgotten after a forward pass: one without a backward pass would keep it, and soon it is old.
    return fully_shard(model, mesh=mesh, ignored_params=scalars, reshard_after_forward=True)


@contextlib.contextmanager
def synchronized(parallel: nn.Module, last: bool) -> Iterator[None]:
    """For a backward pass of what `distribute_model` returned; after the last of a step gradients are means over ranks.

    Shares are exchanged in every pass, since gradients that wait for the last would be those of the whole model; what
    nodes exchange waits.
    """
    shares = isinstance(parallel, FSDPModule)
    if shares:
        parallel.set_requires_all_reduce(last)
    waits = isinstance(parallel, DistributedDataParallel) and not last
    with parallel.no_sync() if waits else contextlib.nullcontext():
        yield
    if shares and last:
        for parameter in parallel.parameters():
            if not parameter.dim() and parameter.grad is not None:  # held by all, so nobody else does it
                parameter.grad = sum_over_ranks(parameter.grad) / dist.get_world_size()


def whole_tensors(tensors: Mapping[str, Tensor], keep: bool) -> dict[str, Tensor]:
    """Tensors of which ranks hold shares are put together, one at a time; all ranks call this.

    They arrive in host memory where `keep` is true; on other ranks nothing stays, and nothing is returned.
    """
    whole = {}
    for key, tensor in tensors.items():
        if isinstance(tensor, DTensor):
            tensor = tensor.full_tensor()
            tensor = tensor.cpu() if keep else tensor
        if keep:
            whole[key] = tensor
    return whole


def part_of(whole: Tensor, like: Tensor) -> Tensor:
    """This rank's rows of a tensor of the shape of `like`. Ranks get as many each, but the last ones fewer or none."""
    if not isinstance(like, DTensor) or not whole.dim():
        return whole
    rows = -(-len(whole) // like.device_mesh.shape[-1])
    start = like.device_mesh.get_local_rank("share") * rows
    return whole[start : start + rows].clone()  # a view would keep all of it


def norms_of(groups: Mapping[str, list[Tensor]]) -> dict[str, Tensor]:
    """Norm of each list of tensors, other ranks' shares included: the same on all ranks."""
    meshes = [tensor.device_mesh for tensors in groups.values() for tensor in tensors if isinstance(tensor, DTensor)]
    if not meshes:
        return {name: nn.utils.get_total_norm(tensors) for name, tensors in groups.items()}
    first = meshes[0].get_local_rank("share") == 0  # who counts what all of them hold
    norms = [
        nn.utils.get_total_norm(
            [t.to_local() if isinstance(t, DTensor) else t if first else torch.zeros_like(t) for t in tensors]
        )
        for tensors in groups.values()
    ]
    squares = torch.stack(norms).square()
    dist.all_reduce(squares, group=meshes[0].get_group("share"))
    return dict(zip(groups, squares.sqrt().unbind()))


class Shares:
    """This rank's rows of a model's parameters as plain parameters, `own`, by name; with DDP simply the parameters."""

    def __init__(self, model: nn.Module):
        self.model = model
        self.own = {name: _own(parameter) for name, parameter in model.named_parameters()}

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """As a module's."""
        return iter(self.own.items())

    def take_gradients(self) -> None:
        """Let `own` have the gradients of the model's parameters: the same memory."""
        for name, parameter in self.model.named_parameters():
            if isinstance(parameter, DTensor):
                own = self.own[name]
                assert own.data_ptr() == parameter.to_local().data_ptr(), f"{name} has moved"
                own.grad = None if parameter.grad is None else parameter.grad.to_local()

    @torch.no_grad()
    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Put whole tensors, one for each key of the model's state dict, into the model."""
        for key, value in self.model.state_dict().items():
            (value.to_local() if isinstance(value, DTensor) else value).copy_(part_of(weights[key], value))

    def cut_state(self, optim: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Whole optimizer state, keyed `parameter/slot` -> that of `own`. What has another key stays as it is."""
        parameters = dict(self.model.named_parameters())
        return {key: part_of(value, parameters.get(key.rpartition("/")[0], value)) for key, value in optim.items()}

    def mark_state(self, optim: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Optimizer state of `own` -> the same as `whole_tensors` takes it: shares of something whole."""
        parameters = dict(self.model.named_parameters())
        return {key: _as_share(value, parameters.get(key.rpartition("/")[0], value)) for key, value in optim.items()}


class WholeModel:
    """The model for the main rank that validates: where ranks hold shares of it, a copy that has all.

    Made before the model is distributed. The copy needs room for all weights on the main rank's device while it is
    used, and is in host memory otherwise.
    """

    def __init__(self, model: nn.Module, settings: Settings, world: World):
        self.model, self.world, self.copied = model, world, has_shares(settings, world)
        self.copy = copy.deepcopy(model).cpu() if self.copied and world.is_main else None

    @contextlib.contextmanager
    def put_together(self) -> Iterator[nn.Module | None]:
        """With the weights of now; all ranks call this, and those that are not the main rank may get None."""
        if not self.copied:
            yield self.model
            return
        weights = whole_tensors(self.model.state_dict(), keep=self.world.is_main)
        if self.copy is None:
            yield None
            return
        self.copy.load_state_dict(weights)
        del weights
        try:
            yield self.copy.to(self.world.device)
        finally:
            self.copy.cpu()


def _as_share(share: Tensor, like: Tensor) -> Tensor:
    if not isinstance(like, DTensor) or not share.dim():
        return share
    return DTensor.from_local(share, like.device_mesh, like.placements, shape=like.shape, stride=like.stride())


def _own(parameter: nn.Parameter) -> nn.Parameter:
    if not isinstance(parameter, DTensor):
        return parameter
    return nn.Parameter(parameter.detach().to_local(), parameter.requires_grad)
