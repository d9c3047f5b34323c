"""What a stage needs, from its config alone: no GPU, no process group, no weights."""

import math
from dataclasses import dataclass

import torch

from neva.job import TrainConfig
from neva.models.vlm import VLM
from neva.parallel.wrap import freeze


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of a stage's tensors on one rank that last from step to step; activations and buffers of a step come on top."""

    weights: int
    gradients: int
    optimiser: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.weights + self.gradients + self.optimiser


def memory(config: TrainConfig, *, ranks: int, precision: str) -> Memory:
    """What FSDP over `ranks` leaves on each: fp32 master weights, gradients and Adam's two moments of what is trained; frozen parts in bf16
    where the stage computes in bf16, for a part that is frozen whole. ValueError for a trainable pattern that matches nothing.
    """
    with torch.device("meta"):
        model = VLM(config.model)
    freeze(model, config.trainable)
    trained = frozen = 0
    groups = [*model.decoder.blocks, model.vision, model.projector, model.head, model]
    seen: set[int] = set()
    for module in (m for m in groups if m is not None):
        own = [p for p in module.parameters() if id(p) not in seen]
        seen |= {id(p) for p in own}
        train = sum(p.numel() for p in own if p.requires_grad)
        rest = sum(p.numel() for p in own) - train
        trained += train
        frozen += rest * (2 if precision == "bf16" and not train else 4)
    weights, gradients, moments = (math.ceil(size / ranks) for size in (4 * trained + frozen, 4 * trained, 8 * trained))
    return Memory(weights=weights, gradients=gradients, optimiser=moments)


def table(stages: tuple[TrainConfig, ...], *, ranks: int, precision: str) -> str:
    """The memory of each stage, to print."""
    lines = [
        f"Memory on each of {ranks} rank(s) in {precision}, without activations\n  {'stage':<14}{'weights':>12}{'gradients':>12}{'optimiser':>12}"
    ]
    for stage in stages:
        m = memory(stage, ranks=ranks, precision=precision)
        cells = "".join(f"{size / 2**30:>8.2f} GiB" for size in (m.weights, m.gradients, m.optimiser))
        lines.append(f"  {stage.name:<14}{cells}")
    return "\n".join(lines)
