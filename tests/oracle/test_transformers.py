"""Our models against transformers': logits, losses, gradients, state dicts and cached decoding."""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM, LlavaConfig, LlavaForConditionalGeneration

from neva.batch import IGNORE, IMAGE, Batch
from neva.models import hf
from neva.models.layers import Cache
from neva.models.vit import VisionConfig, ViT, normalise
from neva.models.vlm import VLM, VLMConfig
from tests.packed import Item, item, pack, real

VOCAB, IMAGE_ID = 70, 69
VISION = VisionConfig(image=28, patch=14, width=32, layers=3, heads=2, ffn=48)


def llama(**changes) -> LlamaConfig:
    """A tiny Llama's config."""
    sizes = {"vocab_size": VOCAB, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
    return LlamaConfig(**{**sizes, "num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": 0, **changes})


def clip(**changes) -> CLIPVisionConfig:
    """A tiny CLIP tower's config."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2}
    return CLIPVisionConfig(**{**sizes, "image_size": 28, "patch_size": 14, **changes})


def stored(model: torch.nn.Module, folder: Path) -> tuple[dict, dict[str, Tensor]]:
    """Shake up every weight, save the model, and read back its config.json and its safetensors."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            deviation = parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.1
            parameter.copy_(torch.empty_like(parameter).normal_(float(parameter.ndim == 1), deviation, generator=generator))
    model.eval().save_pretrained(folder)
    state = {}
    for file in sorted(folder.glob("*.safetensors")):
        state |= load_file(file)
    return json.loads((folder / "config.json").read_text()), state


def loaded(config: VLMConfig, *states: dict[str, Tensor]) -> VLM:
    """Our model with these weights, and fresh-looking ones (never read by the test) where the states have none."""
    model = VLM(config)
    merged = {name: tensor for state in states for name, tensor in state.items()}
    missing, unexpected = model.load_state_dict(merged, strict=False)
    assert not unexpected
    with torch.no_grad():
        for name in missing:
            model.get_parameter(name).normal_(0, 0.1)
    return model.eval()


@dataclass(frozen=True, kw_only=True, eq=False)
class Pair:
    """The same weights in both libraries."""

    ours: VLM
    theirs: torch.nn.Module
    table: dict[str, str]
    state: dict[str, Tensor]


def llama_pair(folder: Path, **changes) -> Pair:
    """A Llama and the decoder of a VLM."""
    theirs = LlamaForCausalLM(llama(**changes))
    config, state = stored(theirs, folder)
    renamed, unknown = hf.convert(state, hf.LLAMA)
    assert not unknown
    return Pair(ours=loaded(VLMConfig(decoder=hf.decoder_config(config), vision=VISION), renamed), theirs=theirs, table=hf.LLAMA, state=state)


def llava_pair(folder: Path, layer: int = -2, strategy: str = "default", **changes) -> Pair:
    """A LLaVA in both libraries."""
    tokens = 4 + (strategy == "full")
    config = LlavaConfig(
        vision_config=clip(), text_config=llama(**changes), image_token_index=IMAGE_ID, image_seq_length=tokens,
        vision_feature_layer=layer, vision_feature_select_strategy=strategy, tie_word_embeddings=changes.get("tie_word_embeddings", False),
    )  # fmt: skip
    theirs = LlavaForConditionalGeneration(config)
    config, state = stored(theirs, folder)
    renamed, unknown = hf.convert(state, hf.LLAVA)
    model = VLM(hf.llava_config(config))
    depth = model.config.vision.depth
    assert all("post_layernorm" in name for name in unknown)
    built = {name: tensor for name, tensor in renamed.items() if not name.startswith("vision.blocks.") or int(name.split(".")[2]) < depth}
    model.load_state_dict(built, strict=True)
    return Pair(ours=model.eval(), theirs=theirs, table=hf.LLAVA, state=state)


LLAMAS = {
    "grouped": {},
    "tied": {"tie_word_embeddings": True},
    "head_dim": {"head_dim": 20},
    "multi": {"num_key_value_heads": 4, "rope_theta": 5e5, "rms_norm_eps": 1e-3},
}
LLAVAS = {"usual": (-2, "default"), "full": (-2, "full"), "last": (-1, "default"), "first": (1, "full"), "third last": (-3, "default")}


@pytest.fixture(params=[*LLAMAS, *LLAVAS])
def pair(request, tmp_path) -> Pair:
    """Each of the models."""
    if request.param in LLAMAS:
        return llama_pair(tmp_path, **LLAMAS[request.param])
    return llava_pair(tmp_path, *LLAVAS[request.param])


def samples(pair: Pair) -> list[Item]:
    """Samples of unlike lengths, with zero to two images where the model takes any."""
    images = (1, 0, 2) if pair.table is hf.LLAVA else (0, 0, 0)
    return [item(pair.ours.config.layout, text=t, images=n, seed=s) for s, (t, n) in enumerate(zip((9, 1, 14), images, strict=True))]


def run_theirs(pair: Pair, sample: Item, **extra) -> object:
    """transformers' forward of one sample."""
    ids = torch.tensor([[IMAGE_ID if token == IMAGE else token for token in sample.tokens]])
    if sample.tiles:
        extra["pixel_values"] = normalise(torch.stack(sample.tiles), VISION.mean, VISION.std)
    return pair.theirs(input_ids=ids, attention_mask=torch.ones_like(ids), **extra)


def test_clip(tmp_path):
    """Every selected hidden state of the tower equals transformers' `hidden_states`."""
    theirs = CLIPVisionModel(clip())
    config, state = stored(theirs, tmp_path)
    tiles = torch.randint(0, 256, (5, 3, 28, 28), dtype=torch.uint8)
    hidden = theirs(normalise(tiles, VISION.mean, VISION.std), output_hidden_states=True).hidden_states
    for layer in (-4, -3, -2, -1, 0, 1, 2, 3):
        for feature in ("patch", "cls_patch"):
            ours = ViT(hf.vision_config(config, select_layer=layer, feature=feature))
            renamed, unknown = hf.convert(state, hf.CLIP)
            assert sorted(unknown) == ["post_layernorm.bias", "post_layernorm.weight"]
            missing, _ = ours.load_state_dict({name.removeprefix("vision."): tensor for name, tensor in renamed.items()}, strict=False)
            assert not missing
            expected = hidden[layer][:, 1:] if feature == "patch" else hidden[layer]
            assert (ours(tiles) - expected).abs().max() < 1e-4


@torch.no_grad()
def test_logits(pair):
    """A packed batch of several rows gives transformers' logits of each sample, and those of each sample alone."""
    parts = samples(pair)
    layout = pair.ours.config.layout
    batch = pack(layout, [parts[:2], parts[2:], []], 40)
    packed = pair.ours(batch, logits_at=real(batch)).logits.split([len(part.tokens) for part in parts])
    for part, ours in zip(parts, packed, strict=True):
        alone = pack(layout, [[part]], len(part.tokens))
        assert (ours - pair.ours(alone, logits_at=real(alone)).logits).abs().max() < 1e-5
        assert (ours - run_theirs(pair, part).logits[0]).abs().max() < 1e-4


def test_gradients(pair):
    """The mean loss over a packed row's label tokens has transformers' gradient for every parameter of ours."""
    parts = samples(pair)
    batch = pack(pair.ours.config.layout, [parts], 60)
    pair.ours(batch).losses.sum().div(batch.label_count).backward()
    total = 0
    for part in parts:
        logits = run_theirs(pair, part).logits[0]
        total = total + torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(part.labels)[1:], ignore_index=IGNORE, reduction="sum")
    (total / batch.label_count).backward()
    assert gradient_difference(pair) < 1e-4


