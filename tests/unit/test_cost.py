"""Counts of parameters and floating-point operations, against real models and torch's own counter."""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from neva.batch import Batch
from neva.models import cost, decoder
from neva.models.decoder import DecoderConfig
from neva.models.vit import VisionConfig
from neva.models.vlm import VLM, VLMConfig, build
from tests.packed import CHUNK, item, pack

PLAIN = VLMConfig(
    decoder=DecoderConfig(vocab=96, width=32, layers=3, heads=4, kv_heads=2, ffn=56, head_width=12),
    vision=VisionConfig(image=28, patch=14, width=24, layers=4, heads=2, ffn=40),
)
CONFIGS = {
    "grouped": PLAIN,
    "tied": replace(PLAIN, decoder=replace(PLAIN.decoder, tied=True)),
    "linear": replace(PLAIN, projector="linear", vision=replace(PLAIN.vision, feature="cls_patch", select_layer=-1)),
    "identity": replace(PLAIN, projector="identity", vision=replace(PLAIN.vision, width=32)),
    "deep": replace(PLAIN, projector="mlp3x_gelu", use_im_start_end=True),
    "window": replace(PLAIN, decoder=replace(PLAIN.decoder, window=4, mlp="squared_relu")),
    "shuffled": replace(PLAIN, pixel_shuffle="v2", projector="norm_mlp2x_gelu", vision=replace(PLAIN.vision, heads=3, head_width=10)),
    "experts": replace(PLAIN, decoder=replace(PLAIN.decoder, experts=3, active_experts=2)),
}
PARTS = ("vision", "projector", "decoder", "head")
TRAINED = {
    "all": frozenset(PARTS),
    "projector": frozenset({"projector"}),
    "decoder and projector": frozenset({"projector", "decoder"}),
    "vision frozen": frozenset({"projector", "decoder", "head"}),
    "vision": frozenset({"vision"}),
    "head": frozenset({"head"}),
    "none": frozenset(),
}


def pairs(bounds: torch.Tensor, segments: torch.Tensor, window: int) -> int:
    """Query-key pairs that the mask allows, one by one."""
    flat, total = segments.flatten().tolist(), 0
    for start, stop in zip(bounds.tolist(), bounds.tolist()[1:], strict=False):
        total += sum(j <= i and (not window or i - j < window) for i in range(start, stop) for j in range(start, stop) if flat[i])
    return total


def attention(q, k, v, bounds, segments, window, **_) -> int:
    """Two products of e multiply-adds for each pair and head."""
    return 2 * 2 * q.shape[-1] * q.shape[-2] * pairs(bounds, segments, window)


def attention_backward(grad, saved, bounds, segments, window, **_) -> int:
    """Five products: the scores again, and the gradients of weights, q, k and v."""
    return 5 * 2 * grad.shape[-1] * grad.shape[-2] * pairs(bounds, segments, window)


def vision(q, *_, **__) -> int:
    """Two products over all pairs."""
    n, h, t, e = q
    return 2 * 2 * n * h * t * t * e


def vision_backward(grad, *_, **__) -> int:
    """Five products over all pairs."""
    return vision(grad) * 5 // 2


def product(_sum, a, b, *_, **__) -> int:
    """A matrix product that is added in place, which torch's counter does not know."""
    return 2 * a[0] * a[1] * b[1]


def grouped(a, b, *_, **__) -> int:
    """Each row meets one expert's matrix; with two matrices each expert's is made of its rows."""
    return 2 * a[0] * a[1] * b[-1]


attention._get_raw = attention_backward._get_raw = True
FORMULAS = {
    torch.ops.aten.addmm_: product,
    torch.ops.aten._grouped_mm: grouped,
    torch.ops.neva.document_attention: attention,
    torch.ops.neva.document_attention_backward: attention_backward,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: vision,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: vision_backward,
}


def batch_of(config: VLMConfig) -> tuple[Batch, dict]:
    """A full row and what `cost` must be told of it."""
    samples = [item(config.layout, text=t, images=n, seed=t) for t, n in ((9, 1), (1, 0), (17, 2), (13, 0))]
    batch = pack(config.layout, [samples], sum(len(sample.tokens) for sample in samples))
    assert len(batch.labelled) % CHUNK == 0
    return batch, {"documents": [len(sample.tokens) for sample in samples], "tiles": 3, "labelled": len(batch.labelled)}


@pytest.mark.parametrize("name", CONFIGS)
def test_forward_by_part(name):
    """Each part's forward operations are those that torch counts in the part's module."""
    config = CONFIGS[name]
    model = build(config)
    batch, sizes = batch_of(config)
    with FlopCounterMode(display=False, custom_mapping=FORMULAS) as counter, torch.no_grad():
        model(batch)
    counted = {part: sum(counter.get_flop_counts().get(f"VLM.{part}", {}).values()) for part in PARTS}
    assert cost.Parts(**counted) == cost.forward_flops(config, **sizes)
    assert counter.get_total_flops() == cost.forward_flops(config, **sizes).total


@pytest.mark.parametrize("recomputed", [False, True], ids=["kept logits", "logits again"])
@pytest.mark.parametrize("trained", TRAINED)
@pytest.mark.parametrize("name", CONFIGS)
def test_step(name, trained, recomputed, monkeypatch):
    """Forward and backward operations are what torch counts, whatever is trained."""
    config, parts = CONFIGS[name], TRAINED[trained]
    if config.projector == "identity" and parts == {"projector"}:
        return  # nothing to train
    if recomputed:
        monkeypatch.setattr(decoder, "HEAD_KEPT", 0)
        monkeypatch.setattr(cost, "HEAD_KEPT", 0)
    model = build(config)
    for parameter_name, parameter in model.named_parameters():
        part = parameter_name.split(".")[0]
        parameter.requires_grad_(("projector" if part == "image_vectors" else part) in parts)
    batch, sizes = batch_of(config)
    with FlopCounterMode(display=False, custom_mapping=FORMULAS) as counter:
        losses = model(batch).losses
        if parts:
            losses.sum().backward()
    assert counter.get_total_flops() == cost.step_flops(config, **sizes, trained=parts).total


@pytest.mark.parametrize("name", CONFIGS)
def test_parameters(name):
    """Every parameter is counted once, in its part."""
    model, counts = VLM(CONFIGS[name]), cost.parameters(CONFIGS[name])
    assert counts.total == sum(p.numel() for p in model.parameters())
    vectors = 0 if model.image_vectors is None else model.image_vectors.numel()
    assert counts.projector == vectors + sum(p.numel() for p in model.projector.parameters())
    assert (counts.vision, counts.decoder) == tuple(sum(p.numel() for p in part.parameters()) for part in (model.vision, model.decoder))


def test_recompute_adds_a_forward():
    """Recomputing the blocks costs the decoder's forward once more."""
    _, sizes = batch_of(PLAIN)
    without, recomputed = (cost.step_flops(PLAIN, **sizes, trained=frozenset(PARTS), recompute=r) for r in (False, True))
    assert recomputed.total - without.total == cost.forward_flops(PLAIN, **sizes).decoder
