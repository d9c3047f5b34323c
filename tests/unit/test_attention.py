"""Attention over packed rows: against a dense mask, at padding, between samples, and under compile."""

import random
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from neva.batch import IMAGE, Batch
from neva.models.attention import Documents, PackedAttention, dense_mask, document_attention
from neva.models.decoder import Block, Decoder, DecoderConfig
from neva.models.layers import rope_tables
from neva.models.presets import VLMS
from neva.models.vlm import build
from tests.packed import item, pack

BOUNDS = 160


def rows(*lengths: list[int], size: int) -> Documents:
    """Rows of `size` tokens that hold documents of these lengths, then padding."""
    cu, segments = [0], torch.zeros(len(lengths), size, dtype=torch.int64)
    for r, row in enumerate(lengths):
        ends = [sum(row[: i + 1]) for i in range(len(row))]
        for number, (n, end) in enumerate(zip(row, ends, strict=True)):
            segments[r, end - n : end] = number + 1
        cu += [r * size + end for end in ends] + ([(r + 1) * size] if sum(row) < size else [])
    bounds = torch.tensor(cu + [len(lengths) * size] * (BOUNDS - len(cu)), dtype=torch.int32)
    return Documents(cu_seqlens=bounds, max_len=size, segments=segments)


def random_row(size: int, seed: int, longest: int) -> list[int]:
    """Random document lengths that fill a row, or nearly."""
    rng, row = random.Random(seed), []
    while sum(row) < size:
        row.append(rng.randint(1, longest))
    row.pop()
    return row


LAYOUTS = {
    "whole row": rows([64], [64], size=64),
    "ones": rows([1] * 64, size=64),
    "one short document": rows([1], [], [63], size=64),
    "padding": rows([7, 20, 1, 30], [3], [], size=64),
    "no padding": rows([10, 54], [30, 34], size=64),
    "all padding": rows([], [], size=64),
    "alike": rows([9] * 7, [9] * 7, size=64),
    **{f"random {n}": rows(random_row(300, n, 90), random_row(300, n + 50, 30), size=300) for n in range(4)},
    "many tiny": rows(random_row(300, 9, 5), size=300),
}


def draw(layout: Documents, heads: int, kv_heads: int, dtype: torch.dtype = torch.float32, width: int = 8) -> list[Tensor]:
    """Random q, k, v and an output gradient."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(*layout.segments.shape, n, width) for n in (heads, kv_heads, kv_heads, heads)]
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def oracle(q: Tensor, k: Tensor, v: Tensor, layout: Documents) -> Tensor:
    """Attention with a dense mask in fp64; padding rows, which see nothing, give 0."""
    mask = dense_mask(layout.segments)
    share = q.shape[2] // k.shape[2]
    q, k, v = (x.double().transpose(1, 2) for x in (q, k.repeat_interleave(share, 2), v.repeat_interleave(share, 2)))
    scores = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).masked_fill(~mask, float("-inf"))
    weights = torch.where(mask.any(-1, keepdim=True), scores, 0).softmax(-1) * mask.any(-1, keepdim=True)
    return (weights @ v).transpose(1, 2)


def attend(tensors: list[Tensor], layout: Documents, function) -> tuple[Tensor, list[Tensor]]:
    """Output of a function, and the gradients of q, k and v."""
    *qkv, grad = tensors
    qkv = [x.clone().requires_grad_() for x in qkv]
    out = function(*qkv, layout)
    return out, torch.autograd.grad(out, qkv, grad.to(out.dtype), materialize_grads=True)


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 1)], ids=str)
@pytest.mark.parametrize("name", LAYOUTS)
def test_against_dense_mask(name, heads):
    """Outputs and gradients equal those of masked attention; padding gives and takes exactly nothing."""
    layout = LAYOUTS[name]
    tensors = draw(layout, *heads)
    out, grads = attend(tensors, layout, PackedAttention())
    expected, expected_grads = attend(tensors, layout, oracle)
    assert (out - expected).abs().max() < 2e-6
    for ours, theirs in zip(grads, expected_grads, strict=True):
        assert (ours - theirs).abs().max() < 2e-5
    padding = layout.segments == 0
    for x in (out, *grads):
        assert torch.equal(x[padding], torch.zeros_like(x[padding]))


def test_dense_mask():
    """Token i sees token j of the same segment that is not after it; padding sees nothing and is seen by nobody."""
    segments = LAYOUTS["padding"].segments
    mask = dense_mask(segments)
    for r, row in enumerate(segments.tolist()):
        expected = [[j <= i and row[i] > 0 and row[i] == row[j] for j in range(len(row))] for i in range(len(row))]
        assert mask[r, 0].tolist() == expected


@pytest.mark.parametrize("heads", [(4, 4), (8, 2)], ids=str)
def test_bfloat16(heads):
    """bf16 stays as near to the truth as its 8 bits allow."""
    layout = LAYOUTS["random 1"]
    tensors = draw(layout, *heads, dtype=torch.bfloat16, width=16)
    out, grads = attend(tensors, layout, PackedAttention())
    expected, expected_grads = attend([x.float() for x in tensors], layout, oracle)
    assert out.dtype == grads[0].dtype == torch.bfloat16
    for ours, theirs in zip((out, *grads), (expected, *expected_grads), strict=True):
        assert (ours - theirs).norm() < 0.01 * theirs.norm()


def test_operator():
    """torch's own checks of the custom operator: schema, fake tensors, autograd registration, dynamic shapes."""
    layout = LAYOUTS["padding"]
    q, k, v, _ = (x.flatten(0, 1).requires_grad_() for x in draw(layout, 4, 2))
    results = torch.library.opcheck(document_attention, (q, k, v, layout.cu_seqlens, layout.segments, 0))
    assert len(results) >= 4 and set(results.values()) == {"SUCCESS"}


