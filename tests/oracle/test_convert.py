"""Hugging Face -> neva -> Hugging Face: every bit, every spelling, transformers' own processor and text; and what is refused."""

import dataclasses
import json
import pickle
import warnings
from pathlib import Path

import pytest
import tokenizers
import torch
import transformers as tf
from PIL import Image
from safetensors.torch import load_file, save_file

from neva import api
from neva.checkpoint import hf, index, stream
from neva.checkpoint.hf import Options
from neva.checkpoint.manifest import CheckpointError
from neva.checkpoint.target import ExportOptions
from neva.infer.generate import load
from tests.families import DECODERS, ENCODERS, VLMS, build, clip, internvl, llama, llava, nemotron, on_disk, siglip

torch.set_num_threads(1)
TOKENIZER = Path(hf.__file__).parents[1] / "recipes" / "tokenizer" / "tokenizer.json"
SIZE = 376
IMAGE = SIZE
"""Id of `<image>` in the tokenizers that the tests make."""


def add_text(folder: Path, *, image: bool, pad: bool = True) -> None:
    """The demo's tokenizer beside the weights, for a VLM with `<image>` and `<pad>`, as transformers writes it."""
    model = tokenizers.Tokenizer.from_file(str(TOKENIZER))
    model.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    made = tf.PreTrainedTokenizerFast(tokenizer_object=model, bos_token="<s>", eos_token="</s>", **({"pad_token": "<pad>"} if pad else {}))
    if image:
        made.add_tokens(["<image>"], special_tokens=True)
    made.save_pretrained(folder)


def whole(folder: Path, **changes) -> torch.nn.Module:
    """A LLaVA with tokenizer and processor, as llava-hf publishes it. `<image>` is one beyond `<pad>`."""
    config = llava(llama(vocab_size=390, max_position_embeddings=512, bos_token_id=0, eos_token_id=1, pad_token_id=SIZE, **changes), clip())
    config.image_token_index = config.image_token_id = SIZE + 1
    theirs = build(config, folder)
    add_text(folder, image=True)
    tokenizer = tf.AutoTokenizer.from_pretrained(folder)
    images = tf.CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    processor = tf.LlavaProcessor(
        images, tokenizer, patch_size=14, vision_feature_select_strategy="default", num_additional_image_tokens=1, chat_template="{{ messages }}"
    )
    processor.save_pretrained(folder)
    return theirs


def same_bits(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a)


