"""NVLM-X and -H against a dense mask: every sample alone, one token's sight at a time, gradients too; and what a fresh model equals."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from neva.batch import IGNORE, IMAGE, Batch
from neva.data.encode import Encoder
from neva.data.pack import Budget, collate
from neva.data.sample import Encoded
from neva.data.tokenizer import load_tokenizer
from neva.infer.generate import Loaded, Sampling, generate_encoded
from neva.models.cross import CrossConfig, dense
from neva.models.decoder import DecoderConfig
from neva.models.layers import rope, rope_tables
from neva.models.vit import VisionConfig
from neva.models.vlm import VLM, ImageConfig, VLMConfig, build
from neva.recipes.demo import TOKENIZER

torch.set_num_threads(1)
VOCAB = 60
VISION = VisionConfig(image=28, patch=7, width=24, layers=2, heads=2, ffn=40)
DECODER = DecoderConfig(vocab=VOCAB, width=32, layers=4, heads=4, kv_heads=2, ffn=56, cross_layers=(1, 3), max_positions=512)
SIX = ImageConfig(aspect="tiles", max_tiles=6, tags="1d")
X = VLMConfig(decoder=DECODER, vision=VISION, projector="norm_linear", pixel_shuffle="v2", image=SIX, inline="none")
H = VLMConfig(decoder=DECODER, vision=VISION, projector="norm_ffn_gelu", pixel_shuffle="v2", image=SIX, inline="thumbnail")


def with_cross(config: VLMConfig, **fields: object) -> VLMConfig:
    return replace(config, decoder=replace(config.decoder, cross=CrossConfig(**fields)))  # type: ignore[arg-type]


CONFIGS = {
    "X": X,
    "X, norm of keys": with_cross(X, key_norm=True),
    "X, rotary keys": with_cross(X, rotary=True),
    "X, MLP behind": with_cross(X, ffn=40),
    "X, other heads": with_cross(X, heads=6, kv_heads=3, head_width=10),
    "X, grouped as the decoder": with_cross(X, kv_heads=2),
    "H": H,
    "H, tags added": replace(H, tag_binding="added"),
    "H, rotary keys": replace(H, tag_binding="rotary", decoder=replace(DECODER, cross=CrossConfig(rotary=True))),
    "H, LayerNorm": replace(H, decoder=replace(DECODER, norm="layernorm1p", mlp="squared_relu", rotary_fraction=0.5)),
}


def made(config: VLMConfig) -> VLM:
    """A model whose gates are open: fresh ones would hide the memory."""
    model = build(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("gate"):
                parameter.fill_(0.7)
    return model.eval()


def sample(config: VLMConfig, seed: int, *, images: int, text: int = 12) -> Encoded:
    """Random text, images of 1 to 7 tiles, and for each token a random range of the memory."""
    layout, random = config.layout, torch.Generator().manual_seed(seed)

    def draw(low: int, high: int, count: int = 1) -> list[int]:
        return torch.randint(low, high, (count,), generator=random).tolist()

    tokens, slots, inline, memory, starts, tags = [], [], [], [], [], []
    tiles = 0
    for _ in range(images):
        tokens += draw(1, VOCAB, *draw(1, 5))
        (count,) = draw(1, 8)
        first = len(memory)
        for number in range(count):
            if config.inline == "thumbnail" and number == count - 1:
                inline.append(tiles)
                slots.append(list(range(len(tokens), len(tokens) + layout.tokens_per_tile)))
                tokens += [IMAGE] * layout.tokens_per_tile
            else:
                memory.append(tiles)
                starts.append(first)
                tags.append(draw(1, VOCAB, *draw(1, 4)))
            tiles += 1
    tokens += draw(1, VOCAB, text)
    sees = torch.zeros(len(tokens), 2, dtype=torch.int64)
    at = 0
    while at < len(tokens):  # runs of one to four tokens; some see nothing, some all
        (length,), (a, b) = draw(1, 5), draw(0, len(memory) + 1, 2)
        sees[at : at + length] = torch.tensor([min(a, b), max(a, b)] if a != b else [0, 0])
        at += length
    longest = max(map(len, tags), default=0) if config.inline == "thumbnail" else 0
    padded = [ids[:longest] + [-1] * (longest - len(ids)) for ids in tags]
    ids = torch.tensor(tokens)
    kept = (torch.rand(len(tokens), generator=random) < 0.6) & (ids > 0)
    kept[-1] = True
    return Encoded(
        tokens=ids,
        labels=torch.where(kept, ids, IGNORE),
        tiles=torch.randint(0, 256, (tiles, 3, 28, 28), dtype=torch.uint8, generator=random),
        inline=torch.tensor(inline, dtype=torch.int64),
        slots=torch.tensor(slots, dtype=torch.int64).view(len(inline), layout.tokens_per_tile),
        memory=torch.tensor(memory, dtype=torch.int64),
        memory_starts=torch.tensor(starts, dtype=torch.int64),
        memory_tags=torch.tensor(padded, dtype=torch.int64).view(len(memory), longest),
        sees=sees,
        next_sees=(0, len(memory)),
        group="g",
        key=("s", str(seed)),
    )


def packed(config: VLMConfig, rows: Sequence[Sequence[Encoded]]) -> Batch:
    longest = max(sum(len(one.tokens) for one in row) for row in rows)
    budget = Budget(seq_length=longest + 5, rows=len(rows), micro_rows=len(rows))
    return collate(rows, budget, layout=config.layout, group_names=("g",), any_tiles=any(len(one.tiles) for row in rows for one in row))


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """[t, h, e] and [y, j, e] with a mask [t, y], written out; a query that may look nowhere gets 0."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    out = []
    for query, seen in zip(q, mask, strict=True):
        if not seen.any():
            out.append(query * 0)
            continue
        scores = torch.einsum("he,yhe->hy", query, k[seen]) / math.sqrt(q.shape[-1])
        out.append(torch.einsum("hy,yhe->he", scores.softmax(-1), v[seen]))
    return torch.stack(out)


