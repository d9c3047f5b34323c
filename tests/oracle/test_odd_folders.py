"""What a new user's own folders hold: adapters, wrapped names, DINOv2 as it is published, LLaVA 1.6
in its own layout, tokens that two files count otherwise, checkpoints that describe no model."""

import json
from pathlib import Path

import pytest
import torch
import transformers as tf
import yaml
from PIL import Image
from safetensors.torch import save_file

from neva import api
from neva.checkpoint.hf import Options
from neva.checkpoint.inspect import inspect
from neva.checkpoint.manifest import CheckpointError
from neva.checkpoint.target import ExportOptions
from neva.data.image import to_tiles
from neva.data.tokenizer import load_tokenizer
from neva.infer.generate import load
from neva.models.hf_vlm import image_config, processor_json
from neva.models.vit import normalise
from neva.recipes import inits
from tests.families import build, clip, llama, on_disk, pair
from tests.hostile import reseal
from tests.nemo import write
from tests.oracle.test_convert import SIZE, TOKENIZER, add_text, original, whole

torch.set_num_threads(1)


def come_in(*sources: Path, to: Path, say=str, **options) -> Path:
    return api.import_checkpoint(sources, to, options=Options(**options), say=say)


def refused(*sources: Path, to: Path) -> str:
    with pytest.raises(ValueError) as caught:
        come_in(*sources, to=to)
    assert "\n" not in str(caught.value) and not to.exists()
    return str(caught.value)


def change(path: Path, **fields) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


# Adapters and wrappers.


def test_an_adapter_of_llavas(tmp_path: Path) -> None:
    """Its projector was trained beside it; peft alone would lose that."""
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "adapter_config.json").write_text("{}")
    (tmp_path / "lora" / "config.json").write_text(json.dumps({"model_type": "llava_llama", "mm_vision_tower": "x"}))
    save_file({"x": torch.ones(1)}, tmp_path / "lora" / "adapter_model.safetensors")
    assert "merge_and_unload" in refused(tmp_path / "lora", to=tmp_path / "neva")
    torch.save({"base_model.model.model.mm_projector.0.weight": torch.ones(1)}, tmp_path / "lora" / "non_lora_trainables.bin")
    said = refused(tmp_path / "lora", to=tmp_path / "neva")
    assert "scripts/merge_lora_weights.py" in said and "peft alone would lose the projector" in said


WRAPPED = {
    "compiled": (lambda name: f"_orig_mod.{name}", "'_orig_mod' in them", "torch.compile"),
    "compiled blocks": (lambda name: name.replace("layers.1.", "layers.1._orig_mod."), "_orig_mod", "torch.compile"),
    "peft": (lambda name: f"base_model.model.{name}", "'base_model.model' in them", "merge_and_unload"),
    "peft, in part": (lambda name: name.replace("q_proj.", "q_proj.base_layer."), "base_layer", "merge_and_unload"),
    "data parallel": (lambda name: f"module.{name}", "'module' in them", "save model.module"),
    "fsdp": (lambda name: name.replace("layers.0.", "layers.0._fsdp_wrapped_module."), "_fsdp_wrapped_module", "FSDP"),
}


@pytest.mark.parametrize("name", WRAPPED)
def test_names_of_a_wrapper_are_named(name: str, tmp_path: Path) -> None:
    """A model that was saved inside a wrapper: which, and what to do, in place of a list of
    names."""
    rename, what, fix = WRAPPED[name]
    build(llama(), tmp_path / "hf")
    state = {rename(one): tensor for one, tensor in on_disk(tmp_path / "hf").items()}
    save_file(state, tmp_path / "hf" / "model.safetensors", metadata={"format": "pt"})
    said = refused(tmp_path / "hf", to=tmp_path / "neva")
    assert what in said and fix.lower() in said.lower()


# DINOv2 as it is published: resize to 256, cut out 224.