def quiet_load(kind, folder: Path):
    """from_pretrained that must say nothing, and miss and add nothing."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model, info = kind.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    return model.eval()


@pytest.mark.parametrize("name", [*DECODERS, *VLMS, *ENCODERS])
def test_round_trip(name, tmp_path, capsys, caplog):
    """hf -> neva -> hf gives the same tensors under the same names, bit for bit, proved equal on the way in and on the way out."""
    config = {**DECODERS, **VLMS, **ENCODERS}[name]()
    theirs = build(config, tmp_path / "hf")
    if name in VLMS:
        add_text(tmp_path / "hf", image=True)
        config.text_config.vocab_size = 390
        theirs = build(config, tmp_path / "hf")
    api.import_checkpoint([tmp_path / "hf"], tmp_path / "neva")
    api.export_checkpoint(tmp_path / "neva", tmp_path / "again")
    before, after = on_disk(tmp_path / "hf"), on_disk(tmp_path / "again")
    assert same_bits(before, after)
    caplog.clear()
    quiet_load(type(theirs), tmp_path / "again")
    assert not [record.getMessage() for record in caplog.records if record.levelname in ("WARNING", "ERROR")]
    assert "TOO LARGE" not in capsys.readouterr().out


def test_spelling_of_vllm(tmp_path):
    """With keys=vllm names are those of the published files: vision_tower.vision_model, language_model.model."""
    whole(tmp_path / "hf")
    api.import_checkpoint([tmp_path / "hf"], tmp_path / "neva")
    api.export_checkpoint(tmp_path / "neva", tmp_path / "vllm", options=ExportOptions(keys="vllm"))
    names = set(on_disk(tmp_path / "vllm"))
    assert "vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight" in names
    assert "vision_tower.vision_model.post_layernorm.weight" in names
    assert "language_model.model.layers.0.mlp.up_proj.weight" in names and "language_model.lm_head.weight" in names
    quiet_load(tf.LlavaForConditionalGeneration, tmp_path / "vllm")


PROMPT = "What is <this>?  Say it."


@pytest.mark.parametrize("images", [0, 1])
def test_text_and_pixels(images, tmp_path):
    """Ids, pixels and 20 greedy tokens of the exported folder, by AutoProcessor and generate, are those of `neva generate`."""
    whole(tmp_path / "hf")
    api.import_checkpoint([tmp_path / "hf"], tmp_path / "neva")
    api.export_checkpoint(tmp_path / "neva", tmp_path / "out")
    picture = Image.effect_noise((50, 37), 90).convert("RGB")
    picture.save(tmp_path / "a.png")
    shown = [tmp_path / "a.png"] * images
    processor, model = tf.AutoProcessor.from_pretrained(tmp_path / "out"), quiet_load(tf.LlavaForConditionalGeneration, tmp_path / "out")
    content = [*({"type": "image"} for _ in shown), {"type": "text", "text": PROMPT}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    given = processor(text=text, images=[picture] * images or None, return_tensors="pt")
    loaded = load(tmp_path / "neva")
    encoded = loaded.encoder.encode(api_sample(shown), labels=False)
    assert torch.where(encoded.tokens < 0, SIZE + 1, encoded.tokens).tolist() == given["input_ids"][0].tolist()
    if images:
        from neva.models.vit import normalise

        c = loaded.model.config.vision
        plain = processor.image_processor(picture, do_rescale=False, do_normalize=False, return_tensors="pt")["pixel_values"]
        assert torch.equal(encoded.tiles, plain.to(torch.uint8))
        assert (normalise(encoded.tiles, c.mean, c.std) - given["pixel_values"]).abs().max() < 1e-6
    theirs = model.generate(**given, max_new_tokens=20, do_sample=False)[0, given["input_ids"].shape[1] :].tolist()
    (ours,) = api.generate(loaded, prompt=PROMPT, images=shown, max_new_tokens=20)
    assert ours["text"] == processor.decode(theirs, skip_special_tokens=True).strip()
    assert ours["tokens"] == len([t for t in theirs if t != 1])


@pytest.mark.parametrize(
    "made",
    [
        tf.CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}, resample=2, image_mean=[0.1, 0.2, 0.3]),
        tf.SiglipImageProcessorPil(size={"height": 28, "width": 28}),
        tf.LlavaImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}, do_pad=True),
    ],
)
@pytest.mark.parametrize("size", [(50, 37), (20, 61), (28, 28)])
def test_pixels_of_processors(made, size, tmp_path):
    """What a preprocessor_config.json says is what we do: uint8 pixels equal bit for bit, normalised ones to rounding; and ours reads back."""
    from neva.data.image import to_tiles
    from neva.models.hf_vlm import image_config, processor_json
    from neva.models.presets import VLMS as PRESETS
    from neva.models.vit import normalise
    from neva.models.vlm import VLMConfig

    picture = Image.effect_noise(size, 90).convert("RGB")
    image, pixels = image_config(json.loads(made.to_json_string()))
    tiny = PRESETS["llava-tiny"]
    config = VLMConfig(decoder=tiny.decoder, vision=dataclasses.replace(tiny.vision, **pixels), image=image)
    tiles = to_tiles(picture, config.layout)
    plain = made(picture, do_rescale=False, do_normalize=False, return_tensors="pt")["pixel_values"]
    assert torch.equal(tiles, plain.to(torch.uint8))
    given = made(picture, return_tensors="pt")["pixel_values"]
    assert (normalise(tiles, config.vision.mean, config.vision.std) - given).abs().max() < 1e-5
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor_json(image, config.vision)))
    again = tf.AutoImageProcessor.from_pretrained(tmp_path)
    assert torch.equal(again(picture, return_tensors="pt")["pixel_values"], given)
    assert image_config(json.loads((tmp_path / "preprocessor_config.json").read_text())) == (image, pixels)


def api_sample(images: list[Path]):
    from neva.data.sample import Sample, Turn

    return Sample(source="t", id="0", turns=(Turn(role="user", text="<image>\n" * len(images) + PROMPT),), images=tuple(images))


@pytest.mark.parametrize("name", ["mistral window", "nemotron", "qwen2", "mixtral", "llama3 scaling"])
def test_greedy_text_of_decoders(name, tmp_path):
    """20 greedy tokens of a decoder without an encoder are those of transformers' generate."""
    config = DECODERS[name]()
    config.vocab_size, config.bos_token_id, config.eos_token_id, config.pad_token_id = 390, 0, 1, None
    theirs = build(config, tmp_path / "hf")
    add_text(tmp_path / "hf", image=False, pad=False)
    api.import_checkpoint([tmp_path / "hf"], tmp_path / "neva", options=Options(template="chatml"))
    loaded = load(tmp_path / "neva")
    encoded = loaded.encoder.encode(api_sample([]), labels=False)
    out = theirs.generate(encoded.tokens[None], max_new_tokens=20, do_sample=False)[0, len(encoded.tokens) :].tolist()
    (ours,) = api.generate(loaded, prompt=PROMPT, max_new_tokens=20)
    assert ours["text"] == loaded.encoder.tokenizer.decode([t for t in out if t != 1]).strip()