def vlm_batch(seed: int) -> tuple[Batch, Tensor]:
    """Two rows of samples with images, and which flat positions belong to the second sample of the first row."""
    layout = VLMS["llava-tiny"].layout
    first = [item(layout, text=5, images=1, seed=1), item(layout, text=9, images=2, seed=2), item(layout, text=4, seed=3)]
    batch = pack(layout, [first, [item(layout, text=12, images=1, seed=4)]], 100)
    mine = (batch.segments == 2).flatten()
    generator = torch.Generator().manual_seed(seed)
    text = mine & (batch.tokens.flatten() != IMAGE)
    tokens = batch.tokens.flatten().where(~text, torch.randint(1, 500, (mine.numel(),), generator=generator))
    labels = batch.labels.flatten().where(~mine | (batch.labels.flatten() < 0), torch.randint(1, 500, (mine.numel(),), generator=generator))
    tiles = batch.tiles.clone()
    tiles[1:3] = torch.randint(0, 256, tiles[1:3].shape, dtype=torch.uint8, generator=generator)
    return replace(batch, tokens=tokens.view_as(batch.tokens), labels=labels.view_as(batch.labels), tiles=tiles), mine


def test_no_leak():
    """Another text and other pixels in one sample leave every other sample's logits and embedding gradients as they were, to the bit."""
    model = build(VLMS["llava-tiny"])
    seen = []
    for seed in (1, 2):
        batch, mine = vlm_batch(seed)
        entered = []
        hook = model.decoder.register_forward_pre_hook(lambda _module, inputs, entered=entered: entered.append(inputs[0]))
        output = model(batch, logits_at=torch.arange(200))
        hook.remove()
        losses = F.cross_entropy(output.logits, batch.labels.flatten(), reduction="none")
        (grad,) = torch.autograd.grad(losses.sum(), entered)
        seen.append((output.logits, grad.flatten(0, 1)))
    for one, other in zip(*seen, strict=True):
        assert torch.equal(one[~mine], other[~mine])
        assert not torch.equal(one[mine], other[mine])


def test_gradient_of_one_sample_stays_there():
    """The loss of one sample has no gradient at another's embeddings, nor at padding: exactly 0."""
    model = build(VLMS["llava-tiny"])
    batch, mine = vlm_batch(1)
    x = model.splice(batch, model.features(batch.tiles)).detach().requires_grad_()
    hidden, _ = model.decoder(x, batch.positions, Documents.of(batch))
    (grad,) = torch.autograd.grad(hidden.flatten(0, 1)[mine].square().sum(), x)
    grad = grad.flatten(0, 1)
    assert torch.equal(grad[~mine], torch.zeros_like(grad[~mine])) and grad[mine].abs().sum(1).min() > 0


@pytest.mark.slow
def test_compile():
    """A compiled block has no graph break, no recompilation for other documents, and the same values.

    In a process of its own: dynamo cannot trace the shape checks that pytest puts around every function.
    """
    done = subprocess.run([sys.executable, "-m", "tests.unit.test_attention"], capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr


def compile_block() -> None:
    """What `test_compile` runs."""
    config = DecoderConfig(vocab=32, width=32, layers=1, heads=4, kv_heads=2, ffn=48)
    block = Block(config)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.normal_(0, 0.3)
    counter = CompileCounterWithBackend("aot_eager")
    functions = block, torch.compile(block, fullgraph=True), torch.compile(block, fullgraph=True, backend=counter)
    for seed in range(6):
        layout = rows(random_row(96, seed, 5 + 15 * seed), size=96)
        x = torch.randn(1, 96, 32, requires_grad=True)
        results = []
        for function in functions:
            out, _ = function(x, layout, rope_tables(torch.arange(96)[None], Decoder(config).rotary))
            results.append((out, *torch.autograd.grad(out.square().sum(), [x, *block.parameters()])))
        for other in results[1:]:
            for a, b in zip(results[0], other, strict=True):
                assert (a - b).abs().max() < 1e-4 * a.abs().max()
    assert counter.frame_count == 1, counter.frame_count


if __name__ == "__main__":
    compile_block()
