"""Fresh weights, projectors, splicing, the vision encoder's layers, config errors, published sizes, and the head's loss."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from neva.batch import IGNORE, IMAGE, IMAGE_END, IMAGE_START
from neva.models import cost, decoder
from neva.models.decoder import DecoderConfig, Head, LinearLoss
from neva.models.layers import MLP, GatedMLP, RMSNorm, Rotary, rope, rope_tables
from neva.models.presets import DECODERS, VISION, VLMS
from neva.models.vit import VisionConfig, ViT, normalise
from neva.models.vlm import VLM, VLMConfig, build, fresh, projector
from tests.packed import Item, item, pack

TINY = VLMS["llava-tiny"]


def test_images_are_padded_with_the_encoders_mean_colour():
    """Red, green, blue, rounded down, as LLaVA's `expand2square` gets them."""
    # CLIP's 0.4815, 0.4578, 0.4082
    assert VLMS["llava-1.5-7b"].layout.pad_colour == (122, 116, 104)
    assert TINY.vision is not None
    other = replace(TINY, vision=replace(TINY.vision, mean=(0.1, 0.5, 0.999), std=(1.0, 1.0, 1.0)))
    assert other.layout.pad_colour == (25, 127, 254)


# Fresh weights


def test_no_two_names_or_seeds_draw_alike():
    shape = torch.Size((2, 2))
    drawn = {tuple(fresh(f"decoder.blocks.{n}.mlp.up.weight", shape, n % 7).flatten().tolist()) for n in range(2000)}
    assert len(drawn) == 2000


def test_fresh_depends_on_name_and_seed_alone():
    """More layers, another order and other draws in between change no shared parameter; another seed or name does."""
    small, large = build(TINY, seed=3), build(replace(TINY, decoder=replace(TINY.decoder, layers=4)), seed=3)
    whole = dict(large.named_parameters())
    for name, parameter in reversed(list(small.named_parameters())):
        torch.rand(7)
        assert torch.equal(parameter, whole[name]) and torch.equal(parameter, fresh(name, parameter.shape, 3))
    name, shape = "decoder.blocks.0.mlp.up.weight", torch.Size((160, 64))
    assert not torch.equal(fresh(name, shape, 3), fresh(name, shape, 4))
    assert not torch.equal(fresh(name, shape, 3), fresh("decoder.blocks.1.mlp.up.weight", shape, 3))


def test_fresh_values():
    """Norms 1, biases 0, looked-up vectors of deviation 0.02, what stands beside a patch's embedding 0.5, matrices 1 / sqrt(fan-in)."""
    for name, parameter in build(replace(TINY, use_im_start_end=True)).named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif "norm" in name:
            assert torch.equal(parameter, torch.ones_like(parameter)), name
        else:
            fan_in = parameter.shape[1:].numel()
            looked_up = name in ("decoder.embed.weight", "head.weight", "image_vectors")
            expected = 0.02 if looked_up else 0.5 if name in ("vision.positions", "vision.class_token") else fan_in**-0.5
            assert abs(parameter.std() / expected - 1) < 4 / parameter.numel() ** 0.5, name


# Projectors and splice


def test_projectors():
    """Each name gives the module that it says; the sum of its products is what it computes."""
    x = torch.randn(2, 5, 8)
    assert torch.equal(projector("identity", 8, 8, 16)(x), x)
    linear = projector("linear", 8, 6, 16)
    assert torch.equal(linear(x), F.linear(x, linear[0].weight, linear[0].bias))
    for depth in (1, 2, 3, 9):
        module = projector(f"mlp{depth}x_gelu", 8, 6, 16)
        expected, matrices = x, [layer for layer in module if isinstance(layer, torch.nn.Linear)]
        assert len(matrices) == depth and matrices[0].in_features == 8 and matrices[-1].out_features == 6
        for number, layer in enumerate(matrices):
            expected = layer(F.gelu(expected) if number else expected)
        assert torch.equal(module(x), expected)


@pytest.mark.parametrize("name", ["mlp0x_gelu", "mlp2x", "mlp2x_relu", "Linear", "", "mlp22x_gelu", "identity "])
def test_unknown_projector(name):
    """A name that is no projector is refused when the config is made, and the legal ones are listed."""
    with pytest.raises(ValueError, match="there are identity, linear, mlpNx_gelu"):
        replace(TINY, projector=name)


