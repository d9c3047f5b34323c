"""Bytes that backward keeps: the counts from a config against the tensors that autograd saves, and
the estimate of a whole step against the memory that it really takes."""

from dataclasses import replace

import pytest
import torch

from neva.models import activations
from neva.models.activations import How
from neva.models.vlm import VLM, VLMConfig, build, part_of
from tests.unit.test_cost import CONFIGS, PLAIN, TRAINED, batch_of

WIDE = replace(
    PLAIN,
    decoder=replace(PLAIN.decoder, width=128, heads=8, kv_heads=4, head_width=16, ffn=352, vocab=512),
    vision=replace(PLAIN.vision, width=96, ffn=384, heads=4, image=56),
)


def saved_bytes(model: VLM, batch) -> int:
    """Bytes of the tensors that autograd keeps of a forward, each storage once, without parameters."""
    known = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}
    alive = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        alive.append(tensor)
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        losses = model(batch).losses
    assert losses.requires_grad
    return sum(kept.values())


def prepared(config: VLMConfig, trained: frozenset[str], dtype: torch.dtype):
    model = build(config)
    parts = trained & {part_of(name) for name, _ in model.named_parameters()}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(part_of(name) in parts)
    batch, work = batch_of(config)
    return model.to(dtype), batch, work, parts


@pytest.mark.parametrize("trained", [name for name in TRAINED if name != "none"])
@pytest.mark.parametrize("name", CONFIGS)
def test_saved(name: str, trained: str) -> None:
    model, batch, work, parts = prepared(CONFIGS[name], TRAINED[trained], torch.float32)
    if not parts:
        return
    how = How(trained=parts, size=4, cuda=False)
    found = saved_bytes(model, batch)
    print(name, trained, activations.saved(CONFIGS[name], work, how), found, activations.saved(CONFIGS[name], work, how).total / found)
    assert activations.saved(CONFIGS[name], work, how).total == pytest.approx(found, rel=0.1)
