"""What the plan says of memory is what FSDP2 would hold: the article's models, sharded on the meta
device over a process group that exists in name only."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from neva import plan, recipes
from neva.job import TrainConfig
from neva.models.vlm import VLM
from neva.parallel import mesh as ranks
from neva.parallel.wrap import freeze, logical_parameters, parallelize, sharding_groups

GIB = 2**30


@contextmanager
def fake_mesh(world: int) -> Iterator[DeviceMesh]:
    """The first of so many ranks; collectives do nothing."""
    ranks.stop()
    dist.init_process_group("fake", rank=0, world_size=world, store=FakeStore())
    try:
        yield init_device_mesh("cpu", (world,), mesh_dim_names=("dp_shard",))
    finally:
        ranks.stop()


def sharded(stage: TrainConfig, mesh: DeviceMesh, precision: str) -> VLM:
    with torch.device("meta"):
        model = VLM(stage.model)
    freeze(model, stage.trainable)
    parallelize(model, mesh, precision=precision, recompute=stage.recompute)
    return model


def held(model: VLM) -> tuple[int, int, int]:
    """Bytes of this rank's parts, of their gradients in the same dtype and of two moments each."""
    weights = gradients = 0
    for parameter in model.parameters():
        assert isinstance(parameter, DTensor)
        local = parameter.to_local()
        size = local.numel() * local.element_size()
        weights += size
        gradients += size if parameter.requires_grad else 0
    return weights, gradients, 2 * gradients


def told(config: TrainConfig, *, world: int, precision: str) -> tuple[int, int, int]:
    """The same as the plan says it."""
    m = plan.memory(config, ranks=world, precision=precision)
    return m.weights, m.gradients, m.optimiser


def gathered(model: VLM) -> list[set[str]]:
    """Names of the parameters that FSDP2 itself gathers together, group by group."""
    names = {id(parameter): name for name, parameter in logical_parameters(model)}
    found = []
    for module in model.modules():
        if isinstance(module, FSDPModule):
            state: Any = module._get_fsdp_state()
            for group in state._fsdp_param_groups:
                found.append({names[id(one.sharded_param)] for one in group.fsdp_params})
    return found


def planned(stage: TrainConfig) -> list[set[str]]:
    with torch.device("meta"):
        model = VLM(stage.model)
    freeze(model, stage.trainable)
    names = {id(parameter): name for name, parameter in logical_parameters(model)}
    return [{names[id(p)] for p in group.parameters} for group in sharding_groups(model)]


PRESETS = [f"nvlm-{kind}-{size}" for kind in "dxh" for size in ("34b", "72b")]


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("stage", [0, 1])
def test_the_articles_models(name: str, stage: int) -> None:
    """Both stages of each, on one rank, eight, and a number that divides no width."""
    config = recipes.get(name)[stage]
    for world in (1, 8, 7):
        with fake_mesh(world) as mesh:
            model = sharded(config, mesh, "bf16")
            assert told(config, world=world, precision="bf16") == held(model)
    assert sorted(map(sorted, gathered(model))) == sorted(map(sorted, planned(config)))


def test_cross_attention_that_trains_in_a_frozen_decoder() -> None:
    """NVLM-X's first stage: its blocks are stored in bf16, though cross-attention inside them
    trains."""
    config = recipes.get("nvlm-x-72b")[0]
    assert plan.memory(config, ranks=1, precision="bf16").weights / GIB == pytest.approx(156.1, abs=0.05)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "trainable",
    [
        ("projector.*",),
        ("decoder.blocks.1.*",),
        ("decoder.blocks.*.cross.*", "!decoder.blocks.0.*"),
        ("image_*", "head.norm.*"),
        ("*", "!decoder.blocks.*.cross.*"),
    ],
)
def test_odd_choices_of_what_trains(trainable: tuple[str, ...], precision: str) -> None:
    """Parts of groups, cross-attention alone, and all but it; learned vectors beside the
    embedding."""
    (config, *_) = recipes.get("nvlm-x-tiny")
    if trainable[0] == "image_*":
        config = recipes.get("llava-tiny")[0]
        config = replace(config, model=replace(config.model, use_im_start_end=True))
    config = replace(config, trainable=trainable)
    with fake_mesh(3) as mesh:
        assert told(config, world=3, precision=precision) == held(sharded(config, mesh, precision))
