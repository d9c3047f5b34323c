"""What a stage needs, from its config alone: no GPU, no process group, no weights.

docs/gpus.md says the formulas in words, and what was measured beside them.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from neva.config import counted
from neva.job import TrainConfig
from neva.models import activations, cost
from neva.models.vlm import VLM, VLMConfig, part_of
from neva.parallel.machine import Machine
from neva.parallel.wrap import Group, freeze, sharding_groups

MARGIN = 0.1
"""Share of a device's memory that libraries, gaps between tensors and buffers of communication may
take."""
MOST_RANKS = 4096


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of a stage on one rank."""

    weights: int
    gradients: int
    optimiser: int
    gathered: int
    """Parameters and gradients that FSDP has put together from all ranks, in the precision of the
    computation."""
    activations: int
    """What one micro-batch's backward needs, at most."""

    @property
    def total(self) -> int:
        """All of them, as if their peaks fell together."""
        return self.weights + self.gradients + self.optimiser + self.gathered + self.activations


@dataclass(frozen=True)
class _Group:
    """Parameters that FSDP gathers together, by their shapes."""

    trained: tuple[torch.Size, ...]
    frozen: tuple[torch.Size, ...]


@dataclass(frozen=True)
class Needs:
    """What a stage needs whatever the number of ranks."""

    groups: tuple[_Group, ...]
    size: int
    """Bytes of a number in the precision of the computation."""
    activations: int

    def on(self, ranks: int) -> Memory:
        """What each of so many ranks then holds."""
        trained = stored = 0
        for group in self.groups:
            trained += _numbers(group.trained, ranks)
            # In bf16 the frozen parameters of a group that trains stay in fp32.
            stored += _numbers(group.frozen, ranks) * (4 if group.trained else self.size)
        return Memory(
            weights=4 * trained + stored,
            gradients=4 * trained,
            optimiser=8 * trained,
            gathered=_gathered(self.groups, ranks=ranks, size=self.size),
            activations=self.activations,
        )


def memory(config: TrainConfig, *, ranks: int, precision: str, cuda: bool = True) -> Memory:
    """What FSDP over `ranks` leaves on the first of them, which holds the largest parts.

    Trained parameters are fp32 master weights with gradients and Adam's two moments. A group of
    parameters (`wrap.sharding_groups`) of which none trains is stored in bf16 where the stage
    computes in bf16. ValueError for a trainable pattern that matches nothing.
    """
    return needs(config, precision=precision, cuda=cuda).on(ranks)


def needs(config: TrainConfig, *, precision: str, cuda: bool) -> Needs:
    """What a stage needs in a precision, with a GPU's kernels or a CPU's."""
    with torch.device("meta"):
        model = VLM(config.model)
    freeze(model, config.trainable)
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    how = activations.How(
        trained=frozenset(map(part_of, names)),
        size=2 if precision == "bf16" else 4,
        cuda=cuda,
        recompute=config.recompute == "block",
    )
    groups = tuple(_shapes(group) for group in sharding_groups(model))
    return Needs(groups, how.size, _activations(config, how))


def _shapes(group: Group) -> _Group:
    trained = tuple(p.shape for p in group.parameters if p.requires_grad)
    frozen = tuple(p.shape for p in group.parameters if not p.requires_grad)
    return _Group(trained=trained, frozen=frozen)


def _numbers(shapes: Sequence[torch.Size], ranks: int = 1) -> int:
    """Numbers of parameters on the first rank: FSDP deals out the rows of their first dimension."""
    return sum(math.ceil(shape[0] / ranks) * shape[1:].numel() for shape in shapes)


def _gathered(groups: Sequence[_Group], *, ranks: int, size: int) -> int:
    """One process keeps all parameters gathered until backward has used them; several gather a
    group while the one before is in use. Of gradients there are those of a group, and their sums in
    fp32."""
    wholes = sorted((_numbers(group.trained + group.frozen) for group in groups), reverse=True)
    parameters = sum(wholes) if ranks == 1 else sum(wholes[:2])
    gradients = max(_numbers(group.trained) for group in groups)
    return size * parameters + (size + 4) * gradients


def _activations(config: TrainConfig, how: activations.How) -> int:
    """Bytes of the fullest micro-batch that the config allows."""
    work = fullest(config)
    kept = activations.saved(config.model, work, how).total
    backward = kept + activations.working(config.model, work, how)
    return max(backward, activations.seeing(config.model, work, how))


