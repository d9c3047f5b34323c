"""Settings of processors and configs, and numbers, that an import takes or refuses and names.

The oracle is `from_pretrained` of the same folder.
"""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
import transformers as tf
from PIL import Image
from torch import Tensor

from neva import api
from neva.checkpoint import gate as gates
from neva.checkpoint import hf, parity
from neva.checkpoint.hf import Options
from neva.checkpoint.manifest import CheckpointError
from neva.data.image import to_tiles
from neva.infer.generate import load
from neva.models import hf_vlm
from neva.models.vit import normalise
from tests.families import build, clip, llama, on_disk
from tests.oracle.test_convert import whole
from tests.oracle.test_convert_edges import change
from tests.oracle.test_convert_gate import one_file, original, same_model, store_config
from tests.oracle.test_nvlm import PINPOINTS, following

# Processors.


def settings_of(folder: Path) -> dict:
    """The image processor's file, which lies beside the model alone from now on."""
    file = folder / "processor_config.json"
    settings = json.loads(file.read_text())["image_processor"]
    file.unlink()
    return settings


def set_processor(folder: Path, **fields) -> None:
    settings = {**settings_of(folder), **fields}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))


def pixels_of(folder: Path, picture: Image.Image) -> Tensor:
    """What transformers makes of a picture by a folder's processor."""
    return tf.AutoImageProcessor.from_pretrained(folder)(picture, return_tensors="pt").pixel_values


@pytest.mark.parametrize("filter_", ["bilinear", "lanczos"])
@pytest.mark.parametrize("made", [whole, following])
def test_a_processor_with_another_filter(made, filter_, gate, tmp_path):
    """It is taken: the export's pixels are those of the folder's own processor."""
    made(tmp_path / "hf")
    set_processor(tmp_path / "hf", resample={"bilinear": 2, "lanczos": 1}[filter_])
    place = gate.come_in(tmp_path / "hf", to=tmp_path / "neva")
    assert store_config(place)["image"]["resample"] == filter_
    out = gate.go_out(place, tmp_path / "out")
    picture = Image.effect_noise((61, 33), 90).convert("RGB")
    ours, theirs = (pixels_of(folder, picture) for folder in (out, tmp_path / "hf"))
    assert torch.equal(ours, theirs)
    loaded = load(place)
    tiles = to_tiles(picture, loaded.encoder.layout)
    vision = loaded.model.config.vision
    mine = normalise(tiles, vision.mean, vision.std)
    assert (mine - theirs.reshape(mine.shape)).abs().max() < 1e-5
    assert not gate.checked or any("Pixels: as transformers'" in line for line in gate.said)


VIEWS = [[[28, 56]], [[56, 28], [28, 56], [56, 56]], [[28, 84], [84, 28]]]


@pytest.mark.parametrize("views", VIEWS)
def test_a_processor_with_other_pinpoints_is_refused(views, gate, tmp_path):
    """Images would be cut by one list and their features joined by the other."""
    following(tmp_path / "hf")
    set_processor(tmp_path / "hf", image_grid_pinpoints=views)
    said = "its processor says image_grid_pinpoints=.* config.json"
    with pytest.raises(CheckpointError, match=said):
        gate.come_in(tmp_path / "hf", to=tmp_path / "neva")


def test_a_processor_that_cuts_images_for_a_llava_is_refused(gate, tmp_path):
    """A llava takes one view of an image."""
    whole(tmp_path / "hf")
    kind = "LlavaNextImageProcessor"
    set_processor(tmp_path / "hf", image_processor_type=kind, image_grid_pinpoints=PINPOINTS)
    with pytest.raises(CheckpointError, match="cuts an image into several views"):
        gate.come_in(tmp_path / "hf", to=tmp_path / "neva")


def test_the_filter_of_an_encoders_processor_is_its_llavas(gate, tmp_path):
    """LLaVA pads an image itself, and has the encoder's processor resize it."""
    llava, seen = original(tmp_path)
    size = {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}}
    tf.CLIPImageProcessorPil(**size, resample=2).save_pretrained(seen)
    place = gate.come_in(llava, seen, to=tmp_path / "neva")
    image = store_config(place)["image"]
    assert (image["aspect"], image["resample"]) == ("pad", "bilinear")


@pytest.mark.parametrize("made", [whole, following, "clip"])
@pytest.mark.parametrize("pieces", [False, True])
def test_pixels_that_differ_are_refused_at_import(made, pieces, tmp_path, monkeypatch):
    """A filter that is read wrongly is found, with the whole gate and in pieces."""
    monkeypatch.setattr(parity, "fits", lambda parameters: not pieces)
    folder = tmp_path / "hf"
    if made == "clip":
        build(clip(), folder)
        size = {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}}
        tf.CLIPImageProcessorPil(**size).save_pretrained(folder)
    else:
        made(folder)
    read = hf_vlm.image_config

    def wrongly(processor, file):
        image, pixels = read(processor, file)
        return dataclasses.replace(image, resample="bilinear"), pixels

    monkeypatch.setattr(hf_vlm, "image_config", wrongly)
    with pytest.raises(CheckpointError, match="image processor gives pixels that differ by"):
        api.import_checkpoint([folder], tmp_path / "neva", say=str)
    assert not list(tmp_path.glob("neva*"))
    api.import_checkpoint([folder], tmp_path / "neva", parity=False, say=str)


# Numbers that a dtype cannot hold, and what else a refusal names.


def large(folder: Path, name: str) -> None:
    """A folder with a tensor that fp16 cannot hold."""
    state = on_disk(folder)
    state[name][..., 0] = 1e5
    one_file(folder, state)