def gradient_difference(pair: Pair) -> float:
    """Largest difference over every parameter of ours, but for the tower that a Llama alone does not have."""
    name_on_disk, theirs = {hf.rename(name, pair.table): name for name in pair.state}, disk_gradients(pair)
    parts = ("decoder", "head") if pair.table is hf.LLAMA else ("vision", "projector", "decoder", "head")
    ours = {name: parameter.grad for name, parameter in pair.ours.named_parameters() if name.split(".")[0] in parts}
    return max((grad - theirs[name_on_disk[name]]).abs().max().item() for name, grad in ours.items())


def disk_gradients(pair: Pair) -> dict[str, Tensor]:
    """transformers' gradients under the names on disk: found by the tensor, since names in memory differ."""
    gradients = {}
    for name, tensor in pair.state.items():
        same = [p for p in pair.theirs.parameters() if p.shape == tensor.shape and torch.equal(p, tensor)]
        assert len(same) == 1, name
        gradients[name] = torch.zeros_like(tensor) if same[0].grad is None else same[0].grad
    return gradients


def test_loss_of_padded_rows(tmp_path):
    """One sample a row, padded on the right: the mean loss of both libraries is equal."""
    pair = llava_pair(tmp_path)
    layout, length = pair.ours.config.layout, 30
    parts = [item(layout, text=t, images=1, seed=t) for t in (7, 20, 12)]
    batch = pack(layout, [[part] for part in parts], length)
    ids = torch.tensor([[IMAGE_ID if t == IMAGE else t for t in part.tokens] + [0] * (length - len(part.tokens)) for part in parts])
    labels = torch.tensor([part.labels + [IGNORE] * (length - len(part.labels)) for part in parts])
    pixels = normalise(batch.tiles, VISION.mean, VISION.std)
    theirs = pair.theirs(input_ids=ids, pixel_values=pixels, attention_mask=(batch.segments > 0).long(), labels=labels).loss
    ours = pair.ours(batch).losses.sum() / batch.label_count
    assert (ours - theirs).abs() < 1e-5
    ours.backward()
    theirs.backward()
    assert gradient_difference(pair) < 1e-4


