"""The process group and the device mesh: who computes with whom."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh


@dataclass(frozen=True, kw_only=True)
class Degrees:
    """How many ranks share what. Today all ranks form one fully sharded data-parallel group."""

    dp_shard: int = 0
    """Ranks that share parameters, gradients and optimiser state; 0 takes all."""

    def __post_init__(self):
        if self.dp_shard < 0:
            raise ValueError(f"parallel.dp_shard={self.dp_shard} must be 0 (all ranks) or a number of ranks.")


def start() -> torch.device:
    """Join torchrun's process group, or make one of this process alone; gives this rank's device.

    Training goes through the same mesh and sharding on one process as on thousands.
    """
    cuda = torch.cuda.is_available()
    launched = dist.is_torchelastic_launched()
    device = torch.device("cuda", distributed_c10d.get_node_local_rank(fallback_rank=0)) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        # gloo beside NCCL: objects and CPU tensors are exchanged too
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        if launched:
            dist.init_process_group(backend)
        else:
            dist.init_process_group(backend, rank=0, world_size=1, store=dist.HashStore())  # pyright: ignore[reportPrivateImportUsage]
    return device


def stop() -> None:
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def make(degrees: Degrees, device: torch.device) -> DeviceMesh:
    """The mesh of these degrees. ValueError where they do not multiply to the number of ranks."""
    world = dist.get_world_size()
    shard = degrees.dp_shard or world
    if shard != world:
        raise ValueError(f"parallel.dp_shard={shard} but there are {world} ranks; set it to {world}, or to 0 for all ranks.")
    return init_device_mesh(device.type, (shard,), mesh_dim_names=("dp_shard",))


def rank() -> int:
    """This process's number among all; 0 outside a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """Number of processes; 1 outside a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier() -> None:
    """Wait for every rank."""
    dist.barrier()


def share(item: object) -> list:
    """Every rank's item, in rank order, on every rank."""
    if world() == 1:
        return [item]
    items: list = [None] * world()
    dist.all_gather_object(items, item)
    return items


def total(count: int) -> int:
    """The sum of the ranks' counts."""
    tensor = torch.tensor(count)
    dist.all_reduce(tensor)
    return int(tensor)