@pytest.mark.parametrize(("decoder", "vision"), [(llama, clip), (nemotron, siglip), (llama, internvl)])
def test_composed(decoder, vision, tmp_path, capsys):
    """A VLM of any decoder and any encoder: its projector alone is new, drawn by rule; the others are their sources' bits."""
    build(decoder(vocab_size=SIZE), tmp_path / "text")
    add_text(tmp_path / "text", image=False, pad=False)
    build(vision(), tmp_path / "seen")
    api.import_checkpoint([tmp_path / "text", tmp_path / "seen"], tmp_path / "neva", options=Options(seed=7))
    said = capsys.readouterr().out
    assert "new, drawn from seed 7: projector.0.weight" in said and "decoder" in said and "encoder" in said
    from neva.models.vlm import fresh

    sources = [hf.read_source(tmp_path / part) for part in ("text", "seen")]
    weights = tmp_path / "neva" / "weights"
    for name, shape in index.stored(weights).items():
        found = hf._giver(name, sources, 0)
        mine = index.read(weights, name)
        if name.startswith("projector."):
            assert found is None and torch.equal(mine, fresh(name, shape.shape, 7))
        else:
            source, made = found
            assert torch.equal(mine, made.gather([source.shards.read(source.spelled[n]) for n in made.theirs]))
    out = api.export_checkpoint(tmp_path / "neva", tmp_path / "llava")
    model = quiet_load(tf.LlavaForConditionalGeneration, out)
    assert model.config.text_config.vocab_size == 384 and model.config.image_token_id == SIZE  # 376 tokens, <image> and <pad>, padded to 64
    assert tf.AutoProcessor.from_pretrained(out).tokenizer.convert_tokens_to_ids("<pad>") == SIZE + 1


def test_parts(tmp_path):
    """The decoder, the encoder and the projector of a VLM come out alone, the first two as transformers' own models."""
    theirs = whole(tmp_path / "hf")
    api.import_checkpoint([tmp_path / "hf"], tmp_path / "neva")
    for part, kind in (("decoder", tf.LlamaForCausalLM), ("vision", tf.CLIPVisionModel)):
        quiet_load(kind, api.export_checkpoint(tmp_path / "neva", tmp_path / part, options=ExportOptions(part=part)))
    bridge = on_disk(api.export_checkpoint(tmp_path / "neva", tmp_path / "projector", options=ExportOptions(part="projector")))
    assert torch.equal(bridge["model.mm_projector.0.weight"], theirs.model.multi_modal_projector.linear_1.weight)