def test_state_dict_round_trip(pair, tmp_path):
    """Disk -> ours -> disk keeps every bit, and transformers loads what we write with no other logits."""
    ours = {name: tensor for name, tensor in pair.ours.state_dict().items() if pair.table is hf.LLAVA or name.split(".")[0] in ("decoder", "head")}
    back, unknown = hf.convert(ours, pair.table, back=True)
    assert not unknown
    again, unknown = hf.convert(back, pair.table)
    assert not unknown and again.keys() == ours.keys()
    assert all(torch.equal(again[name], ours[name]) for name in ours)
    for name, tensor in pair.state.items():
        new = hf.rename(name, pair.table)
        if new in ours:
            assert torch.equal(ours[new], tensor) and ours[new].dtype == tensor.dtype
    extra = {name: tensor for name, tensor in pair.state.items() if hf.rename(name, pair.table) not in ours}  # layers that are not built
    pair.theirs.config.save_pretrained(tmp_path / "again")
    save_file(extra | back, tmp_path / "again" / "model.safetensors", metadata={"format": "pt"})
    reloaded, info = type(pair.theirs).from_pretrained(tmp_path / "again", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    theirs = pair.theirs.state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in reloaded.state_dict().items())


def test_both_spellings():
    """Published files say vision_tower.vision_model.…, transformers 5 writes vision_tower.…; we read both and write the first."""
    ours = "vision.blocks.7.mlp.up.bias"
    for spelling in ("vision_tower.vision_model.encoder.layers.7.mlp.fc1.bias", "vision_tower.encoder.layers.7.mlp.fc1.bias"):
        assert hf.rename(spelling, hf.LLAVA) == ours
    assert hf.rename(ours, hf.LLAVA, back=True) == "vision_tower.vision_model.encoder.layers.7.mlp.fc1.bias"
    assert hf.rename("vision_model.pre_layrnorm.bias", hf.CLIP) == hf.rename("pre_layrnorm.bias", hf.CLIP) == "vision.pre_norm.bias"
    assert hf.rename("language_model.model.layers.x.mlp.up_proj.weight", hf.LLAVA) is None