DINO = {
    "crop_size": {"height": 28, "width": 28}, "do_center_crop": True, "do_convert_rgb": True, "do_normalize": True, "do_rescale": True,
    "do_resize": True, "image_mean": [0.485, 0.456, 0.406], "image_processor_type": "BitImageProcessor",
    "image_std": [0.229, 0.224, 0.225], "resample": 3, "rescale_factor": 0.00392156862745098, "size": {"shortest_edge": 32},
}  # fmt: skip
"""facebook/dinov2-small's preprocessor_config.json, an eighth as large."""


@pytest.mark.parametrize("size", [(50, 37), (20, 61), (28, 28), (32, 33), (333, 41)])
@pytest.mark.parametrize(("short", "cut"), [(32, 28), (256, 224), (438, 384), (29, 28)])
def test_pixels_are_those_of_bit_image_processor(short: int, cut: int, size: tuple[int, int]) -> None:
    """uint8 pixels equal bit for bit, normalised ones to rounding; and what we write reads back."""
    from neva.models.presets import VLMS

    described = {**DINO, "size": {"shortest_edge": short}, "crop_size": {"height": cut, "width": cut}}
    image, pixels = image_config(described)
    config = VLMS["llava-tiny"]
    vision = config.vision.__class__(**{**config.vision.__dict__, **pixels, "patch": 14 if cut % 14 == 0 else 16})
    config = config.__class__(**{**config.__dict__, "vision": vision, "image": image})
    picture = Image.effect_noise(size, 90).convert("RGB")
    theirs = tf.BitImageProcessorPil(**{k: v for k, v in described.items() if k != "image_processor_type"})
    plain = theirs(picture, do_rescale=False, do_normalize=False, return_tensors="pt")["pixel_values"]
    tiles = to_tiles(picture, config.layout)
    assert torch.equal(tiles, torch.as_tensor(plain).to(torch.uint8))
    given = torch.as_tensor(theirs(picture, return_tensors="pt")["pixel_values"])
    assert (normalise(tiles, vision.mean, vision.std) - given).abs().max() < 1e-5
    assert image_config(processor_json(image, vision)) == (image, pixels)


def test_dinov2_as_it_is_published(tmp_path: Path) -> None:
    """Its config says another side than its processor, which counts; pixels are compared at
    import."""
    build(tf.Dinov2Config(hidden_size=32, num_hidden_layers=3, num_attention_heads=2, image_size=70, patch_size=14), tmp_path / "seen")
    (tmp_path / "seen" / "preprocessor_config.json").write_text(json.dumps(DINO))
    build(llama(vocab_size=SIZE), tmp_path / "text")
    add_text(tmp_path / "text", image=False, pad=False)
    said: list[str] = []
    come_in(tmp_path / "text", tmp_path / "seen", to=tmp_path / "neva", say=said.append)
    assert any("Pixels: as transformers' BitImageProcessor" in line for line in said)
    config = load(tmp_path / "neva").model.config
    assert config.vision is not None
    assert (config.vision.image, config.image.aspect, config.image.crop_share) == (28, "crop", 0.875)
    out = api.export_checkpoint(tmp_path / "neva", tmp_path / "out", say=str)
    written = json.loads((out / "preprocessor_config.json").read_text())
    assert written["size"] == {"shortest_edge": 32} and written["crop_size"] == {"height": 28, "width": 28}
    larger = come_in(tmp_path / "text", tmp_path / "seen", to=tmp_path / "large", overrides=("vision.image=56",))
    out = api.export_checkpoint(larger, tmp_path / "out56", say=str)
    assert json.loads((out / "preprocessor_config.json").read_text())["size"] == {"shortest_edge": 64}


# LLaVA's own layout.