def keys_of(model: VLM, one: Encoded) -> tuple[Tensor, list[int], list[int]]:
    """The memory of one sample, tile by tile: what is read, of which tile each key is, and its place within its image."""
    parts: list[Tensor] = []
    tile_of: list[int] = []
    places: list[int] = []
    features = model.features(one.tiles)
    for number, tile in enumerate(one.memory.tolist()):
        x = features[tile]
        ids = [id for id in (one.memory_tags[number].tolist() if one.memory_tags.shape[1] else []) if id >= 0]
        tags = model.decoder.embed.weight[ids]
        if ids and model.config.tag_binding == "added":
            tag = tags.mean(0)
            x = x + tag / tag.square().mean().sqrt() * x.detach().square().mean().sqrt()
        elif ids:
            x = torch.cat((tags, x))
        if one.memory_starts[number] == number:
            place = 0
        parts.append(x)
        tile_of += [number] * len(x)
        places += range(place, place + len(x))
        place += len(x)
    return torch.cat(parts) if parts else torch.zeros(0, model.config.decoder.width), tile_of, places


def by_hand(model: VLM, one: Encoded) -> Tensor:
    """Hidden states [t, d] of one sample alone."""
    c = model.config.decoder
    x = torch.stack([model.decoder.embed.weight[max(0, token)] for token in one.tokens.tolist()])
    if len(one.inline):
        features = model.features(one.tiles)[one.inline].flatten(0, 1)
        x = x.index_copy(0, one.slots.flatten(), features)
    t = len(x)
    cos, sin = rope_tables(torch.arange(t)[None], model.decoder.rotary)
    memory, tile_of, places = keys_of(model, one)
    ranges = [(start, end) for start, end in one.sees.tolist()]
    sight = torch.tensor([[start <= tile < end for tile in tile_of] for start, end in ranges], dtype=torch.bool).view(t, len(tile_of))
    for block in model.decoder.blocks:
        y, attention = block.attention_norm(x), block.attention
        q, k, v = (p(y).unflatten(-1, (-1, c.head)) for p in (attention.q, attention.k, attention.v))
        q, k = rope(q[None], cos, sin)[0], rope(k[None], cos, sin)[0]
        x = x + attention.out(softmax_attention(q, k, v, torch.ones(t, t, dtype=torch.bool).tril()).flatten(1))
        if block.cross is not None:
            cross = block.cross
            width = cross.head_width
            q = cross.q(cross.norm(x)).unflatten(-1, (-1, width))
            source = cross.memory_norm(memory)
            k, v = (p(source).unflatten(-1, (-1, width)) for p in (cross.k, cross.v))
            if c.cross.rotary:
                k = rope(k[None], *rope_tables(torch.tensor([places], dtype=torch.int64), cross.rotary))[0]
            x = x + cross.gate.tanh() * cross.out(softmax_attention(q, k, v, sight).flatten(1))
            if cross.mlp is not None:
                more = cross.mlp_gate.tanh() * cross.mlp(cross.mlp_norm(x))
                x = torch.where(sight.any(1)[:, None], x + more, x)
        x = x + block.mlp(block.mlp_norm(x))
    return x