def splice_by_hand(model: VLM, batch) -> Tensor:
    """The decoder's input, token by token."""
    features = model.features(batch.tiles) if len(batch.tiles) else None
    x = torch.stack([model.decoder.embed.weight[max(0, token)] for token in batch.tokens.flatten().tolist()]).clone()
    for at, token in enumerate(batch.tokens.flatten().tolist()):
        if token in (IMAGE_START, IMAGE_END):
            x[at] = model.image_vectors[(IMAGE_START, IMAGE_END).index(token)]
    for row, tile in enumerate(batch.inline.tolist()):
        for feature, slot in enumerate(batch.slots[row].tolist()):
            if slot >= 0:
                x[slot] = features[tile, feature]
    return x.view(*batch.tokens.shape, -1)


def test_splice():
    """Features land in their slots, whatever the order of tiles; a slot of -1 is placed nowhere."""
    model = build(TINY)
    samples = [item(TINY.layout, text=6, images=2, seed=1), item(TINY.layout, text=3, images=1, seed=2)]
    batch = pack(TINY.layout, [samples, [samples[0]]], 80)
    other = replace(batch, inline=batch.inline.flip(0), slots=batch.slots.masked_fill(batch.slots % 5 == 0, -1))
    for b in (batch, other):
        assert torch.equal(model.splice(b, model.features(b.tiles)), splice_by_hand(model, b))


def test_image_vectors():
    """`use_im_start_end` has two learned vectors, which stand where the batch says and are trained."""
    config = replace(TINY, use_im_start_end=True)
    assert config.layout.tokens_per_image == TINY.layout.tokens_per_image + 2
    model, plain = build(config), item(TINY.layout, text=4, images=1, seed=1)
    tokens = [IMAGE_START, *[IMAGE] * 16, IMAGE_END, 5, 6]
    batch = pack(config.layout, [[Item(tokens=tokens, labels=[IGNORE] * 19 + [6], tiles=plain.tiles), item(config.layout, text=7)]], 30)
    x = model.splice(batch, model.features(batch.tiles))
    assert torch.equal(x, splice_by_hand(model, batch))
    assert torch.equal(x[0, [0, 17]], model.image_vectors)
    model(batch).losses.sum().backward()
    assert model.image_vectors.grad.abs().sum(1).min() > 0
    assert not model.decoder.embed.weight.grad[0].any()


def test_no_tiles_here_but_elsewhere():
    """A rank without tiles enters the encoder with none: same losses as skipping it, and gradients that exist and are 0."""
    samples = [[item(TINY.layout, text=20, seed=1)]]
    entering, skipping = (pack(TINY.layout, samples, 24, any_tiles=any_tiles) for any_tiles in (True, False))
    for frozen in (False, True):
        model = build(TINY)
        model.vision.requires_grad_(not frozen)
        losses = model(entering).losses
        losses.sum().backward()
        assert torch.equal(losses, model(skipping).losses)
        for name, parameter in (*model.projector.named_parameters(), *(() if frozen else model.vision.named_parameters())):
            assert parameter.grad is not None and not parameter.grad.any(), name


def test_memory_is_refused():
    """Cross-attention memory in a batch is an error while no decoder has cross-attention."""
    batch = pack(TINY.layout, [[item(TINY.layout, text=5)]], 8)
    with pytest.raises(ValueError, match="no cross-attention layers"):
        build(TINY)(replace(batch, memory=torch.zeros(1, dtype=torch.int64), memory_tags=torch.full((1, 1), -1)))


# Vision


@pytest.mark.parametrize(("layer", "depth"), [(-1, 4), (-2, 3), (-5, 0), (0, 0), (1, 1), (4, 4)])
def test_select_layer(layer, depth):
    """Blocks after the selected hidden state are not built."""
    config = VisionConfig(image=28, patch=14, width=16, layers=4, heads=2, ffn=24, select_layer=layer)
    assert config.depth == depth == len(ViT(config).blocks)