def original(folder: Path, **changes) -> None:
    """A LLaVA in the layout of its own repository, encoder in a folder of its own."""
    build(llama(vocab_size=SIZE, **changes), folder / "llama")
    state = on_disk(folder / "llama")
    generator = torch.Generator().manual_seed(3)
    for n, shape in ((0, (48, 32)), (2, (48, 48))):
        state |= {f"model.mm_projector.{n}.weight": torch.randn(shape, generator=generator), f"model.mm_projector.{n}.bias": torch.zeros(48)}
    (folder / "llava").mkdir()
    config = json.loads((folder / "llama" / "config.json").read_text())
    config |= {"architectures": ["LlavaLlamaForCausalLM"], "model_type": "llava", "mm_hidden_size": 32, "mm_projector_type": "mlp2x_gelu",
               "mm_vision_select_layer": -2, "mm_vision_select_feature": "patch", "mm_vision_tower": "openai/clip", "image_aspect_ratio": "pad",
               "mm_use_im_start_end": False, "mm_use_im_patch_token": False, "use_mm_proj": True}  # fmt: skip
    (folder / "llava" / "config.json").write_text(json.dumps(config))
    torch.save(state, folder / "llava" / "pytorch_model.bin")
    build(clip(), folder / "clip")
    add_text(folder / "llava", image=False, pad=False)


def test_original_layout(tmp_path):
    """LLaVA's own repository's layout, torch shards, encoder apart: in, and out as transformers' LLaVA with padded squares."""
    original(tmp_path)
    with pytest.raises(ValueError, match="give the encoder's folder with --vision"):
        api.import_checkpoint([tmp_path / "llava"], tmp_path / "neva")
    api.import_checkpoint([tmp_path / "llava", tmp_path / "clip"], tmp_path / "neva")
    loaded = load(tmp_path / "neva")
    assert loaded.model.config.image.aspect == "pad" and loaded.encoder.template == "v1"
    out = api.export_checkpoint(tmp_path / "neva", tmp_path / "out")
    quiet_load(tf.LlavaForConditionalGeneration, out)
    processor = tf.AutoProcessor.from_pretrained(out)
    picture = Image.effect_noise((50, 37), 90).convert("RGB")
    from neva.data.image import to_tiles
    from neva.models.vit import normalise

    c = loaded.model.config
    theirs = processor.image_processor(picture, return_tensors="pt")["pixel_values"]
    assert (normalise(to_tiles(picture, c.layout), c.vision.mean, c.vision.std) - theirs).abs().max() < 1e-6


def test_dtypes(tmp_path):
    """Weights keep their dtype, or are converted by flag, on the way in and on the way out."""
    build(llama(), tmp_path / "hf").bfloat16().save_pretrained(tmp_path / "hf")
    api.import_checkpoint([tmp_path / "hf"], tmp_path / "keep")
    assert {t.dtype for t in index.stored(tmp_path / "keep" / "weights").values()} == {torch.bfloat16}
    api.import_checkpoint([tmp_path / "hf"], tmp_path / "wide", options=Options(dtype="fp32"))
    assert {t.dtype for t in index.stored(tmp_path / "wide" / "weights").values()} == {torch.float32}
    out = api.export_checkpoint(tmp_path / "wide", tmp_path / "out", options=ExportOptions(dtype="fp16", shard=20_000))
    assert {t.dtype for t in on_disk(out).values()} == {torch.float16} and len([*out.glob("*.safetensors")]) > 3
    back = {name: tensor.float() for name, tensor in on_disk(out).items()}
    assert all(torch.equal(back[n], t.half().float()) for n, t in on_disk(tmp_path / "hf").items())


@pytest.mark.parametrize("name", ["llava", "qwen2", "siglip", "internvit 6b kind"])
@pytest.mark.parametrize("whole_models", [True, False])
def test_conversion_of_dtype_passes_the_gate(name, whole_models, tmp_path, monkeypatch):
    """Weights that are rounded on the way are compared with transformers' rounded the same, not with the exact ones."""
    from neva.checkpoint import parity

    monkeypatch.setattr(parity, "fits", lambda parameters: whole_models)
    config = {**DECODERS, **VLMS, **ENCODERS}[name]()
    if name == "llava":
        config.text_config.vocab_size = 390
    build(config, tmp_path / "hf")
    if name == "llava":
        add_text(tmp_path / "hf", image=True)
    api.import_checkpoint([tmp_path / "hf"], tmp_path / "neva", options=Options(dtype="bf16"))
    out = api.export_checkpoint(tmp_path / "neva", tmp_path / "out", options=ExportOptions(dtype="fp16"))
    expected = {n: t.to(torch.bfloat16).half() for n, t in on_disk(tmp_path / "hf").items()}
    written = on_disk(out)
    assert written.keys() == expected.keys()
    assert all(torch.equal(written[n], expected[n]) for n in expected)