def loss_by_hand(model: VLM, one: Encoded) -> Tensor:
    logits = model.head(by_hand(model, one))
    return torch.nn.functional.cross_entropy(logits[:-1], one.labels[1:], ignore_index=IGNORE, reduction="sum")


@pytest.mark.parametrize("name", CONFIGS)
def test_packed_equals_a_dense_mask(name):
    """Outputs and the gradient of every parameter, of rows that mix text with none to three images of one to seven tiles."""
    config = CONFIGS[name]
    model = made(config)
    samples = [sample(config, seed, images=images) for seed, images in enumerate((1, 0, 3, 2, 0, 1))]
    batch = packed(config, [samples[:3], samples[3:]])
    out = model(batch)
    out.losses.sum().backward()
    mine = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    logits = model(batch, logits_at=torch.nonzero(batch.segments.flatten() > 0)[:, 0]).logits
    model.zero_grad()
    total = torch.stack([loss_by_hand(model, one) for one in samples]).sum()
    total.backward()
    with torch.no_grad():
        expected = torch.cat([model.head(by_hand(model, one)) for one in samples])
    assert (logits - expected).abs().max() < 1e-5
    assert abs(float(out.losses.sum().detach() - total.detach())) < 1e-3
    theirs = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert mine.keys() == theirs.keys() and all((mine[name] - theirs[name]).abs().max() < 1e-4 for name in mine)
    assert all(float(mine[f"decoder.blocks.{n}.cross.gate"].abs()) > 1e-6 for n in DECODER.cross_layers)


@pytest.mark.parametrize("name", ["X", "H"])
def test_a_fresh_model_is_its_decoder(name):
    """With gates at 0 the logits of the model are those of the decoder without cross-attention, bit for bit."""
    config = CONFIGS[name]
    model = build(config).eval()
    plain = build(replace(config, decoder=replace(config.decoder, cross_layers=()), inline="all"))
    samples = [sample(config, seed, images=images) for seed, images in enumerate((2, 0, 1))]
    batch = packed(config, [samples])
    at = torch.nonzero(batch.segments.flatten() > 0)[:, 0]
    gone = {name: getattr(batch, name)[:0] for name in ("memory", "memory_tags", "memory_tokens", "memory_positions")}
    blind = replace(batch, **gone)
    assert torch.equal(model(batch, logits_at=at).logits, plain.eval()(blind, logits_at=at).logits)


@pytest.mark.parametrize("name", ["X", "H", "X, MLP behind"])
def test_a_token_without_a_range_gets_exactly_nothing(name):
    """Text-only samples of a row with images: cross-attention adds 0 to them, and takes no gradient from them."""
    model = made(CONFIGS[name])
    samples = [sample(CONFIGS[name], seed, images=images) for seed, images in enumerate((2, 0))]
    samples[1].labels.copy_(samples[1].tokens)
    samples[0].labels.fill_(IGNORE)
    batch = packed(CONFIGS[name], [samples])
    model(batch).losses.sum().backward()
    crossing = {name: p.grad for name, p in model.named_parameters() if ".cross." in name or name.startswith(("projector.", "vision."))}
    assert all(grad is not None and not grad.any() for grad in crossing.values())


@pytest.mark.parametrize("name", ["X", "H", "H, tags added"])
def test_a_changed_tile_changes_what_may_see_it(name):
    """Nothing before the first token that sees the tile, no other sample, and something behind."""
    model, config = made(CONFIGS[name]), CONFIGS[name]
    samples = [sample(config, seed, images=2) for seed in range(3)]
    batch = packed(config, [samples])
    at = torch.nonzero(batch.segments.flatten() > 0)[:, 0]
    before = model(batch, logits_at=at).logits
    starts = [0, len(samples[0].tokens), len(samples[0].tokens) + len(samples[1].tokens)]
    for number in range(len(samples[1].memory)):
        tiles = batch.tiles.clone()
        tile = len(samples[0].tiles) + int(samples[1].memory[number])
        tiles[tile] = 255 - tiles[tile]
        changed = (model(replace(batch, tiles=tiles), logits_at=at).logits != before).any(1)
        sees = [start <= number < end for start, end in samples[1].sees.tolist()]
        first = starts[1] + sees.index(True) if any(sees) else starts[2]
        assert not changed[:first].any() and not changed[starts[2] :].any()
        assert bool(changed[first : starts[2]].any()) == any(sees)


