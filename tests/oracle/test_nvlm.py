"""NVLM-D against a straight-line reference, in the key layout of nvidia/NVLM-D-72B; LLaVA-NeXT against transformers."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
from PIL import Image
from safetensors.torch import save_file

from neva import api
from neva.batch import IMAGE, ImageLayout
from neva.checkpoint.hf import Options, read_source
from neva.checkpoint.target import ExportOptions
from neva.data.encode import Encoder
from neva.data.pack import Budget, collate
from neva.data.sample import Sample, Turn
from neva.data.tokenizer import load_tokenizer
from neva.infer.generate import load
from neva.models.vit import normalise
from neva.models.vlm import VLMConfig
from tests import nvlm_reference as reference
from tests.families import TEXT, build, clip, llama, on_disk
from tests.oracle.test_convert import SIZE, add_text, quiet_load, same_bits
from tests.oracle.test_convert import TOKENIZER as FILE

torch.set_num_threads(1)
TOKENIZER = load_tokenizer(FILE)
VOCAB = 520
QUESTION = "<image>\nWhat is this?"


def nvlm(folder: Path, *, padded: int = 0, **changes: Any) -> tuple[dict, dict]:
    """A tiny random NVLM-D as it is published, with the demo's tokenizer beside it; its config and tensors."""
    config = reference.tiny_config(VOCAB, llm_config={"bos_token_id": None, "eos_token_id": 1}, **changes)
    state = reference.random_state(config, torch.Generator().manual_seed(0), padded_heads=padded)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    add_text(folder, image=False, pad=False)
    return config, state


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    generator = torch.Generator().manual_seed(seed)
    return Image.fromarray(torch.randint(0, 256, (height, width, 3), generator=generator, dtype=torch.uint8).numpy())


def logits_of(loaded: Any, samples: list[Sample]) -> list[torch.Tensor]:
    """Our logits of packed samples, one tensor each."""
    encoded = [loaded.encoder.encode(sample, labels=False) for sample in samples]
    lengths = [len(one.tokens) for one in encoded]
    budget = Budget(seq_length=sum(lengths) + 3, max_tiles=99)
    batch = collate([encoded], budget, layout=loaded.encoder.layout, group_names=("s",), any_tiles=any(len(one.tiles) for one in encoded))
    return list(loaded.model(batch, logits_at=torch.arange(sum(lengths))).logits.split(lengths))