def test_resolution(tmp_path):
    """Another image size resizes the position embeddings as transformers interpolates them."""
    theirs = build(clip(), tmp_path / "hf")
    api.import_checkpoint([tmp_path / "hf"], tmp_path / "neva", options=Options(overrides=("image=56", "select_layer=-1")))
    from neva.models.vit import ViT, normalise
    from tests.families import load as _  # noqa: F401

    chosen = hf.plan([hf.read_source(tmp_path / "hf")], Options(overrides=("image=56", "select_layer=-1")))
    ours = ViT(chosen.vision)
    ours.load_state_dict({n.removeprefix("vision."): index.read(tmp_path / "neva" / "weights", n) for n in chosen.tensors})
    tiles = torch.randint(0, 256, (2, 3, 56, 56), dtype=torch.uint8)
    with torch.no_grad():
        pixels = normalise(tiles, ours.config.mean, ours.config.std)
        hidden = theirs(pixels, output_hidden_states=True, interpolate_pos_encoding=True).hidden_states[-1]
        assert (ours(tiles) - hidden[:, 1:]).abs().max() < 1e-4


# Refusals: each names the file and the reason, and leaves nothing.


def broken_shard(folder: Path) -> str:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    return "model.safetensors cannot be read"


def not_finite(folder: Path) -> str:
    state = load_file(folder / "model.safetensors")
    state["model.layers.1.mlp.up_proj.weight"][3, 4] = float("inf")
    save_file(state, folder / "model.safetensors")
    return r"model.safetensors: 'model.layers.1.mlp.up_proj.weight' holds values that are not finite"


def wrong_index(folder: Path) -> str:
    file = (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    names = dict.fromkeys([*load_file(file), "model.layers.9.x"], file.name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    return r"index.json is wrong: it lists 'model.layers.9.x'"


def missing_file(folder: Path) -> str:
    file = (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    names = dict.fromkeys(load_file(file), "model-2.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    return r"lists files that are not there: model-2.safetensors"


def missing_tensor(folder: Path) -> str:
    state = load_file(folder / "model.safetensors")
    del state["model.layers.1.mlp.up_proj.weight"]
    save_file(state, folder / "model.safetensors")
    return "'model.layers.1.mlp.up_proj.weight' is missing"


def more_tensors(folder: Path) -> str:
    state = load_file(folder / "model.safetensors")
    save_file({**state, "model.layers.0.self_attn.q_proj.bias": torch.zeros(48), "adapter": torch.zeros(1)}, folder / "model.safetensors")
    return "'adapter' is unexpected|'model.layers.0.self_attn.q_proj.bias' is unexpected"


def other_shape(folder: Path) -> str:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 64}))
    return r"'model.layers.0.mlp.gate_proj.weight' gives \[60, 48\], the config wants \[64, 48\]"


class Evil:
    def __reduce__(self):
        return (print, ("run",))


def pickled(folder: Path) -> str:
    (folder / "model.safetensors").unlink()
    torch.save({"model.embed_tokens.weight": Evil()}, folder / "pytorch_model.bin", pickle_module=pickle)
    return r"pytorch_model.bin is refused: .*print"


def unknown_mechanism(folder: Path) -> str:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "rope_parameters": None, "rope_scaling": {"type": "yarn", "factor": 2}}))
    return "rope_type='yarn'; default, linear, dynamic and llama3"


def unknown_family(folder: Path) -> str:
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt_bigcode"}))
    return "config.json"


def unknown_activation(folder: Path) -> str:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "hidden_act": "relu"}))
    return "hidden_act='relu', which this model does not compute"


def large_tokenizer(folder: Path) -> str:
    add_text(folder, image=False)
    return r"its tokenizer has 377 tokens, its embedding 70"


def quantised(folder: Path) -> str:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"bits": 4}}))
    return "quantised"