@pytest.mark.parametrize(("feature", "count"), [("patch", 16), ("cls_patch", 17)])
def test_features(feature, count):
    """One feature a patch, and the class token first where it is kept; no tiles give no features."""
    config = replace(TINY.vision, feature=feature)
    tower = build(replace(TINY, vision=config)).vision
    assert config.tokens == count
    for n in (0, 1, 3):
        assert tower(torch.zeros(n, 3, 28, 28, dtype=torch.uint8)).shape == (n, count, 64)


def test_normalise():
    """Each channel by its own mean and deviation."""
    tiles = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8)
    mean, std = torch.tensor(TINY.vision.mean), torch.tensor(TINY.vision.std)
    expected = (tiles / 255 - mean[:, None, None]) / std[:, None, None]
    assert torch.equal(normalise(tiles, TINY.vision.mean, TINY.vision.std), expected)


# Config errors and published sizes


@pytest.mark.parametrize(
    ("config", "change", "said"),
    [
        (TINY.decoder, {"kv_heads": 3}, "heads=4 is not a multiple of kv_heads=3"),
        (TINY.decoder, {"width": 66}, "width=66 is not a multiple of heads=4"),
        (TINY.vision, {"image": 6}, "patch=7 must be 1 to image=6"),
        (TINY.vision, {"width": 65}, "width=65 is not a multiple of heads=2"),
        (TINY.vision, {"select_layer": 3}, r"select_layer=3 is outside -3..2"),
        (TINY.vision, {"select_layer": -4}, r"select_layer=-4 is outside -3..2"),
        (TINY.vision, {"class_token": False, "feature": "cls_patch"}, "set feature=patch"),
        (TINY, {"projector": "identity", "vision": replace(TINY.vision, width=32)}, "use linear or mlp2x_gelu"),
    ],
)
def test_config_errors(config, change, said):
    """What cannot work is refused when the config is made, with the fix."""
    with pytest.raises(ValueError, match=said):
        replace(config, **change)


CLIP_L_LAYER = 12_596_224
"""Parameters of one layer of ViT-L: 4 * (1024^2 + 1024) + 2 * 1024 * 4096 + 4096 + 1024 + 4 * 1024."""


def test_published_sizes():
    """Presets have the published number of parameters; a CLIP tower lacks the layer that nobody reads and its last norm."""
    seven, thirteen = cost.parameters(VLMS["llava-1.5-7b"]), cost.parameters(VLMS["llava-1.5-13b"])
    assert seven.decoder + seven.head == 6_738_415_616 and thirteen.decoder + thirteen.head == 13_015_864_320
    assert seven.projector == 20_979_712
    assert seven.vision == 303_507_456 - CLIP_L_LAYER - 2 * 1024
    small = cost.parameters(replace(TINY, vision=VISION["clip-l-14"]))
    assert small.vision == 303_179_776 - CLIP_L_LAYER - 2 * 1024
    base = cost.parameters(replace(TINY, vision=replace(VISION["clip-b-32"], select_layer=-1)))
    assert base.vision == 87_456_000 - 2 * 768


PUBLISHED = {
    "llama2-7b": 6_738_415_616, "llama2-13b": 13_015_864_320, "llama2-70b": 68_976_648_192, "llama3-8b": 8_030_261_248,
    "llama3-70b": 70_553_706_496, "llama3.1-8b": 8_030_261_248, "llama3.1-70b": 70_553_706_496, "mistral-7b-v0.1": 7_241_732_096,
    "mistral-7b-v0.2": 7_241_732_096, "mistral-7b-v0.3": 7_248_023_552, "mixtral-8x7b": 46_702_792_704, "mixtral-8x22b": 140_620_634_112,
    "qwen2-0.5b": 494_032_768, "qwen2-1.5b": 1_543_714_304, "qwen2-7b": 7_615_616_512, "qwen2-72b": 72_706_203_648,
    "qwen2.5-0.5b": 494_032_768, "qwen2.5-1.5b": 1_543_714_304, "qwen2.5-3b": 3_085_938_688, "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-14b": 14_770_033_664, "qwen2.5-32b": 32_763_876_352, "qwen2.5-72b": 72_706_203_648, "yi-34b": 34_388_917_248,
}  # fmt: skip
"""Parameters by the index files of the published checkpoints."""
WITHOUT_EMBEDDINGS = {
    "nemotron4-15b": "12.5", "nemotron4-340b": "331.6", "minitron-4b": "2.6", "minitron-8b": "6.2", "nvgpt-8b": "6.4",
}  # fmt: skip
"""Billions of parameters without embeddings, as the articles round them: arXiv 2402.16819, 2406.11704, 2407.14679; NVGPT 8B is 8.5 with them."""
ENCODERS = {"siglip-so400m-14-384": "413.0", "siglip-base-16-224": "85.8", "internvit-300m-448": "304.0", "internvit-6b-448": "5536.5"}
"""Millions of parameters to the last layer, without norm and pooling head behind it."""


