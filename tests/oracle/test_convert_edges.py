"""Folders that are a little other than usual: old buffers, mixed dtypes, odd processors, cut-off and refused conversions, and what is no model."""

import json
import shutil
import warnings
from pathlib import Path

import pytest
import tokenizers
import torch
import transformers as tf
from safetensors.torch import save_file

from neva import api
from neva.checkpoint import gate, hf, index, stream
from neva.checkpoint.hf import Options
from neva.checkpoint.inspect import inspect
from neva.checkpoint.manifest import CheckpointError
from neva.checkpoint.parity import Difference
from neva.checkpoint.target import ExportOptions
from neva.models.vlm import fresh
from tests.families import DECODERS, build, clip, llama, llava, on_disk, pair, siglip
from tests.nemo import write
from tests.oracle.test_convert import SIZE, add_text, quiet_load, whole

torch.set_num_threads(1)


def quiet(text: str) -> None:
    """Says nothing."""


def come_in(*sources: Path, to: Path, parity: bool = True, **options) -> Path:
    return api.import_checkpoint(sources, to, options=Options(**options), parity=parity, say=quiet)


def go_out(checkpoint: Path, to: Path, **options) -> Path:
    return api.export_checkpoint(checkpoint, to, options=ExportOptions(**options), say=quiet)


def change(folder: Path, file: str = "config.json", /, **fields) -> None:
    """Fields of a JSON file; None takes one away."""
    path = folder / file
    known = {**(json.loads(path.read_text()) if path.exists() else {}), **fields}
    path.write_text(json.dumps({name: value for name, value in known.items() if value is not None}))