@pytest.mark.parametrize(
    ("fields", "names"),
    [
        ({}, "llava-v1.6-…-hf"),
        ({"hidden_size": 4096}, "llava-v1.6-vicuna-7b-hf"),
        ({"hidden_size": 5120}, "llava-v1.6-vicuna-13b-hf"),
        ({"model_type": "llava_mistral", "architectures": ["LlavaMistralForCausalLM"], "hidden_size": 4096}, "llava-v1.6-mistral-7b-hf"),
    ],
)
def test_llava_next_in_its_own_layout_says_what_to_use(fields: dict, names: str, tmp_path: Path) -> None:
    original(tmp_path)
    more = {"image_aspect_ratio": "anyres", "mm_patch_merge_type": "spatial_unpad", "image_grid_pinpoints": [[336, 672]]}
    change(tmp_path / "llava" / "config.json", **more, **fields)
    said = refused(tmp_path / "llava", tmp_path / "clip", to=tmp_path / "neva")
    assert f"hf:llava-hf/{names}" in said and "convert_llava_next_weights_to_hf.py" in said


def test_a_linear_projector_of_llavas_own_layout(tmp_path: Path) -> None:
    """LLaVA-7b-v0's, whose one layer has no number."""
    original(tmp_path)
    file = tmp_path / "llava" / "pytorch_model.bin"
    state = torch.load(file, weights_only=True)
    for name in [name for name in state if "mm_projector.2" in name]:
        del state[name]
    for part in ("weight", "bias"):
        state[f"model.mm_projector.{part}"] = state.pop(f"model.mm_projector.0.{part}")
    torch.save(state, file)
    change(tmp_path / "llava" / "config.json", mm_projector_type="linear")
    place = come_in(tmp_path / "llava", tmp_path / "clip", to=tmp_path / "neva")
    assert inspect(place)["projector"] == "linear"


# Tokens.


def test_an_image_token_that_is_another_of_its_tokenizer(tmp_path: Path) -> None:
    """It is said; an export has the tokenizer's."""
    whole(tmp_path / "hf")
    said: list[str] = []
    come_in(tmp_path / "hf", to=tmp_path / "right", say=said.append)
    assert not [line for line in said if "image_token_index" in line]
    change(tmp_path / "hf" / "config.json", image_token_index=7, image_token_id=7)
    come_in(tmp_path / "hf", to=tmp_path / "neva", say=said.append)
    (line,) = [line for line in said if "image_token_index" in line]
    assert line.startswith("warning: ") and f"image_token_index=7, but <image> is token {SIZE + 1} of its tokenizer" in line
    out = api.export_checkpoint(tmp_path / "neva", tmp_path / "out", say=str)
    assert json.loads((out / "config.json").read_text())["image_token_index"] == SIZE + 1


WITHOUT_END = {"Regex": "(.*.*.*.*.*.*.*.*)*[^\\s\\S]"}
"""A pattern that tries more ways than there are: the library panics."""
REPLACE = {"type": "Replace", "pattern": WITHOUT_END, "content": "x"}
BYTES = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}


@pytest.mark.parametrize("decoders", [[BYTES, REPLACE], [{"type": "Fuse"}, REPLACE]], ids=["bytes", "fused"])
def test_decoders_that_panic_are_a_line(decoders: list[dict], tmp_path: Path) -> None:
    decoder = {"type": "Sequence", "decoders": decoders}
    described = {**json.loads(TOKENIZER.read_text()), "decoder": decoder}
    (tmp_path / "tokenizer.json").write_text(json.dumps(described))
    tokenizer = load_tokenizer(tmp_path)
    ids = tokenizer.encode("What is the digit that you see here in the picture? " * 4)
    with pytest.raises(ValueError, match="the tokenizer cannot put tokens together to a text .*use the model's own tokenizer.json") as caught:
        tokenizer.decode(ids)
    assert "\n" not in str(caught.value)


# Checkpoints and archives.