def test_published_decoders():
    """Each preset of a decoder has the published number of parameters."""
    assert {*PUBLISHED, *WITHOUT_EMBEDDINGS, "nvgpt-2b", "nvgpt-43b", "llama-tiny"} == {*DECODERS}
    for name, config in DECODERS.items():
        counts = cost.parameters(VLMConfig(decoder=config, vision=None, projector="none"))
        total, vocabulary = counts.decoder + counts.head, config.vocab * config.width * (1 if config.tied else 2)
        if name in PUBLISHED:
            assert total == PUBLISHED[name], name
        if name in WITHOUT_EMBEDDINGS:
            assert f"{(total - vocabulary) / 1e9:.1f}" == WITHOUT_EMBEDDINGS[name]
    for name, billions in (("nvgpt-2b", 2.25), ("nvgpt-43b", 42.85)):
        counts = cost.parameters(VLMConfig(decoder=DECODERS[name], vision=None, projector="none"))
        assert abs((counts.decoder + counts.head) / 1e9 - billions) < 0.01


def test_published_encoders():
    """Each preset of an encoder has the published number of parameters; NVLM's heads of zeros add their own."""
    for name, millions in ENCODERS.items():
        with torch.device("meta"):
            model = ViT(replace(VISION[name], select_layer=-1))
        assert f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f}" == millions, name


def test_presets():
    """Any decoder goes with any vision encoder, by LLaVA-1.5's projector unless told otherwise."""
    for name in DECODERS:
        for vision in VISION.values():
            with torch.device("meta"):
                model = VLM(VLMConfig(decoder=DECODERS[name], vision=vision))
            assert [layer.weight.shape for layer in model.projector[::2]] == [(DECODERS[name].width, n) for n in (vision.width, DECODERS[name].width)]


# Layers