def config_of(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


def parts(folder: Path, vision=clip) -> tuple[Path, Path]:
    """A decoder with its tokenizer, and an encoder."""
    build(llama(vocab_size=SIZE), folder / "text")
    add_text(folder / "text", image=False, pad=False)
    build(vision(), folder / "seen")
    return folder / "text", folder / "seen"


def warned(caplog) -> list[str]:
    """What transformers said."""
    return [record.getMessage() for record in caplog.records if record.levelname in ("WARNING", "ERROR")]


# Cut off, and refused.


class Killed(BaseException):
    """Nothing catches it, as a kill."""


def kill(monkeypatch) -> None:
    """The next conversion is killed when its weights are written."""

    def compare(*args, **more):
        raise Killed

    monkeypatch.setattr(gate, "compare", compare)


def test_a_cut_off_import_with_another_seed_starts_over(tmp_path, monkeypatch):
    """The new projector is that of the seed that was asked for last; what does not matter to the weights does not start them over."""
    sources = parts(tmp_path)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill(patch)
        come_in(*sources, to=tmp_path / "neva", seed=1)
    assert (tmp_path / "neva.tmp" / "weights" / ".metadata").exists()
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill(patch)
        patch.setattr(stream, "_write_all", None)  # not called again
        come_in(*sources, to=tmp_path / "neva", seed=1, template="plain")
    (tmp_path / "neva.tmp" / "source" / "decoder" / "generation_config.json").write_text("{}")  # of a source that had one
    (sources[0] / "generation_config.json").unlink(missing_ok=True)
    come_in(*sources, to=tmp_path / "neva", seed=2)
    found = index.read(tmp_path / "neva" / "weights", "projector.0.weight")
    assert torch.equal(found, fresh("projector.0.weight", found.shape, 2))
    assert not (tmp_path / "neva" / "source" / "decoder" / "generation_config.json").exists()


def test_a_cut_off_import_of_one_part_does_not_look_at_the_seed(tmp_path, monkeypatch):
    """Where nothing is drawn another seed goes on from what is there."""
    build(llama(), tmp_path / "hf")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill(patch)
        come_in(tmp_path / "hf", to=tmp_path / "neva", seed=1)
    monkeypatch.setattr(stream, "_write_all", None)
    assert come_in(tmp_path / "hf", to=tmp_path / "neva", seed=2).exists()


def archive(folder: Path, seed: int) -> Path:
    """A .nemo of a decoder."""
    torch.manual_seed(seed)
    both = pair(llama(), folder / f"hf{seed}")
    tensors = {name: parameter.detach() + 0.01 * seed for name, parameter in both.ours.named_parameters()}
    return write(folder / "model.nemo", tensors, both.ours.config.decoder, core=True)


def test_another_archive_of_the_same_name_is_unpacked_and_imported_anew(tmp_path, monkeypatch):
    """Neither what a killed import had unpacked nor what lies in the cache is taken for the archive that is there now."""
    monkeypatch.setenv("NEVA_CACHE", str(tmp_path / "cache"))
    path = archive(tmp_path, 1)
    first = api.import_checkpoint([path], say=quiet)
    assert api.import_checkpoint([path], say=quiet) == first
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(hf, "write", lambda *args, **more: (_ for _ in ()).throw(Killed))
        come_in(path, to=tmp_path / "neva")
    assert (tmp_path / "neva.unpacked").exists()
    path = archive(tmp_path, 2)
    second = api.import_checkpoint([path], say=quiet)
    come_in(path, to=tmp_path / "neva")
    old, new, cached = (index.read(place / "weights", "decoder.embed.weight") for place in (first, tmp_path / "neva", second))
    assert torch.equal(new, cached) and not torch.equal(old, new) and not (tmp_path / "neva.unpacked").exists()


def wrong(*args, **more) -> list[Difference]:
    return [Difference(part="decoder logits", largest=1.0, magnitude=1.0)]


def test_a_refusal_leaves_nothing(tmp_path, monkeypatch):
    """What the gate refuses, or is found damaged while it is copied, is removed; what a kill leaves stays, and an early error does not touch it."""
    build(llama(), tmp_path / "hf")
    with monkeypatch.context() as patch:
        patch.setattr(gate, "compare", wrong)
        with pytest.raises(CheckpointError, match="is not published"):
            come_in(tmp_path / "hf", to=tmp_path / "neva")
        assert not list(tmp_path.glob("neva*"))
    come_in(tmp_path / "hf", to=tmp_path / "neva")
    with monkeypatch.context() as patch:
        patch.setattr(gate, "compare", wrong)
        with pytest.raises(CheckpointError, match="is not published"):
            go_out(tmp_path / "neva", tmp_path / "out")
        assert not list(tmp_path.glob("out*"))
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill(patch)
        go_out(tmp_path / "neva", tmp_path / "out")
    assert (tmp_path / "out.tmp" / "model.safetensors").exists()
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill(patch)
        come_in(tmp_path / "hf", to=tmp_path / "again")
    with pytest.raises(ValueError, match="no_such"):
        come_in(tmp_path / "hf", to=tmp_path / "again", overrides=("decoder.no_such=1",))
    assert (tmp_path / "again.tmp" / "weights" / ".metadata").exists()
    state = on_disk(tmp_path / "hf")
    state["lm_head.weight"][0] = float("nan")
    save_file(state, tmp_path / "hf" / "model.safetensors")
    with pytest.raises(CheckpointError, match="not finite"):
        come_in(tmp_path / "hf", to=tmp_path / "again")
    assert not list(tmp_path.glob("again*"))


@pytest.mark.parametrize("out", [".", ".."])
def test_a_folder_that_is_there_is_no_place_for_a_model(out, tmp_path, monkeypatch):
    """--out . is refused as any folder that exists."""
    build(llama(), tmp_path / "hf")
    come_in(tmp_path / "hf", to=tmp_path / "neva")
    monkeypatch.chdir(tmp_path / "hf")
    with pytest.raises(ValueError, match="exists already; name another folder with --out"):
        come_in(tmp_path / "hf", to=Path(out))
    with pytest.raises(ValueError, match="exists already; name another folder with --out"):
        go_out(tmp_path / "neva", Path(out))


# Tensors.


def old_llava(folder: Path, *, cut: bool) -> None:
    """A LLaVA as transformers of 2023 wrote it, buffers among its tensors; `cut` takes away the encoder's layer that nothing reads."""
    whole(folder)
    state = {name: tensor for name, tensor in on_disk(folder).items() if not (cut and "vision_tower" in name and "encoder.layers.2." in name)}
    model = "language_model.model" if any(name.startswith("language_model.model.") for name in state) else "model.language_model"
    state |= {f"{model}.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(6) for i in range(3)}
    tower = next(name.split("embeddings.")[0] for name in state if "patch_embedding" in name)
    state[f"{tower}embeddings.position_ids"] = torch.arange(300)[None]  # beyond what bf16 counts to
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("cut", [False, True])
def test_old_buffers(cut, tmp_path):
    """Frequencies of rotary positions are dropped, whether import kept them (as it did once) or not; they say nothing of the encoder's layers."""
    old_llava(tmp_path / "hf", cut=cut)
    come_in(tmp_path / "hf", to=tmp_path / "neva")
    kept = on_disk(tmp_path / "neva" / "source" / "vlm")
    assert not any("inv_freq" in name for name in kept)
    save_file(kept | {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(6) for i in range(3)},
              tmp_path / "neva" / "source" / "vlm" / "unused.safetensors")  # fmt: skip
    (tmp_path / "neva" / "manifest.json").unlink()
    described = json.loads((tmp_path / "neva" / "source" / "vlm" / "config.json").read_text())
    assert described["vision_config"]["num_hidden_layers"] == 3
    from neva.checkpoint.manifest import Manifest, digests, listing, serialise

    files = digests(tmp_path / "neva", listing(tmp_path / "neva"))
    fields = {"step": 0, "files": {name: vars(file) for name, file in sorted(files.items())}, "format": Manifest(step=0, files={}).format}
    (tmp_path / "neva" / "manifest.json").write_bytes(serialise(fields))
    out = go_out(tmp_path / "neva", tmp_path / "out")
    before, after = on_disk(tmp_path / "hf"), on_disk(out)
    assert after.keys() == {name for name in before if "inv_freq" not in name}
    model = quiet_load(tf.LlavaForConditionalGeneration, out)
    assert model.config.vision_config.num_hidden_layers == 3 - cut and model.config.vision_feature_layer == (-1 if cut else -2)


def test_whole_numbers_are_not_cast(tmp_path):
    """--dtype is for floating-point numbers; position_ids stay what they are, on the way in and on the way out."""
    old_llava(tmp_path / "hf", cut=False)
    come_in(tmp_path / "hf", to=tmp_path / "neva", dtype="bf16")
    for options in ({}, {"dtype": "fp16"}):
        written = on_disk(go_out(tmp_path / "neva", tmp_path / f"out{len(options)}", **options))
        (ids,) = (tensor for name, tensor in written.items() if "position_ids" in name)
        assert torch.equal(ids, torch.arange(300)[None])
        assert {tensor.dtype for tensor in written.values()} == {torch.int64, torch.float16 if options else torch.bfloat16}


# dtypes in config.json.


def dtype_of(folder: Path, kind) -> torch.dtype:
    """What transformers takes it for, without a warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return next(kind.from_pretrained(folder, dtype="auto").parameters()).dtype


@pytest.mark.parametrize("spelled", ["dtype", "torch_dtype", ""])
def test_dtype_of_an_export(spelled, tmp_path, caplog):
    """config.json names the dtype of the file, as the source spelled it, else as every version reads it."""
    build(llama(), tmp_path / "hf")
    change(tmp_path / "hf", **{"dtype": None, spelled or "dtype": "float32" if spelled else None})
    come_in(tmp_path / "hf", to=tmp_path / "neva")
    for asked, dtype in (("keep", "float32"), ("bf16", "bfloat16"), ("fp16", "float16")):
        out = go_out(tmp_path / "neva", tmp_path / asked, dtype=asked)
        described = config_of(out)
        assert {name: described[name] for name in ("dtype", "torch_dtype") if name in described} == {spelled or "torch_dtype": dtype}
        caplog.clear()
        assert dtype_of(out, tf.LlamaForCausalLM) == getattr(torch, dtype)
        assert not warned(caplog)


def test_dtype_of_parts(tmp_path):
    """A part of a LLaVA says its dtype itself, and in a LLaVA the parts that said it say the new one."""
    whole(tmp_path / "hf")
    before = config_of(tmp_path / "hf")
    change(tmp_path / "hf", dtype=None, torch_dtype="float16", vision_config={**before["vision_config"], "torch_dtype": "float16"})
    come_in(tmp_path / "hf", to=tmp_path / "neva", dtype="bf16")
    out = go_out(tmp_path / "neva", tmp_path / "out")
    described = config_of(out)
    assert described["torch_dtype"] == described["vision_config"]["torch_dtype"] == "bfloat16"
    assert "dtype" not in described and not {"dtype", "torch_dtype"} & described["text_config"].keys()
    assert dtype_of(out, tf.LlavaForConditionalGeneration) == torch.bfloat16
    for part, kind in (("decoder", tf.LlamaForCausalLM), ("vision", tf.CLIPVisionModel)):
        out = go_out(tmp_path / "neva", tmp_path / part, part=part)
        assert config_of(out)["torch_dtype"] == "bfloat16" and dtype_of(out, kind) == torch.bfloat16


def test_dtype_of_a_mixture(tmp_path):
    """A model composed of a decoder in bf16 and an encoder in fp32 is loaded in fp32, which loses nothing."""
    text, seen = parts(tmp_path)
    tf.LlamaForCausalLM.from_pretrained(text).bfloat16().save_pretrained(text)
    out = go_out(come_in(text, seen, to=tmp_path / "neva"), tmp_path / "out")
    described = config_of(out)
    assert described["dtype"] == described["text_config"]["dtype"] == described["vision_config"]["dtype"] == "float32"
    assert dtype_of(out, tf.LlavaForConditionalGeneration) == torch.float32
    assert config_of(go_out(tmp_path / "neva", tmp_path / "text_again", part="decoder"))["dtype"] == "bfloat16"


# Processors.


def processed(folder: Path, **fields) -> None:
    """An encoder with these image settings, beside which lie the ordinary ones."""
    settings = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "do_resize": True, "do_rescale": True, "do_normalize": True, "resample": 3}
    change(folder, "preprocessor_config.json", **{**settings, **fields})


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"size": {"longest_edge": 28}}, r"preprocessor_config.json says size={'longest_edge': 28}; a square .*, or shortest_edge"),
        ({"size": {"shortest_edge": 28, "longest_edge": 56}}, "a square .*, or shortest_edge and then a crop"),
        ({"size": {"shortest_edge": 28}, "do_center_crop": False}, "a square .*, or shortest_edge and then a crop"),
        ({"size": {"height": 28, "width": 31}}, "a square .*, or shortest_edge and then a crop"),
        ({"size": {"height": 28, "width": 28}, "do_center_crop": True}, "and then a crop; a square"),
        ({"size": {"shortest_edge": 28}, "crop_size": {"height": 31, "width": 31}}, "resizes to 28 and crops to .* a square of at most 28"),
        ({"size": {"shortest_edge": 31}, "crop_size": {"height": 28, "width": 27}}, "resizes to 31 and crops to"),
        ({"size": {"shortest_edge": 31}, "crop_size": 28, "do_pad": True}, "resizes to 31 and crops to .* only equal sizes"),
        ({}, "says size=None; a square"),
        ({"size": 28, "resample": 5}, r"preprocessor_config.json says resample=5; 0 \(nearest\), 1 \(lanczos\)"),
        ({"size": 28, "do_rescale": False}, "preprocessor_config.json says do_rescale=False"),
        (
            {"size": {"height": 56, "width": 56}},
            "/seen: its processor brings images to 56 pixels, its encoder takes 28: say image=56 .*, or image=28",
        ),
    ],
)
def test_processors_that_are_refused(fields, said, tmp_path):
    """A way to bring images to size that is not ours is refused, with what is; and a size that the encoder does not take, with both numbers."""
    build(clip(), tmp_path / "seen")
    processed(tmp_path / "seen", **fields)
    with pytest.raises(CheckpointError if "pixels" not in said else ValueError, match=said):
        come_in(tmp_path / "seen", to=tmp_path / "neva")
    with pytest.raises(ValueError, match=said.replace("image=", "vision.image=")):
        come_in(*parts(tmp_path / "b")[:1], tmp_path / "seen", to=tmp_path / "neva")


@pytest.mark.parametrize(
    ("fields", "aspect"),
    [
        ({"size": 28}, "crop"),
        ({"size": 28, "image_processor_type": "CLIPImageProcessor"}, "crop"),
        ({"size": 28, "image_processor_type": "ViTImageProcessor"}, "square"),
        ({"size": 28, "image_processor_type": "BeitImageProcessor", "do_center_crop": False}, "square"),
        ({"size": {"shortest_edge": 28, "longest_edge": None}}, "crop"),
        ({"size": {"shortest_edge": 28}, "do_pad": True, "do_center_crop": False}, "pad"),
        ({"size": {"height": 28, "width": 28}}, "square"),
    ],
)
def test_processors_that_are_taken(fields, aspect):
    """What a preprocessor_config.json means, in the spellings of several years."""
    from neva.models.hf_vlm import image_config

    image, pixels = image_config(fields)
    assert image.aspect == aspect and pixels == {"image": 28}


def test_a_size_that_was_said_is_taken(tmp_path):
    """vision.image says which of two sizes is meant: that of the processor, with position embeddings resized, or the encoder's own."""
    text, seen = parts(tmp_path)
    processed(seen, size={"height": 56, "width": 56})
    for side in (56, 28):
        place = come_in(text, seen, to=tmp_path / f"neva{side}", overrides=(f"vision.image={side}",))
        assert index.stored(place / "weights")["vision.positions"].shape[0] == (side // 14) ** 2 + 1
        assert f"in {side} pixels" in inspect(place)["vision"]
        settings = json.loads((go_out(place, tmp_path / f"out{side}", part="vision") / "preprocessor_config.json").read_text())
        assert settings["size"] == {"height": side, "width": side}
    whole(tmp_path / "hf")
    change(tmp_path / "hf", "processor_config.json", image_processor=None)
    processed(tmp_path / "hf", size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56})
    with pytest.raises(ValueError, match="brings images to 56 pixels, its encoder takes 28: say vision.image=56 .*, or vision.image=28"):
        come_in(tmp_path / "hf", to=tmp_path / "neva")
    come_in(tmp_path / "hf", to=tmp_path / "neva", overrides=("vision.image=56",))


@pytest.mark.parametrize(("vision", "composed", "together"), [(clip, "pad", "crop"), (siglip, "square", "square")])
def test_images_without_a_processor(vision, composed, together, tmp_path):
    """LLaVA-1.5's padding for a CLIP that joins a decoder; the crop of llava-hf in a LLaVA of transformers; squares for other encoders."""
    text, seen = parts(tmp_path, vision)
    assert inits_image(text, seen) == composed
    strategy = "default" if vision is clip else "full"
    build(llava(vision=vision(), strategy=strategy), tmp_path / "hf")
    assert inits_image(tmp_path / "hf") == together


def inits_image(*folders: Path) -> str:
    model, _, warnings = hf.compose([hf.read_source(folder) for folder in folders], Options())
    assert model is not None and f"aspect={model.image.aspect}" in warnings[0]
    return model.image.aspect


# Rotary positions.


@pytest.mark.parametrize("name", ["llama grouped", "llama3 scaling", "qwen2", "mistral", "mixtral", "nemotron"])
@pytest.mark.parametrize("override", ["rope_theta=20000", "rope_scaling={kind: linear, factor: 2}", "rotary_fraction=1"])
def test_changed_rotary_positions_go_out(name, override, tmp_path, caplog):
    """What transformers 5 saves as `rope_parameters` gives way to what the model was changed to, and stays where it was not."""
    theirs = build(DECODERS[name](), tmp_path / "hf")
    before = config_of(tmp_path / "hf")["rope_parameters"]
    place = come_in(tmp_path / "hf", to=tmp_path / "neva", overrides=(f"decoder.{override}",), parity=False)
    out = go_out(place, tmp_path / "out")
    caplog.clear()
    rope = quiet_load(type(theirs), out).config.rope_parameters
    assert not warned(caplog)
    if override.startswith("rotary_fraction") and name != "nemotron":  # which turns whole heads anyway
        assert rope == config_of(out)["rope_parameters"] == before
        return
    assert "rope_parameters" not in config_of(out)
    if override.startswith("rope_scaling"):
        assert (rope["rope_type"], rope["factor"], rope["rope_theta"]) == ("linear", 2, before["rope_theta"])
    else:
        assert rope["rope_theta"] == (20000.0 if "theta" in override else before["rope_theta"])
        assert rope.get("partial_rotary_factor", 1.0) == (0.5 if name == "nemotron" and "theta" in override else 1.0)


def test_changed_rotary_positions_of_a_llava(tmp_path):
    """The same in its text_config."""
    whole(tmp_path / "hf")
    place = come_in(tmp_path / "hf", to=tmp_path / "neva", overrides=("decoder.rope_theta=20000",), parity=False)
    model = quiet_load(tf.LlavaForConditionalGeneration, go_out(place, tmp_path / "out"))
    assert model.config.text_config.rope_parameters["rope_theta"] == 20000.0


# What is no model, or none of ours.


def phi3(folder: Path) -> str:
    build(llama(), folder)
    change(folder, model_type="phi3")
    return "model_type='phi3', which is not supported yet; there are llava, .*the decoders llama, mistral.*the encoders clip, siglip"


def qwen2_vl(folder: Path) -> str:
    whole(folder)
    change(folder, model_type="qwen2_vl")
    return "model_type='qwen2_vl', which is not supported yet; there are llava, llava_next, NVLM_D, the decoders"


def lora(folder: Path) -> str:
    folder.mkdir()
    change(folder, "adapter_config.json", base_model_name_or_path="x")
    save_file({"x": torch.ones(1)}, folder / "adapter_model.safetensors")
    return r"hf holds a LoRA adapter \(adapter_config.json\).*merge_and_unload"


def lora_with_config(folder: Path) -> str:
    lora(folder)
    change(folder, model_type="llava", mm_vision_tower="x")
    return r"hf holds a LoRA adapter"


def gguf(folder: Path) -> str:
    folder.mkdir()
    (folder / "model-q4.gguf").write_bytes(b"GGUF")
    return "hf holds GGUF files, which neva does not read: import the folder of safetensors"


def empty(folder: Path) -> str:
    folder.mkdir()
    return "hf has no config.json, it is empty"


def other_files(folder: Path) -> str:
    folder.mkdir()
    (folder / "params.json").write_text("{}")
    return "hf has no config.json, it holds params.json: give a Hugging Face folder"


def a_file(folder: Path) -> str:
    folder.write_text("x")
    return "hf is a file: give the folder"


def nothing(folder: Path) -> str:
    return "hf is not there: give the folder .* or hf:org/name"


def a_checkpoint(folder: Path) -> str:
    build(llama(), folder / "source")
    come_in(folder / "source", to=folder / "neva")
    (folder / "neva").rename(folder.with_name("moved"))
    shutil.rmtree(folder)
    folder.with_name("moved").rename(folder)
    return "hf is a checkpoint of neva already: give it to train"


def a_run(folder: Path) -> str:
    (folder / "checkpoints").mkdir(parents=True)
    return "hf is a checkpoint of neva already"


def pointer(file: Path) -> None:
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9976576152\n")


def lfs(folder: Path) -> str:
    build(llama(), folder)
    pointer(folder / "model.safetensors")
    return "model.safetensors is a Git-LFS pointer, not the file itself: run `git lfs pull`"


def lfs_of_torch(folder: Path) -> str:
    lfs(folder)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    return "pytorch_model.bin is a Git-LFS pointer"


def lfs_tokenizer(folder: Path) -> str:
    build(llama(vocab_size=SIZE), folder)
    pointer(folder / "tokenizer.json")
    return "tokenizer.json is a Git-LFS pointer"


@pytest.mark.parametrize(
    "made",
    [phi3, qwen2_vl, lora, lora_with_config, gguf, empty, other_files, a_file, nothing, a_checkpoint, a_run, lfs, lfs_of_torch, lfs_tokenizer],
)
def test_what_is_no_model_is_named(made, tmp_path):
    """The message says what lies there and what to do."""
    said = made(tmp_path / "hf")
    with pytest.raises(CheckpointError, match=said) as caught:
        come_in(tmp_path / "hf", to=tmp_path / "neva")
    assert "\n" not in str(caught.value) and not list(tmp_path.glob("neva*"))


@pytest.mark.parametrize("made", [phi3, qwen2_vl, lora, gguf, lfs])
def test_inspect_and_init_name_them_too(made, tmp_path):
    """neva inspect does not describe what cannot be imported, and a recipe does not begin with it."""
    said = made(tmp_path / "hf")
    with pytest.raises(CheckpointError, match=said):
        inspect(tmp_path / "hf")
    with pytest.raises(CheckpointError, match=said):
        api.recipe("llava-tiny", [f"init.decoder={tmp_path / 'hf'}"])


# Tokenizers.


def gpt2_pair(folder: Path) -> int:
    """GPT-2's two files beside the weights; gives the number of tokens."""
    made = tokenizers.ByteLevelBPETokenizer()
    made.train_from_iterator(["the lot of the cat and the other lot"], vocab_size=270, min_frequency=1, special_tokens=["<|endoftext|>"])
    made.save_model(str(folder))
    return made.get_vocab_size()


def test_a_pair_of_gpt2_files_is_a_tokenizer(tmp_path, monkeypatch):
    """vocab.json and merges.txt are seen by inspect, import and init; damaged ones are an error, not a model without tokenizer."""
    folder = tmp_path / "hf"
    build(llama(vocab_size=300), folder)
    size = gpt2_pair(folder)
    assert inspect(folder)["tokenizer"] == f"{size} tokens"
    come_in(folder, to=tmp_path / "neva", template="plain")
    assert inspect(tmp_path / "neva")["tokenizer"] == f"{size} tokens"
    assert api.recipe("llava-tiny/finetune", [f"init.decoder={folder}"])[0].data.tokenizer == str(folder)
    (folder / "merges.txt").write_bytes(b"\xff\xfe damaged")
    with pytest.raises(CheckpointError, match="cannot be read"):
        come_in(folder, to=tmp_path / "again", template="plain")
    (folder / "merges.txt").unlink()
    assert inspect(folder)["tokenizer"] == "none"