def broken_json(folder: Path) -> str:
    (folder / "config.json").write_text('{"model_type": "lla')
    return "config.json cannot be read"


@pytest.mark.parametrize(
    "damage",
    [broken_shard, not_finite, wrong_index, missing_file, missing_tensor, more_tensors, other_shape, pickled, unknown_mechanism,
     unknown_family, unknown_activation, large_tokenizer, quantised, broken_json],
)  # fmt: skip
def test_refused(damage, tmp_path, capsys):
    """What is damaged, would run code, or is of a kind that we do not compute, is refused with its file and reason; nothing is left."""
    build(llama(), tmp_path / "hf")
    said = damage(tmp_path / "hf")
    with pytest.raises(ValueError, match=said):
        api.import_checkpoint([tmp_path / "hf"], tmp_path / "neva")
    assert not (tmp_path / "neva").exists()
    assert "run" not in capsys.readouterr().out


def test_gate_refuses(tmp_path, monkeypatch, capsys):
    """A model that computes something else is not published, and `parity=False` says so in the output and in the checkpoint."""
    build(llama(), tmp_path / "hf")
    wrong = Options(overrides=("decoder.rope_theta=20000",))
    with pytest.raises(CheckpointError, match="is not published: against transformers decoder logits differs by"):
        api.import_checkpoint([tmp_path / "hf"], tmp_path / "neva", options=wrong)
    assert not (tmp_path / "neva").exists()
    api.import_checkpoint([tmp_path / "hf"], tmp_path / "neva", options=wrong, parity=False)
    assert "NOT COMPARED" in capsys.readouterr().out
    from neva.checkpoint import store

    assert store.load_config(tmp_path / "neva")["source"]["parity"] is None


@pytest.mark.parametrize("name", [*DECODERS, "llava", "llava mixtral siglip", "internvit 6b kind", "clip", "siglip"])
def test_gate_in_slices(name, tmp_path, monkeypatch):
    """Where two copies do not fit in memory the layers are compared one by one, and one wrong layer is found."""
    from neva.checkpoint import gate, parity

    monkeypatch.setattr(parity, "fits", lambda parameters: False)
    build({**DECODERS, **VLMS, **ENCODERS}[name](), tmp_path / "hf")
    source = hf.read_source(tmp_path / "hf")
    chosen = hf.plan([source], Options())
    differences = gate.compare([source], chosen.model, chosen.vision, chosen.read)
    assert all(d.passes for d in differences) and len(differences) >= 2

    def spoilt(name: str) -> torch.Tensor:
        tensor = chosen.read(name)
        return tensor * 1.01 if ".blocks.1." in name and tensor.ndim > 1 else tensor

    wrong = [d.part for d in gate.compare([source], chosen.model, chosen.vision, spoilt) if not d.passes]
    assert wrong and all("layer 1" in part for part in wrong)


def test_cut_off_import_goes_on(tmp_path, monkeypatch):
    """A killed import keeps its finished units, starts over where the sources changed, and ends in the same checkpoint."""
    build(llama(), tmp_path / "hf")
    monkeypatch.setattr(stream, "UNIT", 20_000)
    api.import_checkpoint([tmp_path / "hf"], tmp_path / "straight")
    original_read, reads = hf._Reader.read, []

    def counted(self, name):
        reads.append(name)
        if len(reads) == 12:
            raise KeyboardInterrupt
        return original_read(self, name)

    monkeypatch.setattr(hf._Reader, "read", counted)
    with pytest.raises(KeyboardInterrupt):
        api.import_checkpoint([tmp_path / "hf"], tmp_path / "neva")
    first = reads[:11]
    del reads[:]
    reads += [""] * 20
    api.import_checkpoint([tmp_path / "hf"], tmp_path / "neva")
    again = [name for name in reads[20:] if name in first]
    assert len(again) < len(first)
    for name in index.stored(tmp_path / "neva" / "weights"):
        assert torch.equal(index.read(tmp_path / "neva" / "weights", name), index.read(tmp_path / "straight" / "weights", name))
    assert not (tmp_path / "neva.tmp").exists()