def test_rms_norm_and_mlps():
    """The formulas, in fp64."""
    x = torch.randn(3, 5, 8)
    norm = RMSNorm(8, 1e-5)
    torch.nn.init.normal_(norm.weight)
    exact = x.double()
    assert (norm(x) - exact / (exact.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight).abs().max() < 1e-5
    gated = GatedMLP(8, 12, "swiglu")
    assert torch.allclose(gated(x), gated.down(F.silu(gated.gate(x)) * gated.up(x)))
    plain = MLP(8, 12, "quick_gelu")
    up = plain.up(x)
    assert torch.allclose(plain(x), plain.down(up * torch.sigmoid(1.702 * up)))


ROTARY = Rotary(width=8, theta=1e4, scaling=None, limit=4096)


def test_rope_turns_pairs():
    """Channel i and i + e/2 turn by position * theta^(-2i/e); scores depend on the distance alone."""
    positions, q, k = torch.tensor([[0, 3, 700]]), torch.randn(1, 3, 2, 8), torch.randn(1, 3, 2, 8)
    cos, sin = rope_tables(positions, ROTARY)
    turned = rope(q, cos, sin)
    angles = positions.double()[0, :, None] * 1e4 ** (-torch.arange(0, 8, 2).double() / 8)
    pairs = torch.complex(q[..., :4].double(), q[..., 4:].double())[0] * torch.polar(torch.ones_like(angles), angles)[:, None]
    assert (turned[0] - torch.cat((pairs.real, pairs.imag), -1)).abs().max() < 1e-4
    far = rope_tables(positions + 50, ROTARY)
    scores = [rope(q, *tables)[0, 0, 0] @ rope(k, *tables)[0, 1, 0] for tables in ((cos, sin), far)]
    assert (scores[0] - scores[1]).abs() < 1e-4


# The head's loss


@pytest.mark.parametrize("kept", [True, False], ids=["kept", "again"])
@pytest.mark.parametrize("n", [0, 1, 8, 37])
@pytest.mark.parametrize("needs", ["both", "x", "weight"])
def test_linear_loss(n, needs, kept, monkeypatch):
    """Losses and gradients of several tiles equal F.cross_entropy's, with targets that are ignored and uneven output gradients."""
    monkeypatch.setattr(decoder, "HEAD_TILE", 8 * 50)
    monkeypatch.setattr(decoder, "HEAD_TOKENS", 16)
    monkeypatch.setattr(decoder, "HEAD_KEPT", 2**25 if kept else -1)
    generator = torch.Generator().manual_seed(n)
    x, weight = (3 * torch.randn(shape, generator=generator) for shape in ((n, 16), (50, 16)))
    targets = torch.randint(0, 50, (n,), generator=generator).masked_fill(torch.rand(n, generator=generator) < 0.3, IGNORE)
    x.requires_grad_(needs != "weight")
    weight.requires_grad_(needs != "x")
    wanted, scale = [t for t in (x, weight) if t.requires_grad], torch.randn(n, generator=generator)
    losses = LinearLoss.apply(x, weight, targets)
    expected = F.cross_entropy((x.double() @ weight.double().T), targets, reduction="none")
    assert losses.dtype == torch.float32 and losses.shape == (n,)
    assert torch.allclose(losses, expected.float(), atol=1e-5)
    assert not losses[targets == IGNORE].any()
    theirs = torch.autograd.grad(expected, wanted, scale.double())
    for _ in range(2):  # backward leaves what it keeps as it was
        for a, b in zip(torch.autograd.grad(losses, wanted, scale, retain_graph=True), theirs, strict=True):
            assert (a - b).abs().sum() <= 1e-5 * b.abs().sum()


@pytest.mark.parametrize("kept", [2**25, -1], ids=["kept", "again"])
def test_linear_loss_bfloat16(kept, monkeypatch):
    """In bf16 the losses are those of the bf16 logits in fp32 arithmetic, and gradients as near as 8 bits allow."""
    monkeypatch.setattr(decoder, "HEAD_TILE", 64 * 50)
    monkeypatch.setattr(decoder, "HEAD_TOKENS", 64)
    monkeypatch.setattr(decoder, "HEAD_KEPT", kept)
    x, weight = torch.randn(150, 32).bfloat16().requires_grad_(), torch.randn(200, 32).bfloat16().requires_grad_()
    targets = torch.randint(0, 200, (150,)).masked_fill(torch.rand(150) < 0.2, IGNORE)
    losses = LinearLoss.apply(x, weight, targets)
    assert losses.dtype == torch.float32
    assert (losses - F.cross_entropy((x @ weight.T).float(), targets, reduction="none")).abs().max() < 0.1
    expected = F.cross_entropy(x.float() @ weight.float().T, targets, reduction="sum")
    for ours, theirs in zip(torch.autograd.grad(losses.sum(), [x, weight]), torch.autograd.grad(expected, [x, weight]), strict=True):
        assert ours.dtype == torch.bfloat16 and (ours - theirs).float().norm() < 0.02 * theirs.float().norm()


def test_head():
    """Logits of the normed states, and the losses of those logits; a tied head uses the matrix that it is given."""
    config = DecoderConfig(vocab=40, width=16, layers=1, heads=2, kv_heads=2, ffn=24, tied=True)
    head, matrix, x = Head(config), torch.randn(40, 16), torch.randn(6, 16)
    torch.nn.init.ones_(head.norm.weight)
    targets = torch.tensor([1, 2, IGNORE, 4, 39, 0])
    logits = head(x, tied=matrix)
    assert torch.equal(logits, head.norm(x) @ matrix.T)
    assert torch.allclose(head(x, targets, tied=matrix), F.cross_entropy(logits, targets, reduction="none"), atol=1e-5)
    assert [name for name, _ in head.named_parameters()] == ["norm.weight"]
