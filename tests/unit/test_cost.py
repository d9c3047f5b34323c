"""Counts of parameters and floating-point operations, against real models and torch's own counter."""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from neva.batch import Batch
from neva.data.pack import Budget, collate
from neva.models import cost, decoder
from neva.models.decoder import DecoderConfig
from neva.models.vit import VisionConfig
from neva.models.vlm import VLM, VLMConfig, build, part_of
from tests.oracle import test_cross
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
CONFIGS |= {
    "NVLM-X": replace(test_cross.X, vision=replace(test_cross.VISION, select_layer=-1)),
    "NVLM-X, wider": replace(test_cross.CONFIGS["X, other heads"], decoder=replace(test_cross.CONFIGS["X, MLP behind"].decoder, tied=True)),
    "NVLM-X, norm of keys": test_cross.CONFIGS["X, norm of keys"],
    "NVLM-H": test_cross.H,
    "NVLM-H, tags added": test_cross.CONFIGS["H, tags added"],
}
PARTS = ("vision", "projector", "cross", "decoder", "head")
TRAINED = {
    "all": frozenset(PARTS),
    "projector": frozenset({"projector"}),
    "projector and cross": frozenset({"projector", "cross"}),
    "cross": frozenset({"cross"}),
    "decoder and projector": frozenset({"projector", "decoder"}),
    "vision frozen": frozenset({"projector", "cross", "decoder", "head"}),
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


def runs(q, k, v, bounds, **_) -> int:
    """Cross-attention: two products for each token of a run and each of its keys."""
    return 2 * 2 * q.shape[-1] * q.shape[-2] * sum((end - start) * (last - first) for start, end, first, last in bounds.tolist())


def runs_backward(grad, saved, bounds, **_) -> int:
    """Five products."""
    return runs(grad, None, None, bounds) * 5 // 2


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


attention._get_raw = attention_backward._get_raw = runs._get_raw = runs_backward._get_raw = True
FORMULAS = {
    torch.ops.aten.addmm_: product,
    torch.ops.aten._grouped_mm: grouped,
    torch.ops.neva.document_attention: attention,
    torch.ops.neva.document_attention_backward: attention_backward,
    torch.ops.neva.run_attention: runs,
    torch.ops.neva.run_attention_backward: runs_backward,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: vision,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: vision_backward,
}


def batch_of(config: VLMConfig) -> tuple[Batch, cost.Work]:
    """A full row and what `cost` must be told of it."""
    if config.inline != "all":
        samples = [test_cross.sample(config, seed, images=images) for seed, images in enumerate((2, 0, 1))]
        lengths = [len(one.tokens) for one in samples]
        batch = collate([samples], Budget(seq_length=sum(lengths)), layout=config.layout, group_names=("g",), any_tiles=True, head_chunk=CHUNK)
        pairs = sum((end - start) * (last - first) for start, end, first, last in batch.runs.tolist())
        counts = {"memory": len(batch.memory_tokens), "pairs": pairs, "crossing": sum(lengths)}
        return batch, cost.Work(documents=lengths, tiles=len(batch.tiles), labelled=len(batch.labelled), **counts)
    samples = [item(config.layout, text=t, images=n, seed=t) for t, n in ((9, 1), (1, 0), (17, 2), (13, 0))]
    batch = pack(config.layout, [samples], sum(len(sample.tokens) for sample in samples))
    assert len(batch.labelled) % CHUNK == 0
    return batch, cost.Work(documents=[len(sample.tokens) for sample in samples], tiles=3, labelled=len(batch.labelled))


@pytest.mark.parametrize("name", CONFIGS)
def test_forward_by_part(name):
    """Each part's forward operations are those that torch counts in the part's module."""
    config = CONFIGS[name]
    model = build(config)
    batch, work = batch_of(config)
    with FlopCounterMode(display=False, custom_mapping=FORMULAS) as counter, torch.no_grad():
        model(batch)
    by_module = counter.get_flop_counts()
    counted = {part: sum(by_module.get(f"VLM.{part}", {}).values()) for part in PARTS}
    counted["cross"] = sum(sum(by_module.get(f"VLM.decoder.blocks.{n}.cross", {}).values()) for n in config.decoder.cross_layers)
    counted["decoder"] -= counted["cross"]
    assert cost.Parts(**counted) == cost.forward_flops(config, work)
    assert counter.get_total_flops() == cost.forward_flops(config, work).total


@pytest.mark.parametrize("recomputed", [False, True], ids=["kept logits", "logits again"])
@pytest.mark.parametrize("trained", TRAINED)
@pytest.mark.parametrize("name", CONFIGS)
def test_step(name, trained, recomputed, monkeypatch):
    """Forward and backward operations are what torch counts, whatever is trained."""
    config = CONFIGS[name]
    model = build(config)
    parts = TRAINED[trained] & {part_of(parameter) for parameter, _ in model.named_parameters()}
    if recomputed:
        monkeypatch.setattr(decoder, "HEAD_KEPT", 0)
        monkeypatch.setattr(cost, "HEAD_KEPT", 0)
    for parameter_name, parameter in model.named_parameters():
        parameter.requires_grad_(part_of(parameter_name) in parts)
    batch, work = batch_of(config)
    with FlopCounterMode(display=False, custom_mapping=FORMULAS) as counter:
        losses = model(batch).losses
        if losses.requires_grad:
            losses.sum().backward()
    assert counter.get_total_flops() == cost.step_flops(config, work, trained=parts).total


@pytest.mark.parametrize("name", CONFIGS)
def test_parameters(name):
    """Every parameter is counted once, in its part."""
    model, counts = VLM(CONFIGS[name]), cost.parameters(CONFIGS[name])
    assert counts.total == sum(p.numel() for p in model.parameters())
    vectors = 0 if model.image_vectors is None else model.image_vectors.numel()
    assert counts.projector == vectors + sum(p.numel() for p in model.projector.parameters())
    assert counts.vision == sum(p.numel() for p in model.vision.parameters())
    assert counts.decoder + counts.cross == sum(p.numel() for p in model.decoder.parameters())
    assert counts.cross == sum(p.numel() for block in model.decoder.blocks if block.cross is not None for p in block.cross.parameters())


def test_recompute_adds_a_forward():
    """Recomputing the blocks costs the decoder's forward once more."""
    _, work = batch_of(PLAIN)
    without, recomputed = (cost.step_flops(PLAIN, work, trained=frozenset(PARTS), recompute=r) for r in (False, True))
    assert recomputed.total - without.total == cost.forward_flops(PLAIN, work).decoder