def test_left_out_fields():
    """A config.json that says only what differs from transformers' defaults, as published ones do, means the same."""
    assert hf.decoder_config({}) == replace(hf.decoder_config(LlamaConfig().to_dict()), head_width=None)
    assert hf.vision_config({}) == hf.vision_config(CLIPVisionConfig().to_dict())
    whole = LlavaConfig(vision_config=clip(), text_config=llama())
    assert hf.llava_config(whole.to_diff_dict()) == hf.llava_config(whole.to_dict())
    published = {"model_type": "llava", "text_config": {"max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "vocab_size": 32064},
                 "vision_config": {"hidden_size": 1024, "image_size": 336, "intermediate_size": 4096, "num_attention_heads": 16,
                                   "num_hidden_layers": 24, "patch_size": 14, "projection_dim": 768, "vocab_size": 32000}}  # fmt: skip
    from neva.models.presets import VLMS

    expected = VLMS["llava-1.5-7b"]
    imported = hf.llava_config(published)
    assert replace(imported.decoder, vocab=32000, head_width=None) == expected.decoder and imported.vision == expected.vision


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5}}, "rope_type='llama3'"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type='linear'"),
        ({"model_type": "qwen2"}, "model_type='qwen2'"),
    ],
)
def test_refused_configs(change, said):
    """What we do not compute is refused and named, not ignored."""
    with pytest.raises(ValueError, match=said):
        hf.decoder_config(change)


@torch.no_grad()
def test_cached_decoding(pair):
    """A packed prefill of ragged requests and steps of [r, 1] give the logits of a whole forward pass."""
    parts = [item(pair.ours.config.layout, text=t, images=n if pair.table is hf.LLAVA else 0, seed=t) for t, n in ((11, 1), (8, 0), (12, 2))]
    steps, config = 5, pair.ours.config.decoder
    whole = [run_theirs(pair, part).logits[0] for part in parts]
    starts = [len(part.tokens) - steps for part in parts]
    prompts = [Item(tokens=p.tokens[:n], labels=p.labels[:n], tiles=p.tiles) for p, n in zip(parts, starts, strict=True)]
    size = max(len(part.tokens) for part in parts) + 1
    keys = torch.full((config.layers, len(parts), size, config.kv_heads, config.head), float("nan"))
    cache = Cache(
        keys=keys.nan_to_num(7.0), values=keys.nan_to_num(7.0), slots=torch.zeros(0, dtype=torch.int64),
        lengths=torch.tensor(starts), decoding=False, span=max(starts), ragged=True,
    )  # fmt: skip
    batch = pack(pair.ours.config.layout, [prompts], sum(starts) + 3)
    slots = [r * size + i for r, n in enumerate(starts) for i in range(n)] + [len(parts) * size - 1] * 3
    last = torch.tensor(starts).cumsum(0) - 1
    logits = pair.ours(batch, logits_at=last, cache=replace(cache, slots=torch.tensor(slots))).logits
    for r, start in enumerate(starts):
        assert (logits[r] - whole[r][start - 1]).abs().max() < 1e-4
    for step in range(steps):
        at = [start + step for start in starts]
        one = decode_batch([part.tokens[i] for part, i in zip(parts, at, strict=True)], at, batch)
        now = replace(
            cache, slots=torch.tensor([r * size + i for r, i in enumerate(at)]), lengths=torch.tensor(at) + 1, decoding=True, span=max(at) + 1
        )
        logits = pair.ours(one, logits_at=torch.arange(len(parts)), cache=now).logits
        for r, i in enumerate(at):
            assert (logits[r] - whole[r][i]).abs().max() < 1e-4


def decode_batch(tokens: list[int], positions: list[int], like: Batch) -> Batch:
    """One token for each of r requests."""
    column = torch.tensor(tokens)[:, None]
    return replace(
        like, tokens=column, labels=torch.full_like(column, IGNORE), positions=torch.tensor(positions)[:, None], segments=torch.ones_like(column),
        cu_seqlens=torch.arange(len(tokens) + 1, dtype=torch.int32), max_len=1, labelled=column[:0, 0], groups=torch.zeros_like(column),
        tiles=like.tiles[:0], inline=like.inline[:0], slots=like.slots[:0], sees=torch.zeros(len(tokens), 1, 2, dtype=torch.int64), any_tiles=False,
    )  # fmt: skip
