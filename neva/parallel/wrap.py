"""From a model on the meta device to one that trains on the mesh: the one place with an order."""

import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from neva.models.cross import CrossAttention
from neva.models.vlm import VLM

_RECOMPUTE_PREFIX = "_checkpoint_wrapped_module."


def logical_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Parameters under the names that checkpoints and patterns use, whatever wraps them."""
    return ((name.replace(_RECOMPUTE_PREFIX, ""), parameter) for name, parameter in model.named_parameters())


def freeze(model: nn.Module, patterns: tuple[str, ...]) -> None:
    """Let the parameters that match train, and no others; later patterns win, `!pattern` takes away.

    ValueError for a pattern that matches no parameter.
    """
    parameters = dict(logical_parameters(model))
    trained = dict.fromkeys(parameters, False)
    for pattern in patterns:
        matched = [name for name in parameters if fnmatchcase(name, pattern.removeprefix("!"))]
        if not matched:
            some = ", ".join(sorted({name.split(".", 1)[0] + ".*" for name in parameters}))
            raise ValueError(f"trainable={pattern!r} matches no parameter. Patterns are wildcards over names such as {some}.")
        trained.update(dict.fromkeys(matched, not pattern.startswith("!")))
    if not any(trained.values()):
        raise ValueError(f"trainable={list(patterns)} leaves nothing to train.")
    for name, parameter in parameters.items():
        parameter.requires_grad_(trained[name])


def parallelize(model: VLM, mesh: DeviceMesh, *, precision: str, recompute: str = "none", compile: bool = False) -> None:
    """Shard a model whose parameters are on the meta device and already frozen or not; in place.

    Order: recompute, compile, shard. `bf16` keeps fp32 shards of trained parameters (the master weights), stores a module in bf16
    where all of it is frozen, and computes in bf16. Reductions over ranks are sums in fp32: the loss is normalised globally before.
    """
    blocks = model.decoder.blocks
    for number, block in enumerate(blocks):
        if recompute == "block":
            blocks[number] = checkpoint_wrapper(block)
        if compile:
            blocks[number].compile()
    half = precision == "bf16"
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16 if half else None, reduce_dtype=torch.float32 if half else None)
    for group in sharding_groups(model):
        if half and group.frozen:
            _store_in_half(group.module, set(group.parameters))
        # Parameters gathered for forward stay for backward where nothing is gained by freeing them between.
        fully_shard(group.module, mesh=mesh, mp_policy=policy, reshard_after_forward=mesh.size() > 1)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo has no pre-multiplied sum
    # Sequential modules end in a view; nothing here writes in place to a module's output.
    warnings.filterwarnings("ignore", message=".*returned a view tensor.*", category=UserWarning)


@dataclass(frozen=True, kw_only=True, eq=False)
class Group:
    """Parameters that FSDP stores in one dtype and gathers together."""

    module: nn.Module
    parameters: tuple[nn.Parameter, ...]
    """Those of the module that are in no group before it."""

    @property
    def frozen(self) -> bool:
        """Does none of them train? Such a group is stored in bf16 where a stage computes in
        bf16."""
        return not any(p.requires_grad for p in self.parameters)


def sharding_groups(model: VLM) -> list[Group]:
    """How FSDP divides a model whose parameters are frozen or not: inner modules before outer ones.

    `plan.memory` counts by these too.
    """
    blocks = model.decoder.blocks
    modules = (*_apart(blocks), *blocks, model.vision, model.projector, model.head, model)
    groups: list[Group] = []
    taken: set[nn.Parameter] = set()
    for module in modules:
        if module is None or not any(True for _ in module.parameters()):
            continue
        own = tuple(p for p in module.parameters() if p not in taken)
        groups.append(Group(module=module, parameters=own))
        taken.update(own)
    return groups


def _apart(blocks: Iterable[nn.Module]) -> list[nn.Module]:
    """Cross-attention that trains where its block is frozen, or the reverse. It is a group of its own, which costs a compiled block graph breaks."""
    found = []
    for block in blocks:
        for module in (m for m in block.modules() if isinstance(m, CrossAttention)):
            own = {id(p) for p in module.parameters()}
            if {p.requires_grad for p in module.parameters()} != {p.requires_grad for p in block.parameters() if id(p) not in own}:
                found.append(module)
    return found


def _store_in_half(module: nn.Module, own: set[nn.Parameter]) -> None:
    for child in module.modules():
        for name, parameter in child.named_parameters(recurse=False):
            if parameter in own:
                setattr(child, name, nn.Parameter(parameter.to(torch.bfloat16), requires_grad=False))


def fill(model: nn.Module, device: torch.device, value: Callable[[str, torch.Size], Tensor | None]) -> None:
    """Give every parameter memory on the device and the value that `value(name, shape)` draws whole on the CPU; each rank keeps its part.

    None leaves a parameter without a value: a checkpoint's is loaded next.
    """
    model.to_empty(device=device)
    with torch.no_grad():
        for name, parameter in logical_parameters(model):
            drawn = value(name, parameter.shape)
            assert isinstance(parameter, DTensor), "parallelize comes before"
            if drawn is not None:
                whole = drawn.to(device, parameter.dtype)
                parameter.copy_(distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None))


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor put together; every rank must call."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