@pytest.mark.parametrize("padded", [0, 1, 5])
def test_logits_equal_the_reference(padded, tmp_path):
    """Several images of several tiles in a sample, one-tile images, text alone; heads of zeros as NVLM stores them."""
    config, state = nvlm(tmp_path / "hf", padded=padded)
    api.import_checkpoint([tmp_path / "hf"], tmp_path / "neva")
    loaded = load(tmp_path / "neva")
    assert loaded.model.config.vision.heads == 3 + padded
    shown = [picture(60, 28), picture(28, 90, 1), picture(28, 28, 2)]
    talks = [("<image>\nA " + "<image> and " * 2, tuple(shown)), ("No image.", ()), (QUESTION, (shown[2],))]
    samples = [Sample(source="s", id=str(n), turns=(Turn(role="user", text=text),), images=images) for n, (text, images) in enumerate(talks)]
    for sample, mine in zip(samples, logits_of(loaded, samples), strict=True):
        cut = [tile for image in sample.images for tile in reference.cut(image, min_tiles=1, max_tiles=6, tile=28)]
        tiles = torch.stack([torch.from_numpy(np.array(tile)).permute(2, 0, 1) for tile in cut]) if cut else None
        pixels = None if tiles is None else normalise(tiles, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
        tokens = loaded.encoder.encode(sample, labels=False).tokens.tolist()
        expected = reference.forward(state, config, tokens, pixels, IMAGE)
        assert (mine - expected).abs().max() < 1e-4


@pytest.mark.parametrize("sizes", [[(60, 28)], [(28, 28)], [(90, 60), (20, 60)], [(300, 10)]])
def test_prompts_are_those_of_the_published_code(sizes, tmp_path):
    """Text and tiles, with tags tokenised in the text as that code does; in training they are tokenised apart."""
    nvlm(tmp_path / "hf")
    api.import_checkpoint([tmp_path / "hf"], tmp_path / "neva")
    encoder = load(tmp_path / "neva").encoder
    images = tuple(picture(*size, seed=number) for number, size in enumerate(sizes))
    question = "<image>\nWhat is it?" if len(sizes) == 1 else "First <image> then <image> ?"
    encoded = encoder.encode(Sample(source="s", id="0", turns=(Turn(role="user", text=question),), images=images), labels=False)
    cut = [reference.cut(image, min_tiles=1, max_tiles=6, tile=28) for image in images]
    assert len(encoded.tiles) == sum(map(len, cut))
    text = reference.prompt(question, [len(tiles) for tiles in cut], 4)
    expected = [0]  # which this tokenizer puts before every text
    for number, part in enumerate(text.split("<|vision_pad|>")):
        expected += ([IMAGE] if number else []) + encoder.tokenizer.encode(part)
    assert encoded.tokens.tolist() == expected
    apart = Encoder(encoder.tokenizer, encoder.template, None, replace(encoder.layout, tag_tokens="apart"))
    trained = apart.encode(Sample(source="s", id="0", turns=(Turn(role="user", text=question),), images=images), labels=False)
    assert encoder.tokenizer.decode(trained.tokens.tolist()) == encoder.tokenizer.decode(encoded.tokens.tolist())
    tag = encoder.tokenizer.encode("<tile_1>" if len(cut[0]) > 1 else "<tile_global_thumbnail>")
    at = trained.tokens.tolist().index(IMAGE)
    assert trained.tokens[at - len(tag) : at].tolist() == tag


@pytest.mark.parametrize("padded", [0, 1])
def test_round_trip_of_the_key_layout(padded, tmp_path):
    config, state = nvlm(tmp_path / "hf", padded=padded)
    api.import_checkpoint([tmp_path / "hf"], tmp_path / "neva")
    said: list[str] = []
    api.export_checkpoint(tmp_path / "neva", tmp_path / "out", options=ExportOptions(shard=40_000), say=said.append)
    assert any(line.startswith("Prompts: 3 of 3") for line in said)
    assert same_bits(on_disk(tmp_path / "out"), state)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    dtypes = ("dtype", "torch_dtype")
    for part in (None, "llm_config", "vision_config"):
        mine, theirs = (c if part is None else c[part] for c in (written, config))
        assert {k: v for k, v in mine.items() if k not in dtypes and not isinstance(v, dict)} | {} == {
            k: v for k, v in theirs.items() if k not in dtypes and not isinstance(v, dict)
        }
    api.export_checkpoint(tmp_path / "neva", tmp_path / "decoder", options=ExportOptions(part="decoder"))
    quiet_load(tf.AutoModelForCausalLM, tmp_path / "decoder")


def test_an_nvlm_made_here_goes_out(tmp_path):
    """Composed of a decoder and an InternViT, tiled and tagged; what the format cannot hold is named."""
    build(tf.Qwen2Config(**{**TEXT, "vocab_size": VOCAB, "max_position_embeddings": 512}), tmp_path / "text")
    add_text(tmp_path / "text", image=False, pad=False)
    _, state = nvlm(tmp_path / "whole")
    (tmp_path / "vit").mkdir()
    described = json.loads((tmp_path / "whole" / "config.json").read_text())["vision_config"]
    (tmp_path / "vit" / "config.json").write_text(json.dumps(described))
    vit = {name.removeprefix("vision_model."): tensor for name, tensor in state.items() if name.startswith("vision_model.")}
    save_file(vit, tmp_path / "vit" / "model.safetensors", metadata={"format": "pt"})
    tiled = ("image.aspect=tiles", "image.max_tiles=6", "image.tags=1d", "image.prefix=<Image>", "image.suffix=</Image>", "pixel_shuffle=v2")
    options = Options(projector="norm_ffn_gelu", template="nvlm-chatml-hf", overrides=tiled)
    api.import_checkpoint([tmp_path / "text", tmp_path / "vit"], tmp_path / "neva", options=options)
    said: list[str] = []
    api.export_checkpoint(tmp_path / "neva", tmp_path / "out", say=said.append)
    assert any("image.tag_tokens=joined" in line for line in said)
    back = read_source(tmp_path / "out")
    assert isinstance(back.model, VLMConfig) and back.model.image.max_tiles == 6 and back.format == "NVLM_D"
    for change, named in (
        ("image.tags=grid", "image.tags='grid'"),
        ("image.thumbnail=first", "image.thumbnail='first'"),
        ("image.prefix=", "prefix"),
        ("image.resample=bilinear", "resample"),
        ("vision.mean=[0.5,0.5,0.5]", "vision.mean"),
    ):
        changed = replace(options, overrides=(*tiled, change))
        api.import_checkpoint([tmp_path / "text", tmp_path / "vit"], tmp_path / named, options=changed)
        with pytest.raises(ValueError, match=f"NVLM_D cannot hold .*{named}"):
            api.export_checkpoint(tmp_path / named, tmp_path / "no")


def test_tags_without_a_thumbnail_are_refused(tmp_path):
    """The published code would then give the last tile the thumbnail's tag."""
    nvlm(tmp_path / "hf", use_thumbnail=False)
    with pytest.raises(ValueError, match="use_thumbnail"):
        api.import_checkpoint([tmp_path / "hf"], tmp_path / "neva")


def test_x_and_h_have_no_format(tmp_path):
    """No format of Hugging Face's holds cross-attention to tiles: export names the fields. Its layers are new in a composed model."""
    build(llama(vocab_size=SIZE, max_position_embeddings=512, bos_token_id=0, eos_token_id=1), tmp_path / "text")
    add_text(tmp_path / "text", image=False, pad=False)
    build(clip(), tmp_path / "seen")
    crossed = ("inline=none", "decoder.cross_layers=[1]", "image.aspect=tiles", "image.max_tiles=4", "image.tags=1d")
    options = Options(projector="norm_linear", template="v1", overrides=crossed)
    with pytest.raises(ValueError, match="would see no tile"):
        api.import_checkpoint([tmp_path / "text"], tmp_path / "no", options=Options(overrides=("decoder.cross_layers=[1]",)))
    api.import_checkpoint([tmp_path / "text", tmp_path / "seen"], tmp_path / "neva", options=options)
    assert "at most 4, thumbnail last, tags 1d, cross-attention of layers 1 reads" in api.inspect(tmp_path / "neva")["images"]
    with pytest.raises(ValueError, match=r"inline='none', decoder.cross_layers=\(1,\)"):
        api.export_checkpoint(tmp_path / "neva", tmp_path / "out")
    api.export_checkpoint(tmp_path / "neva", tmp_path / "decoder", options=ExportOptions(part="decoder"))
    assert same_bits(on_disk(tmp_path / "decoder"), on_disk(tmp_path / "text"))


# LLaVA-NeXT

PINPOINTS = [[28, 56], [56, 28], [56, 56]]


def following(folder: Path) -> tf.LlavaNextForConditionalGeneration:
    """A tiny LLaVA-NeXT with tokenizer and processor, as llava-hf publishes it."""
    text = llama(vocab_size=390, max_position_embeddings=512, bos_token_id=0, eos_token_id=1, pad_token_id=SIZE)
    config = tf.LlavaNextConfig(
        text_config=text, vision_config=clip(), image_token_index=SIZE + 1, image_grid_pinpoints=PINPOINTS, vision_feature_layer=-2
    )  # fmt: skip
    config.image_token_id = SIZE + 1
    model = tf.LlavaNextForConditionalGeneration(config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            deviation = parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.1
            parameter.copy_(torch.empty_like(parameter).normal_(float(parameter.ndim == 1), deviation, generator=generator))
    model.eval().save_pretrained(folder)
    add_text(folder, image=True)
    images = tf.LlavaNextImageProcessorPil(
        size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}, image_grid_pinpoints=PINPOINTS, do_pad=True
    )  # fmt: skip
    processor = tf.LlavaNextProcessor(
        images, tf.AutoTokenizer.from_pretrained(folder), patch_size=14, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template="{{ messages }}",
    )  # fmt: skip
    processor.save_pretrained(folder)
    return model


@pytest.mark.parametrize("size", [(28, 28), (80, 30), (20, 90), (57, 56), (300, 11)])
def test_llava_next_equals_transformers(size, tmp_path):
    """Logits and greedy text, and back to the same bits; files that transformers loads without a word."""
    theirs = following(tmp_path / "hf")
    api.import_checkpoint([tmp_path / "hf"], tmp_path / "neva")
    api.export_checkpoint(tmp_path / "neva", tmp_path / "out")
    assert same_bits(on_disk(tmp_path / "out"), on_disk(tmp_path / "hf"))
    quiet_load(tf.LlavaNextForConditionalGeneration, tmp_path / "out")
    loaded, image = load(tmp_path / "neva"), picture(*size)
    processor = tf.AutoProcessor.from_pretrained(tmp_path / "out")
    content = [{"type": "image"}, {"type": "text", "text": "What is this?"}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    given = processor(text=prompt, images=[image], return_tensors="pt")
    with torch.no_grad():
        expected = theirs(**given).logits[0]
    sample = Sample(source="s", id="0", turns=(Turn(role="user", text=QUESTION),), images=(image,))
    (mine,) = logits_of(loaded, [sample])
    assert (mine - expected).abs().max() < 1e-4
    out = theirs.generate(**given, max_new_tokens=12, do_sample=False)[0, given["input_ids"].shape[1] :]
    (answer,) = api.generate(loaded, prompt="What is this?", images=[image], max_new_tokens=12)
    assert answer["text"] == loaded.encoder.tokenizer.decode([token for token in out.tolist() if token != 1]).strip()


def test_tags_that_a_tokenizer_cannot_spell():
    """A vocabulary without the letters of a tag would give every tag the same unknown tokens: refused before training."""
    import tokenizers

    from neva.data.tokenizer import JsonTokenizer

    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<unk>": 0, "a": 1, "</s>": 2}, unk_token="<unk>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = JsonTokenizer({"tokenizer.json": words.to_str().encode()})
    layout = ImageLayout(tile=28, tokens_per_tile=4, aspect="tiles", max_tiles=6, tags="1d")
    with pytest.raises(ValueError, match="cannot spell '<tile_1>'"):
        Encoder(tokenizer, "text", None, layout)
