"""The decoder's four dropouts: off outside training, unbiased, closed between documents of a row, and equal when recomputed."""

from dataclasses import replace

import pytest
import torch
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from neva.models.attention import Documents, PackedAttention, dense_mask, document_attention
from neva.models.decoder import DecoderConfig
from neva.models.vlm import VLM, VLMConfig, build
from tests.packed import item, pack

KINDS = ("embedding_dropout", "hidden_dropout", "attention_dropout", "ffn_dropout")
PLAIN = VLMConfig(decoder=DecoderConfig(vocab=64, width=32, layers=2, heads=4, kv_heads=2, ffn=48, window=6), vision=None, projector="none")


def with_dropout(**rates: float) -> VLM:
    return build(replace(PLAIN, decoder=replace(PLAIN.decoder, **rates)))


def losses(model: VLM, samples: list, seed: int = 0) -> torch.Tensor:
    torch.manual_seed(seed)
    return model(pack(PLAIN.layout, [samples], 48)).losses


A, B, C = (item(PLAIN.layout, text=n, seed=n) for n in (17, 20, 21))


@pytest.mark.parametrize("kind", KINDS)
def test_each(kind):
    """Evaluation ignores it; training draws from the seed alone, and changes the loss."""
    model, plain = with_dropout(**{kind: 0.3}), build(PLAIN)
    assert torch.equal(losses(model.eval(), [A, B]), losses(plain, [A, B]))
    model.train()
    first = losses(model, [A, B])
    assert torch.equal(first, losses(model, [A, B])) and not torch.allclose(first, losses(model, [A, B], seed=1))


@pytest.mark.parametrize("kind", KINDS)
def test_documents_stay_apart(kind):
    """With the same draws, another second document leaves the first one's losses as they were."""
    model = with_dropout(**{kind: 0.3}).train()
    count = sum(label >= 0 for label in A.labels[1:])
    one, other = losses(model, [A, B])[:count], losses(model, [A, C])[:count]
    assert torch.allclose(one, other, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_recompute(kind):
    """Blocks that are computed again in backward draw the same again: equal losses, equal gradients."""
    gradients = []
    for again in (False, True):
        model = with_dropout(**{kind: 0.3}).train()
        if again:
            for number, block in enumerate(model.decoder.blocks):
                model.decoder.blocks[number] = checkpoint_wrapper(block)
        losses(model, [A, B]).sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("silent", ["attention.out", "mlp.down"])
def test_hidden_dropout_falls_on_what_attention_and_mlp_add(silent):
    """With one of them silent, the other's addition is left out or doubled at a rate of a
    half; the residual stays."""
    block = with_dropout(hidden_dropout=0.5).decoder.blocks[0]
    torch.nn.init.zeros_(block.get_submodule(silent).weight)
    x = torch.randn(1, 17, 32, generator=torch.Generator().manual_seed(0))
    batch = pack(PLAIN.layout, [[A]], 17)
    angles = (torch.ones(1, 17, 1, 4), torch.zeros(1, 17, 1, 4))
    with torch.no_grad():
        whole = block.eval()(x, Documents.of(batch), angles)[0] - x
        dropped = block.train()(x, Documents.of(batch), angles)[0] - x
    left_out = dropped.abs() < 1e-6
    assert 0.4 < left_out.float().mean() < 0.6
    assert torch.allclose(dropped[~left_out], 2 * whole[~left_out], atol=1e-5)


def test_attention_dropout_is_unbiased():
    """Averaged over many draws, attention with dropout is attention without; padding stays 0."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 12, heads, 8, generator=generator) for heads in (4, 2, 2))
    segments = torch.tensor([[1] * 5 + [2] * 5 + [0] * 2])
    layout = Documents(cu_seqlens=torch.tensor([0, 5, 10, 12], dtype=torch.int32), max_len=5, segments=segments)
    exact = PackedAttention().eval()(q, k, v, layout)
    inner = PackedAttention(dropout=0.4).train()
    torch.manual_seed(0)
    mean = torch.stack([inner(q, k, v, layout) for _ in range(4000)]).mean(0)
    assert (mean - exact).abs().max() < 0.06 and torch.equal(mean[:, 10:], torch.zeros_like(mean[:, 10:]))


@pytest.mark.parametrize("window", [1, 5, 600, 1500])
def test_windows(window):
    """Attention with a window equals the dense mask's, forward and backward, over documents of several steps and of less than one."""
    lengths = (1300, 3, 700, 40)
    total = sum(lengths) + 7
    segments = torch.cat([torch.full((n,), i + 1) for i, n in enumerate(lengths)] + [torch.zeros(7, dtype=torch.int64)])[None]
    bounds = torch.tensor([0, *torch.tensor([*lengths, 7]).cumsum(0).tolist()], dtype=torch.int32)
    generator = torch.Generator().manual_seed(0)
    given = [torch.randn(total, heads, 8, generator=generator) for heads in (4, 2, 2, 4)]
    results = []
    for dense in (False, True):
        q, k, v = (x.clone().requires_grad_() for x in given[:3])
        if dense:
            mask = dense_mask(segments, window)[0]
            wide = [x.transpose(0, 1)[None] for x in (q, k, v)]
            out = torch.nn.functional.scaled_dot_product_attention(*wide, attn_mask=mask, enable_gqa=True)[0].transpose(0, 1)
            out = out.masked_fill((segments[0] == 0)[:, None, None], 0)
        else:
            out, _ = document_attention(q, k, v, bounds, segments, window)
        (out * given[3]).sum().backward()
        results.append([out, q.grad, k.grad, v.grad])
    for ours, oracle in zip(*results, strict=True):
        assert (ours - oracle.nan_to_num(0)).abs().max() < 1e-4