def fullest(config: TrainConfig) -> cost.Work:
    """A micro-batch of rows without padding, all of whose text is learnt, with as many tiles as
    fit."""
    model, batch = config.model, config.batch
    tiles = _tiles(model, seq_length=batch.seq_length, most=batch.max_tiles)
    rows, tokens = batch.micro_rows, batch.seq_length
    inline = tiles * model.tokens_per_tile if model.vision is not None else 0
    if model.inline != "all":
        inline = inline // model.layout.most_tiles if model.inline == "thumbnail" else 0
    keys = tiles * model.tokens_per_tile if model.inline != "all" else 0
    return cost.Work(
        documents=[tokens] * rows,
        tiles=rows * tiles,
        labelled=rows * max(1, tokens - inline),
        memory=rows * keys,
        crossing=rows * tokens * bool(keys),
    )


def _tiles(model: VLMConfig, *, seq_length: int, most: int) -> int:
    """Tiles that a row can hold: all of them stand in it, or the thumbnail of each image, or
    none."""
    if model.vision is None:
        return 0
    if model.inline == "all":
        return min(most, seq_length // model.tokens_per_tile)
    if model.inline == "thumbnail":
        images = seq_length // model.tokens_per_tile
        return min(most, images * model.layout.most_tiles)
    return most


def table(stages: tuple[TrainConfig, ...], *, ranks: int, machine: Machine) -> str:
    """The memory of each stage, whose precision is definite, and whether the device has it; to
    print."""
    heads = ("weights", "gradients", "optimiser", "gathered", "activations", "total")
    where = f"{counted(ranks, 'rank')}, each" if ranks > 1 else "1 rank"
    found = []
    for stage in stages:
        need = needs(stage, precision=stage.precision, cuda=machine.kind == "cuda")
        found.append(need.on(ranks))
    small = max(m.total for m in found) < 2**30
    lines = [
        f"Memory of {where}, in {'MiB' if small else 'GiB'}",
        f"  {'stage':<13}{'':4}" + "".join(f"{head:>{len(head) + 2}}" for head in heads),
    ]
    verdicts = []
    for stage, m in zip(stages, found, strict=True):
        sizes = {head: f"{getattr(m, head) / 2 ** (20 if small else 30):.2f}" for head in heads}
        cells = "".join(f"{sizes[head]:>{len(head) + 2}}" for head in heads)
        lines.append(f"  {stage.name[:13]:<13}{stage.precision:4}{cells}")
        verdicts.append(f"  {stage.name}: {_verdict(stage, m, ranks=ranks, machine=machine)}")
    lines.append(f"Activations are those of the fullest micro-batch: {_micro_batch(stages)}")
    return "\n".join([*lines, _device(machine, ranks), *verdicts])


def _micro_batch(stages: Sequence[TrainConfig]) -> str:
    told = []
    for stage in stages:
        work = fullest(stage)
        told.append(f"{sum(work.documents):,} tokens and {counted(work.tiles, 'tile')}")
    if len(set(told)) == 1:
        return told[0]
    return ", ".join(f"{text} in {stage.name}" for stage, text in zip(stages, told, strict=True))


def _device(machine: Machine, ranks: int) -> str:
    if machine.kind == "cpu":
        share = " together" if ranks > 1 else ""
        return f"Device found: {machine}, no GPU; {counted(ranks, 'rank')}{share}"
    if machine.count and machine.count < ranks:
        return f"Device found: {machine}, {machine.count} of the {counted(ranks, 'rank')}' GPUs"
    return f"Device{' found' if machine.count else ''}: {machine}"


def _verdict(stage: TrainConfig, needed: Memory, *, ranks: int, machine: Machine) -> str:
    """Whether a stage has room, and if not the least change of those known with which it has."""
    share = ranks if machine.kind == "cpu" else 1  # which share the machine's memory
    if fits(needed, machine, share):
        return "fits"
    total = f"{needed.total * share / 2**30:.1f} GiB, and a tenth of the device is left free"
    changes: dict[str, dict[str, Any]] = {}
    if stage.recompute == "none":
        changes["recompute=block"] = {"recompute": "block"}
    if stage.batch.micro_rows > 1:
        changes["batch.micro_rows=1"] = {"batch": replace(stage.batch, micro_rows=1)}
    tried = [("", stage)]
    for words, fields in changes.items():  # one after the other
        before, changed = tried[-1]
        tried.append((f"{before} {words}".strip(), replace(changed, **fields)))
    cuda = machine.kind == "cuda"
    ways = [(words, needs(one, precision=one.precision, cuda=cuda)) for words, one in tried]
    more = ranks
    while more <= (MOST_RANKS if cuda else ranks):
        for words, need in ways:
            if fits(need.on(more), machine, share):
                on = f" on {more} ranks" if more > ranks else ""
                return f"does NOT fit ({total}); it does{f' with {words}' if words else ''}{on}"
        more *= 2
    return f"does NOT fit ({total}): train fewer parameters (trainable), or a smaller model"


def fits(needed: Memory, machine: Machine, share: int) -> bool:
    """Has a device room for `share` ranks, and `MARGIN` to spare?"""
    return needed.total * share <= machine.memory * (1 - MARGIN)