def test_runs_in_a_mask_of_all_pairs():
    """The fallback of other devices computes what the CPU's loop does, gradients too."""
    from neva.models.attention import Runs
    from neva.models.cross import run_attention

    samples = [sample(X, seed, images=images) for seed, images in enumerate((1, 0, 3))]
    batch = packed(X, [samples])
    y, t = len(batch.memory_tokens), batch.tokens.numel()
    runs = Runs(bounds=batch.runs, sizes=batch.run_sizes, positions=batch.memory_positions)
    q, k, v = (torch.randn(n, heads, 8, requires_grad=True) for n, heads in ((t, 4), (y, 2), (y, 2)))
    first, second = run_attention(q, k, v, batch.runs)[0], dense(q, k, v, runs)
    assert (first - second).abs().max() < 1e-5
    weight = torch.randn_like(first)
    for a, b in zip(torch.autograd.grad((first * weight).sum(), (q, k, v)), torch.autograd.grad((second * weight).sum(), (q, k, v)), strict=True):
        assert (a - b).abs().max() < 1e-5


def test_the_operator_is_sound():
    """torch's own checks of a custom operator: schema, fake tensors, autograd."""
    from neva.models.cross import run_attention

    for keys, runs in ((6, [[1, 3, 0, 4], [5, 9, 2, 6]]), (0, [])):
        q, k, v = (torch.randn(n, heads, 8, requires_grad=True) for n, heads in ((9, 4), (keys, 2), (keys, 2)))
        results = torch.library.opcheck(run_attention, (q, k, v, torch.tensor(runs, dtype=torch.int64).view(-1, 4)))
        assert len(results) >= 4 and set(results.values()) == {"SUCCESS"}


def test_recomputed_blocks_compute_the_same():
    """Gradients through `recompute=block` are those without, cross-attention's memory included."""
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    found = []
    for recomputed in (False, True):
        model = made(X)
        for number, block in enumerate(model.decoder.blocks):
            model.decoder.blocks[number] = checkpoint_wrapper(block) if recomputed else block
        losses = model(packed(X, [[sample(X, seed, images=images) for seed, images in enumerate((1, 0, 2))]])).losses
        losses.sum().backward()
        found.append((losses.detach(), model.decoder.embed.weight.grad, model.projector[1].weight.grad))
    assert all((a - b).abs().max() < 1e-6 for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("name", CONFIGS)
def test_cached_decoding_is_the_argmax_of_full_forwards(name):
    """A batch of prompts with none to three images, whose memory the prefill keeps, against running the whole text anew for each token."""
    config = CONFIGS[name]
    tokenizer = load_tokenizer(TOKENIZER)
    wide = replace(config, decoder=replace(config.decoder, vocab=512))
    model = made(wide)
    loaded = Loaded(model=model, encoder=Encoder(tokenizer, "text", None, wide.layout), device=torch.device("cpu"), folder=Path())
    prompts = [sample(wide, seed, images=images) for seed, images in enumerate((1, 0, 3, 2))]
    with torch.no_grad():
        answers = generate_encoded(loaded, prompts, Sampling(max_new_tokens=6))
        for prompt, answer in zip(prompts, answers, strict=True):
            grown = prompt
            for token in answer.tokens:
                batch = packed(wide, [[grown]])
                logits = model(batch, logits_at=torch.tensor([len(grown.tokens) - 1])).logits
                assert int(logits.argmax()) == token
                seen = torch.tensor([prompt.next_sees if prompt.next_sees[0] < prompt.next_sees[1] else (0, 0)])
                more = torch.tensor([token])
                grown = replace(
                    grown, tokens=torch.cat((grown.tokens, more)), labels=torch.cat((grown.labels, more)), sees=torch.cat((grown.sees, seen))
                )  # fmt: skip
            assert answer.tokens
