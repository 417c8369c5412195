"""One model on several processes: copies that average their gradients (DDP), or shares of every tensor (FSDP2).

A sharded tensor is a DTensor: it has the shape of the whole and holds this process's rows. `gathered` makes whole ones
again for files, which are therefore the same at any number of processes; `placed` takes this process's share of one.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from ahriuwu_cli.models.dynamics import Dynamics
from ahriuwu_cli.training.distributed import Group


def synchronised(loss: nn.Module, group: Group) -> nn.Module:
    """`loss` with gradients that are means over all processes: call this, never the module inside."""
    if group.world == 1 or group.sharded:  # FSDP2 reduces inside the model
        return loss
    from torch.nn.parallel import DistributedDataParallel

    copies = DistributedDataParallel(loss, gradient_as_bucket_view=True)
    if group.device.type == "cpu":
        _fix_buckets(copies)
    return copies


def keeping_apart(loss: nn.Module, apart: bool) -> AbstractContextManager:
    """A micro-batch that is not the last: DDP leaves its gradients local.

    FSDP2 reduces every micro-batch, since local gradients would be as large as the whole model.
    """
    return loss.no_sync() if apart and hasattr(loss, "no_sync") else nullcontext()


def shard(model: Dynamics, group: Group) -> Dynamics:
    """Leave this process its share of every weight, on its device: each block by itself, then what is around them."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh(group.device.type, (group.world,))
    empty = {p for p in model.parameters() if not p.numel()}
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    sharded = fully_shard(model, mesh=mesh, ignored_params=empty)
    register_fsdp_forward_method(sharded, "extend")
    return sharded


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a DTensor. By its method, since importing the class takes a second."""
    return hasattr(tensor, "full_tensor")


def local(tensor: Tensor) -> Tensor:
    """This process's rows of a sharded tensor, sharing its memory; any other tensor as it is."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All rows of a sharded tensor, an exchange that every process must take part in; any other tensor as it is."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def gathered(tensors: Mapping[str, Tensor], keep: bool) -> dict[str, Tensor]:
    """The whole tensors where `keep` is set, sharded ones on the CPU; {} elsewhere. Every process must take part."""
    kept = {}
    for name, tensor in tensors.items():
        full = whole(tensor.detach())
        if keep:
            kept[name] = full.cpu() if is_sharded(tensor) else full
    return kept


def placed(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor laid out as `like` is: this process's share of it, or the tensor itself."""
    if not is_sharded(like) or tensor.shape != like.shape:
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def placed_as(tensors: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Whole tensors laid out as their namesakes; names that `like` lacks are left for the loader to refuse."""
    return {name: placed(t, like[name]) if name in like else t for name, t in tensors.items()}


def placed_for(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An optimiser's whole tensors ("<parameter index>.<name>") laid out as the parameters they belong to."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    like = {}
    for name in tensors:
        index = name.partition(".")[0]
        if index.isascii() and index.isdigit() and len(index) < 10 and int(index) < len(parameters):
            like[name] = parameters[int(index)]
    return placed_as(tensors, like)


def _fix_buckets(copies: nn.Module) -> None:
    """Lay out DDP's buckets for good, so that gradients are summed in the same order in every step.

    DDP itself does it after the first step of a process's life, which a resumed run would take in another order. Like
    this they are not exchanged while the backward pass still runs: on a GPU, where no order is promised, that is dear.
    """
    copies.reducer._push_all_rebuilt_params()
    copies.reducer._rebuild_buckets()