def test_cut_off_export_goes_on(tmp_path, monkeypatch):
    """A killed export keeps its finished shards; another checkpoint's, or other options', start over."""
    from neva.checkpoint import export

    build(llama(), tmp_path / "hf")
    api.import_checkpoint([tmp_path / "hf"], tmp_path / "neva", say=lambda text: None)
    options, real_save, written = ExportOptions(shard=30_000), export.save_file, []

    def counted(tensors, path, **more):
        written.append(path.name)
        if len(written) == 3:
            raise KeyboardInterrupt
        real_save(tensors, path, **more)

    monkeypatch.setattr(export, "save_file", counted)
    with pytest.raises(KeyboardInterrupt):
        api.export_checkpoint(tmp_path / "neva", tmp_path / "out", options=options)
    assert not (tmp_path / "out").exists()
    written += [""] * 5
    api.export_checkpoint(tmp_path / "neva", tmp_path / "out", options=options, say=lambda text: None)
    assert not set(written[:2]) & set(written[8:]) and same_bits(on_disk(tmp_path / "hf"), on_disk(tmp_path / "out"))


def test_what_the_format_cannot_hold(tmp_path):
    """Export names each field that transformers has no place for, and writes nothing."""
    build(llama(vocab_size=SIZE), tmp_path / "text")
    add_text(tmp_path / "text", image=False, pad=False)
    build(clip(), tmp_path / "seen")
    odd = Options(projector="linear", overrides=("use_im_start_end=true",))
    api.import_checkpoint([tmp_path / "text", tmp_path / "seen"], tmp_path / "neva", options=odd)
    with pytest.raises(ValueError, match=r"cannot hold projector='linear', use_im_start_end=True"):
        api.export_checkpoint(tmp_path / "neva", tmp_path / "out")
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.tmp").exists()


@pytest.mark.parametrize(
    "config",
    [
        tf.Dinov2Config(hidden_size=32, num_hidden_layers=3, num_attention_heads=2, image_size=28, patch_size=14, mlp_ratio=2),
        tf.Siglip2VisionConfig(hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=44, patch_size=14, num_patches=16),
    ],
)
def test_transformers_encoders(config, tmp_path):
    """An encoder that we do not compute runs as transformers' own, in a VLM, with its processor's size, mean, std and filter."""
    theirs = build(config, tmp_path / "seen")
    side = 28 if config.model_type == "dinov2" else 56
    settings = {"do_resize": True, "do_center_crop": False, "do_rescale": True, "do_normalize": True,
                "size": {"height": side, "width": side}, "image_mean": [0.4, 0.5, 0.6],
                "image_std": [0.2, 0.3, 0.4], "resample": 2, "rescale_factor": 1 / 255}  # fmt: skip
    (tmp_path / "seen" / "preprocessor_config.json").write_text(json.dumps(settings))
    build(llama(vocab_size=SIZE), tmp_path / "text")
    add_text(tmp_path / "text", image=False, pad=False)
    api.import_checkpoint([tmp_path / "text", tmp_path / "seen"], tmp_path / "neva")
    model = load(tmp_path / "neva").model
    c = model.config
    assert (c.vision.backend, c.vision.image, c.vision.mean, c.image.aspect, c.image.resample) == ("hf", side, (0.4, 0.5, 0.6), "square", "bilinear")
    tiles = torch.randint(0, 256, (3, 3, side, side), dtype=torch.uint8)
    with torch.no_grad():
        from neva.models.hf_vision import _cut
        from neva.models.vit import normalise

        pixels = normalise(tiles, c.vision.mean, c.vision.std)
        given = {"pixel_values": pixels} if config.model_type == "dinov2" else _cut(pixels, 14)
        hidden = theirs(**given, output_hidden_states=True).hidden_states[-2]
        assert (model.vision(tiles) - hidden[:, hidden.shape[1] - c.vision.patches :]).abs().max() < 1e-5
        assert model.features(tiles[:0]).shape == (0, c.tokens_per_tile, 48)
    api.export_checkpoint(tmp_path / "neva", tmp_path / "out", options=ExportOptions(part="vision"))
    assert same_bits(on_disk(tmp_path / "seen"), on_disk(tmp_path / "out"))