@pytest.mark.parametrize(
    "name",
    ["model.layers.1.mlp.up_proj.weight", "model.norm.weight", "lm_head.weight"],
)
def test_a_dtype_that_cannot_hold_a_weight_is_refused(name, gate, tmp_path):
    """The tensor and the largest number are named on the way in and on the way out."""
    build(llama(), tmp_path / "hf")
    large(tmp_path / "hf", name)
    with pytest.raises(CheckpointError, match=f"'{name}' has values up to 1e.05, but float16"):
        gate.come_in(tmp_path / "hf", to=tmp_path / "neva", dtype="fp16")
    assert not list(tmp_path.glob("neva*"))
    place = gate.come_in(tmp_path / "hf", to=tmp_path / "neva", dtype="bf16")
    with pytest.raises(CheckpointError, match="has values up to .*e.0[45], but float16"):
        gate.go_out(place, tmp_path / "out", dtype="fp16")
    assert not list(tmp_path.glob("out*"))


def test_a_dtype_that_cannot_hold_what_the_model_does_not_compute_is_refused(gate, tmp_path):
    """An encoder's last layers, which export gives back, are weights as others are."""
    build(clip(), tmp_path / "hf")
    end = "layers.2.mlp.fc1.weight"
    large(tmp_path / "hf", next(name for name in on_disk(tmp_path / "hf") if name.endswith(end)))
    said = "layers.2.mlp.fc1.weight' has values up to 1e.05, but float16"
    with pytest.raises(CheckpointError, match=said):
        gate.come_in(tmp_path / "hf", to=tmp_path / "neva", dtype="fp16")
    place = gate.come_in(tmp_path / "hf", to=tmp_path / "neva")
    with pytest.raises(CheckpointError, match=said):
        gate.go_out(place, tmp_path / "out", dtype="fp16")


@pytest.mark.parametrize("whole_models", [True, False])
@pytest.mark.parametrize(
    ("ours", "part"),
    [
        ("decoder.embed.weight", "embedding"),
        ("head.weight", "head"),
        ("projector.0.bias", "projected features"),
        ("image_newline", "image_newline|logits with an image"),
    ],
)
def test_a_refusal_names_the_part_that_differs(ours, part, whole_models, tmp_path, monkeypatch):
    """Embedding, head, projector and newline are compared in pieces as well as whole."""
    monkeypatch.setattr(parity, "fits", lambda parameters: whole_models)
    following(tmp_path / "hf")
    source = hf.read_source(tmp_path / "hf")
    chosen = hf.plan([source], Options())

    def spoilt(name: str) -> Tensor:
        return chosen.read(name) + (name == ours)

    right = gates.compare([source], chosen.model, chosen.vision, chosen.read)
    parity.check(right, "it")
    wrong = gates.compare([source], chosen.model, chosen.vision, spoilt)
    with pytest.raises(CheckpointError, match=rf"against transformers .*({part}) differs by"):
        parity.check(wrong, "it")

    def infinite(name: str) -> Tensor:
        return chosen.read(name) / 0

    nothing = gates.compare([source], chosen.model, chosen.vision, infinite)
    with pytest.raises(CheckpointError, match="embedding is not finite"):
        parity.check(nothing, "it")


@pytest.mark.parametrize("field", ["vision_feature_layer", "image_grid_pinpoints"])
def test_settings_that_are_read_otherwise_are_refused_in_pieces(field, tmp_path, monkeypatch):
    """Without a whole model to compare with, transformers' own reading of config.json is asked."""
    monkeypatch.setattr(parity, "fits", lambda parameters: False)
    following(tmp_path / "hf")
    read = hf_vlm.llava_config

    def wrongly(config):
        model = read(config)
        if field == "vision_feature_layer":
            vision = dataclasses.replace(model.vision, select_layer=-1)
            return dataclasses.replace(model, vision=vision)
        views = ((28, 56), (56, 28))
        return dataclasses.replace(model, image=dataclasses.replace(model.image, pinpoints=views))

    monkeypatch.setattr(hf_vlm, "llava_config", wrongly)
    (tmp_path / "hf" / "processor_config.json").unlink()
    with pytest.raises(CheckpointError, match=f"transformers reads {field}="):
        api.import_checkpoint([tmp_path / "hf"], tmp_path / "neva", say=str)


# Settings that say what every model does.


def test_pretraining_tp_is_no_reason_to_refuse(gate, tmp_path):
    """It split matrices of a sum in training, and transformers does not read it any more."""
    build(llama(), tmp_path / "hf")
    change(tmp_path / "hf", pretraining_tp=2)
    out = gate.there_and_back(tmp_path / "hf")
    assert same_model(tf.LlamaForCausalLM, tmp_path / "hf", out)


@pytest.mark.parametrize("made", [whole, following])
@pytest.mark.parametrize("layer", [[-2], [-1], [1]])
def test_one_layer_in_a_list_is_that_layer(layer, made, gate, tmp_path):
    """`vision_feature_layer=[-2]` is -2, whole and in pieces."""
    made(tmp_path / "hf")
    change(tmp_path / "hf", vision_feature_layer=layer)
    place = gate.come_in(tmp_path / "hf", to=tmp_path / "neva")
    assert store_config(place)["vision"]["select_layer"] == layer[0]


@pytest.mark.parametrize("layer", [[-2, -1], [], "-2"])
def test_several_layers_are_refused(layer, gate, tmp_path):
    whole(tmp_path / "hf")
    change(tmp_path / "hf", vision_feature_layer=layer)
    with pytest.raises(CheckpointError, match="one layer can be read, not several joined"):
        gate.come_in(tmp_path / "hf", to=tmp_path / "neva")