@pytest.mark.parametrize("described", [{"step": 0}, {"step": 0, "model": None}, {"vision": 7}])
def test_a_checkpoint_that_describes_no_model(described: dict, tmp_path: Path) -> None:
    """Sealed with a manifest of its own; whoever reads it says the same."""
    build(llama(vocab_size=SIZE), tmp_path / "hf")
    add_text(tmp_path / "hf", image=False, pad=False)
    place = api.import_checkpoint([tmp_path / "hf"], tmp_path / "neva", parity=False, say=str)
    (place / "neva.yaml").write_text(yaml.safe_dump(described))
    reseal(place)
    out = tmp_path / "out"
    readers = (
        lambda: inspect(place),
        lambda: inits.look(place),
        lambda: load(place),
        lambda: api.export_checkpoint(place, out, options=ExportOptions(), say=str),
    )
    for read in readers:
        with pytest.raises(CheckpointError, match=r"neva\.yaml describes no model") as caught:
            read()
        assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob("out*"))


def test_an_error_names_the_archive_and_not_where_it_was_unpacked(tmp_path: Path) -> None:
    """A .nemo without weights, one whose weights are damaged; and the origin of a sound one."""
    import tarfile

    both = pair(llama(), tmp_path / "hf")
    decoder = both.ours.config.decoder
    sound = write(tmp_path / "model.nemo", dict(both.ours.named_parameters()), decoder, core=True)
    for name, keep in (("hollow", None), ("broken", b"not a torch file")):
        with tarfile.open(sound) as archive, tarfile.open(tmp_path / f"{name}.nemo", "w") as made:
            for member in archive:
                if not member.name.endswith(".ckpt"):
                    made.addfile(member, archive.extractfile(member))
                elif keep:
                    import io

                    member.size = len(keep)
                    made.addfile(member, io.BytesIO(keep))
        said = refused(tmp_path / f"{name}.nemo", to=tmp_path / "neva")
        assert str(tmp_path / f"{name}.nemo") in said and ".unpacked" not in said
    said = []
    place = api.import_checkpoint([sound], tmp_path / "neva", say=said.append)
    assert f"decoder from {sound} (nemo)" in inspect(place)["origin"]
    assert not [line for line in said if ".unpacked" in line]


@pytest.mark.parametrize(("kind", "balance"), [(None, 0.03), ("aux_loss", 0.03), ("none", 0.0)])
def test_how_nemo_balances_experts(kind: str | None, balance: float) -> None:
    from neva.checkpoint.nemo_config import decoder_config

    described = {
        "num_layers": 3, "hidden_size": 48, "num_attention_heads": 4, "encoder_seq_length": 128, "num_moe_experts": 4,
        "moe_aux_loss_coeff": 0.02, "moe_router_topk": 2, "moe_router_load_balancing_type": kind,
        "activation": "fast-swiglu", "bias": False,
    }  # fmt: skip
    assert decoder_config(described).balance == pytest.approx(balance)
    with pytest.raises(ValueError, match="moe_router_load_balancing_type='sinkhorn', which neva does not compute"):
        decoder_config({**described, "moe_router_load_balancing_type": "sinkhorn"})
    dense = {**described, "num_moe_experts": None, "moe_router_load_balancing_type": "sinkhorn"}
    assert decoder_config(dense).experts == 0


def test_a_model_of_text_is_said_in_a_line(tmp_path: Path) -> None:
    """init.model of a decoder checkpoint in a recipe that sees: no list of image settings."""
    build(llama(vocab_size=390, max_position_embeddings=512), tmp_path / "hf")
    add_text(tmp_path / "hf", image=False, pad=False)
    build(clip(), tmp_path / "seen")
    place = api.import_checkpoint([tmp_path / "hf"], tmp_path / "neva", parity=False, say=str)
    said: list[str] = []
    api.recipe("llava-tiny/finetune", [f"init.model={place}"], say=said.append)
    assert not [line for line in said if "projector=none" in line]
    assert [line for line in said if "init.model is a model of text, which trains without images" in line]
    said.clear()
    api.recipe("llava-tiny/finetune", [f"init.model={place}", "model.vision=null", "model.projector=none"], say=said.append)
    assert not [line for line in said if "image" in line]
