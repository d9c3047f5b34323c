"""Which weights and settings of a folder count: those of transformers, on each path of the gate.

The oracle is `from_pretrained` of the same folder, or of one that was made from the same tensors.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file
from torch import Tensor

from neva.checkpoint import gate as gates
from neva.checkpoint import hf, index, parity, store
from neva.checkpoint import shards as files
from neva.checkpoint.hf import Options
from neva.checkpoint.manifest import CheckpointError
from tests.families import TEXT, build, clip, llama, llava, on_disk, siglip
from tests.oracle.test_convert import SIZE, add_text, whole
from tests.oracle.test_convert_edges import change, config_of

torch.set_num_threads(1)
MISTRAL = {**TEXT, "vocab_size": SIZE, "sliding_window": 5}


def random_bits(config: tf.PreTrainedConfig, folder: Path, seed: int) -> dict[str, Tensor]:
    """The tensors, as files spell them, of a model with other weights for every seed."""
    build(config, folder)
    generator = torch.Generator().manual_seed(seed)
    state = {name: tensor.clone() for name, tensor in on_disk(folder).items()}
    for tensor in state.values():
        tensor += 0.02 * torch.randn(tensor.shape, generator=generator)
    return state


def same_model(kind, a: Path, b: Path) -> bool:
    """Does transformers load the same weights, ties and settings from both?"""
    one, other = kind.from_pretrained(a), kind.from_pretrained(b)
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)


# Two sets of weights.


def one_file(folder: Path, state: dict[str, Tensor]) -> None:
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def torch_file(folder: Path, state: dict[str, Tensor]) -> None:
    torch.save(state, folder / "pytorch_model.bin")


def shards(
    folder: Path,
    state: dict[str, Tensor],
    stem: str = "model",
    kind: str = "safetensors",
) -> None:
    """Two shards and their index."""
    names = [f"{stem}-{n}-of-2.{kind}" for n in (1, 2)]
    placed = {name: names[number % 2] for number, name in enumerate(state)}
    for file in names:
        part = {name: tensor for name, tensor in state.items() if placed[name] == file}
        if kind == "safetensors":
            save_file(part, folder / file, metadata={"format": "pt"})
        else:
            torch.save(part, folder / file)
    index_of = {"metadata": {"total_size": 1}, "weight_map": placed}
    (folder / f"{stem}.{kind}.index.json").write_text(json.dumps(index_of))


def torch_shards(folder: Path, state: dict[str, Tensor]) -> None:
    shards(folder, state, "pytorch_model", "bin")


def named_file(folder: Path, state: dict[str, Tensor]) -> None:
    save_file(state, folder / "tuned.safetensors", metadata={"format": "pt"})
    change(folder, transformers_weights="tuned.safetensors")


def named_shards(folder: Path, state: dict[str, Tensor]) -> None:
    shards(folder, state, "tuned")
    change(folder, transformers_weights="tuned.safetensors.index.json")


SETS = [
    (one_file, shards),
    (one_file, torch_file),
    (one_file, torch_shards),
    (shards, torch_file),
    (shards, torch_shards),
    (torch_file, torch_shards),
    (named_file, one_file),
    (named_shards, one_file),
]


@pytest.mark.parametrize(("first", "second"), SETS, ids=lambda made: made.__name__)
def test_two_sets_of_weights(first, second, gate, tmp_path):
    """The set that transformers reads is taken, whichever was written last, and the other named."""
    folder = tmp_path / "hf"
    states = [random_bits(llama(), folder, seed) for seed in (1, 2)]
    (folder / "model.safetensors").unlink()
    both = [(first, states[0]), (second, states[1])]
    newest_counts = SETS.index((first, second)) % 2
    for write, state in both[::-1] if newest_counts else both:
        write(folder, state)
    out = gate.there_and_back(folder)
    assert torch.equal(on_disk(out)["model.norm.weight"], states[0]["model.norm.weight"])
    assert same_model(tf.AutoModelForCausalLM, folder, out)
    assert "holds 2 sets of weights" in gate.warnings and "ignored" in gate.warnings


@pytest.mark.parametrize("what", ["llava", "clip"])
def test_two_sets_of_weights_of_images(what, gate, tmp_path):
    """The same of a LLaVA and of an encoder, where the set that counts is in shards."""
    folder, config = tmp_path / "hf", clip()
    kind = tf.CLIPVisionModel
    if what == "llava":
        kind, config = tf.LlavaForConditionalGeneration, llava(llama(vocab_size=390))
    states = [random_bits(config, folder, seed) for seed in (1, 2)]
    (folder / "model.safetensors").unlink()
    shards(folder, states[0])
    torch_file(folder, states[1])
    if what == "llava":
        add_text(folder, image=True)
    assert same_model(kind, folder, gate.there_and_back(folder))
    assert "pytorch_model.bin ignored" in gate.warnings


@pytest.mark.parametrize("named", ["../tuned.safetensors", "/tuned.safetensors", "tuned.bin", 3])
def test_weights_named_outside_the_folder_are_refused(named, gate, tmp_path):
    """`transformers_weights` is a safetensors file of the folder, or its index."""
    build(llama(), tmp_path / "hf")
    change(tmp_path / "hf", transformers_weights=named)
    said = "transformers_weights=.* must be a .safetensors file"
    with pytest.raises(CheckpointError, match=said):
        gate.come_in(tmp_path / "hf", to=tmp_path / "neva")


def test_named_weights_that_are_missing_are_refused(gate, tmp_path):
    build(llama(), tmp_path / "hf")
    change(tmp_path / "hf", transformers_weights="tuned.safetensors")
    with pytest.raises(CheckpointError, match="tuned.safetensors', which is not there"):
        gate.come_in(tmp_path / "hf", to=tmp_path / "neva")


# Heads that are tied to the embedding, and heads that are not.


def tied_llama(folder: Path, head: str) -> None:
    """A tied decoder; its file holds no head, an equal one, another one, or the head alone."""
    build(llama(vocab_size=SIZE, tie_word_embeddings=True), folder)
    add_text(folder, image=False, pad=False)
    with_head(folder, head, "model.embed_tokens.weight", "lm_head.weight")


def tied_llava(
    folder: Path,
    head: str,
    *,
    top: bool | None = True,
    inside: bool | None = None,
) -> None:
    """The same of a LLaVA, which says so beside its decoder, inside it, or both."""
    whole(folder, tie_word_embeddings=True)
    text = config_of(folder)["text_config"]
    text.pop("tie_word_embeddings", None)
    change(
        folder,
        tie_word_embeddings=top,
        text_config=text | ({} if inside is None else {"tie_word_embeddings": inside}),
    )
    embed = next(name for name in on_disk(folder) if name.endswith("embed_tokens.weight"))
    with_head(
        folder,
        head,
        embed,
        "lm_head.weight" if embed.startswith("model.") else "language_model.lm_head.weight",
    )


def with_head(folder: Path, head: str, embed: str, name: str) -> None:
    state = on_disk(folder)
    assert name not in state
    if head != "none":
        state[name] = state[embed].clone()
    if head == "other":
        generator = torch.Generator().manual_seed(5)
        state[name] = torch.randn(state[embed].shape, generator=generator) * 0.1
    if head == "alone":
        del state[embed]
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


HEADS = ["none", "equal", "other", "alone"]


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("part", ["decoder", "vlm", "decoder of a vlm"])
def test_tied_heads(part, head, gate, tmp_path):
    """Tied where the folder's head is the embedding, untied where it differs."""
    folder = tmp_path / "hf"
    (tied_llama if part == "decoder" else tied_llava)(folder, head)
    place = gate.come_in(folder, to=tmp_path / "neva")
    kind = tf.LlamaForCausalLM if part == "decoder" else tf.LlavaForConditionalGeneration
    theirs = kind.from_pretrained(folder)
    embed, lm = theirs.get_input_embeddings().weight, theirs.get_output_embeddings().weight
    assert torch.equal(embed, lm) == (head != "other")
    model = store_config(place)
    assert model["decoder"]["tied"] == (head != "other")
    assert ("differs from" in gate.warnings) == (head == "other")
    options = {"part": "decoder"} if part == "decoder of a vlm" else {}
    out = gate.go_out(place, tmp_path / "out", **options)
    if part == "decoder of a vlm":
        kind = tf.LlamaForCausalLM
    again = kind.from_pretrained(out)
    assert torch.equal(again.get_input_embeddings().weight, embed)
    assert torch.equal(again.get_output_embeddings().weight, lm)
    has_head = any("lm_head" in name for name in on_disk(out))
    assert has_head == (head == "other" or (head == "alone" and not options))


def store_config(place: Path) -> dict:
    return store.load_config(place)["model"]


@pytest.mark.parametrize("model_type", ["llava", "llava_next"])
@pytest.mark.parametrize("top", [True, False, None])
@pytest.mark.parametrize("inside", [True, False, None])
def test_where_a_llava_says_that_it_is_tied(inside, top, model_type, tmp_path):
    """A LLaVA is tied where transformers takes it for tied.

    It looks beside the decoder, of a llava also inside it.
    """
    tied_llava(tmp_path / "hf", "equal", top=top, inside=inside)
    change(tmp_path / "hf", model_type=model_type)
    theirs = tf.AutoConfig.from_pretrained(tmp_path / "hf")
    ours = hf.read_source(tmp_path / "hf").decoder
    assert ours is not None and ours.tied == theirs.tie_word_embeddings


def trained(place: Path) -> None:
    """The checkpoint with another embedding, as training leaves it."""
    names = index.stored(place / "weights")
    state = {name: index.read(place / "weights", name) for name in names}
    state["decoder.embed.weight"] += 1
    rewrite(place, state)


def rewrite(place: Path, state: dict[str, Tensor]) -> None:
    from dataclasses import asdict

    from neva.checkpoint import stream
    from neva.checkpoint.manifest import MANIFEST, Manifest, digests, listing, serialise

    shutil.rmtree(place / "weights")
    (place / "weights").mkdir()
    described = {name: torch.empty_like(tensor, device="meta") for name, tensor in state.items()}
    stream.write(place / "weights", described, state.__getitem__, tick=lambda size: None)
    (place / MANIFEST).unlink()
    files = dict(sorted(digests(place, listing(place)).items()))
    (place / MANIFEST).write_bytes(serialise(asdict(Manifest(step=0, files=files))))


def keep_head(place: Path) -> None:
    """What imports did once: the equal head lies beside the checkpoint's weights."""
    (kind,) = (place / "source").iterdir()
    file = kind / hf.UNUSED
    kept = load_file(file) if file.exists() else {}
    head = index.read(place / "weights", "decoder.embed.weight")
    save_file({**kept, "lm_head.weight": head}, file)


@pytest.mark.parametrize("part", ["decoder", "all"])
@pytest.mark.parametrize("made", [tied_llama, tied_llava])
@pytest.mark.parametrize("older", [False, True])
def test_a_redundant_head_is_not_written_back_stale(older, made, part, gate, tmp_path):
    """After training the export's head is the embedding, not the head that the folder once held."""
    made(tmp_path / "hf", "equal")
    place = gate.come_in(tmp_path / "hf", to=tmp_path / "neva")
    kept = list((place / "source").rglob(hf.UNUSED))
    assert not any("lm_head" in name for file in kept for name in load_file(file))
    if older:
        keep_head(place)
    trained(place)
    out = gate.go_out(place, tmp_path / "out", part=part)
    vlm = made is tied_llava and part == "all"
    kind = tf.LlavaForConditionalGeneration if vlm else tf.LlamaForCausalLM
    model = kind.from_pretrained(out)
    now = index.read(place / "weights", "decoder.embed.weight")
    assert torch.equal(model.get_input_embeddings().weight[:SIZE], now[:SIZE])
    assert torch.equal(model.get_output_embeddings().weight[:SIZE], now[:SIZE])
    assert not any("lm_head" in name for name in on_disk(out))


def test_a_head_that_an_override_would_lose_is_named(gate, tmp_path):
    """decoder.tied=true of a folder with a head of its own is refused, and says why."""
    build(llama(), tmp_path / "hf")
    said = "'lm_head.weight' differs from the embedding although decoder.tied"
    with pytest.raises(CheckpointError, match=said):
        gate.come_in(tmp_path / "hf", to=tmp_path / "neva", overrides=("decoder.tied=true",))
    assert not list(tmp_path.glob("neva*"))


# LLaVA's own layout: the encoder in its file, and the decoder's family.


def original(
    folder: Path,
    text: tf.PreTrainedConfig | None = None,
    *,
    model_type: str = "llava_llama",
    architecture: str = "LlavaLlamaForCausalLM",
    vision: Callable[[], tf.PreTrainedConfig] = clip,
) -> tuple[Path, Path]:
    """A LLaVA as its own repository saves it, and the folder of its encoder, weights at random."""
    llava, seen = folder / "llava", folder / "seen"
    build(text or llama(vocab_size=SIZE), llava)
    encoder = build(vision(), seen).config
    state = on_disk(llava)
    generator = torch.Generator().manual_seed(3)
    for n, width in ((0, encoder.hidden_size), (2, 48)):
        state[f"model.mm_projector.{n}.weight"] = torch.randn((48, width), generator=generator)
        state[f"model.mm_projector.{n}.bias"] = torch.randn(48, generator=generator)
    (llava / "model.safetensors").unlink()
    torch_file(llava, state)
    change(
        llava, architectures=[architecture], model_type=model_type,
        mm_hidden_size=encoder.hidden_size,
        mm_projector_type="mlp2x_gelu", mm_vision_select_layer=-2, mm_vision_select_feature="patch",
        mm_vision_tower="openai/clip-vit", image_aspect_ratio="pad", mm_use_im_start_end=False,
        mm_use_im_patch_token=False, use_mm_proj=True, tune_mm_mlp_adapter=False,
        freeze_mm_mlp_adapter=False,
    )  # fmt: skip
    add_text(llava, image=False, pad=False)
    return llava, seen


def tower_of(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """An encoder's tensors under the names that LLaVA's file gives them."""
    inside = "vision_model."
    return {f"{prefix}{inside}{name.removeprefix(inside)}": x for name, x in state.items()}


def add_tower(folder: Path, tower: dict[str, Tensor]) -> None:
    state = torch.load(folder / "pytorch_model.bin", weights_only=True)
    torch_file(folder, {**state, **tower})


def features(tower: torch.nn.Module) -> Tensor:
    pixels = torch.randn(
        (1, 3, tower.config.image_size, tower.config.image_size),
        generator=torch.Generator().manual_seed(1),
    )
    with torch.no_grad():
        return tower(pixels, output_hidden_states=True).hidden_states[-2]


@pytest.mark.parametrize("vision", [clip, siglip])
@pytest.mark.parametrize("prefix", ["model.vision_tower.vision_tower.", "model.vision_tower."])
def test_a_tuned_encoder_in_a_llava_of_the_original_layout(prefix, vision, gate, tmp_path):
    """Its weights are taken, whole: the encoder's folder gives config and processor alone."""
    llava, seen = original(tmp_path, vision=vision)
    tuned = random_bits(vision(), tmp_path / "tuned", seed=7)
    one_file(tmp_path / "tuned", tuned)
    add_tower(llava, tower_of(tuned, prefix))
    out = gate.there_and_back(llava, seen)
    kind = tf.CLIPVisionModel if vision is clip else tf.SiglipVisionModel
    theirs = kind.from_pretrained(tmp_path / "tuned")
    model = tf.LlavaForConditionalGeneration.from_pretrained(out)
    apart = (features(model.model.vision_tower) - features(theirs)).abs().max()
    base = (features(kind.from_pretrained(seen)) - features(theirs)).abs().max()
    assert apart < 1e-5 < base
    assert "holds the weights of its encoder" in gate.warnings
    assert f"{seen} gives config and processor" in gate.warnings
    alone = gate.go_out(tmp_path / "neva", tmp_path / "alone", part="vision")
    assert same_model(kind, alone, tmp_path / "tuned")


def test_a_llava_with_its_encoder_still_needs_the_encoders_folder(gate, tmp_path):
    """Its file holds no config of the encoder, and that is said."""
    llava, seen = original(tmp_path)
    add_tower(llava, tower_of(on_disk(seen), "model.vision_tower.vision_tower."))
    with pytest.raises(ValueError, match="lacks the config of its encoder: give .* --vision"):
        gate.come_in(llava, to=tmp_path / "neva")


@pytest.mark.parametrize("whole_models", [True, False])
@pytest.mark.parametrize("spoilt", ["projector.0.weight", "projector.2.bias"])
def test_the_projector_of_the_original_layout_is_compared(
    spoilt,
    whole_models,
    tmp_path,
    monkeypatch,
):
    """transformers has no class for it: it is written out, linear layers with GELU between."""
    monkeypatch.setattr(parity, "fits", lambda parameters: whole_models)
    sources = [hf.read_source(folder) for folder in original(tmp_path)]
    chosen = hf.plan(sources, Options())
    right = gates.compare(chosen.sources, chosen.model, chosen.vision, chosen.read)
    parity.check(right, "it")

    def read(name: str) -> Tensor:
        return chosen.read(name) + 0.01 * (name == spoilt)

    wrong = gates.compare(chosen.sources, chosen.model, chosen.vision, read)
    with pytest.raises(CheckpointError, match="transformers projected features differs"):
        parity.check(wrong, "it")


def test_half_an_encoder_in_the_file_is_refused(gate, tmp_path):
    """The rest is not taken from another encoder."""
    llava, seen = original(tmp_path)
    bits = random_bits(clip(), tmp_path / "tuned", seed=7)
    tuned = tower_of(bits, "model.vision_tower.vision_tower.")
    kept = {name: tensor for name, tensor in tuned.items() if ".layers.0.mlp" not in name}
    add_tower(llava, kept)
    with pytest.raises(CheckpointError, match=r"layers.0.mlp.fc1.bias' is missing"):
        gate.come_in(llava, seen, to=tmp_path / "neva")


def test_an_encoder_of_another_resolution_in_the_file_is_refused(gate, tmp_path):
    """Its position embeddings are not resized to what the encoder's folder happens to say."""
    llava, seen = original(tmp_path)
    tuned = random_bits(clip(image_size=56), tmp_path / "tuned", seed=7)
    add_tower(llava, tower_of(tuned, "model.vision_tower.vision_tower."))
    with pytest.raises(
        CheckpointError,
        match=r"position_embedding.weight' gives \[17, 32\], the config wants \[5, 32\]",
    ):
        gate.come_in(llava, seen, to=tmp_path / "neva")


def test_an_encoder_of_transformers_in_the_file_is_refused(gate, tmp_path):
    """Names of an encoder that runs as transformers' model are not read out of a LLaVA's file."""
    llava, seen = original(tmp_path)
    shutil.rmtree(seen)
    dinov2(seen)
    add_tower(llava, {f"model.vision_tower.vision_tower.{n}": t for n, t in on_disk(seen).items()})
    with pytest.raises(ValueError, match="holds the weights of its encoder .* of a dinov2"):
        gate.come_in(llava, seen, to=tmp_path / "neva")


FAMILIES = {
    "llava_mistral": ("LlavaMistralForCausalLM", lambda: tf.MistralConfig(**MISTRAL)),
    "llava_qwen": ("LlavaQwenForCausalLM", lambda: tf.Qwen2Config(**{**TEXT, "vocab_size": SIZE})),
    "llava_llama": ("LlavaLlamaForCausalLM", lambda: llama(vocab_size=SIZE)),
    "llava": ("LlavaMistralForCausalLM", lambda: tf.MistralConfig(**MISTRAL)),
}


@pytest.mark.parametrize("model_type", FAMILIES)
def test_family_of_a_llava_of_the_original_layout(model_type, gate, tmp_path):
    """Mistral's window and Qwen2's biases arrive: the export's logits are transformers' own."""
    architecture, text = FAMILIES[model_type]
    llava, seen = original(tmp_path, text(), model_type=model_type, architecture=architecture)
    theirs = build(text(), tmp_path / "text")
    place = gate.come_in(llava, seen, to=tmp_path / "neva")
    found = store_config(place)["decoder"]
    assert found["window"] == (5 if "Mistral" in architecture else 0)
    assert found["qkv_bias"] == ("Qwen" in architecture)
    out = gate.go_out(place, tmp_path / "out")
    alone = gate.go_out(place, tmp_path / "alone", part="decoder")
    ids = torch.arange(3, 30)[None]
    with torch.no_grad():
        wanted = theirs(ids).logits
        for folder, kind in (
            (out, tf.LlavaForConditionalGeneration),
            (alone, tf.AutoModelForCausalLM),
        ):
            model = kind.from_pretrained(folder)
            assert (model(input_ids=ids).logits[..., :SIZE] - wanted).abs().max() < 1e-4
    config = tf.AutoConfig.from_pretrained(out).text_config
    assert config.model_type == text().model_type == tf.AutoConfig.from_pretrained(alone).model_type


@pytest.mark.parametrize(
    ("model_type", "architecture", "said"),
    [
        (
            "llava_mpt",
            "LlavaMptForCausalLM",
            "model_type='llava_mpt'.* of that decoder is not supported yet; there are llava",
        ),
        (
            "llava",
            "LlavaGemmaForCausalLM",
            "LlavaGemmaForCausalLM.* of that decoder is not supported yet",
        ),
        ("llava_mistral", "LlavaLlamaForCausalLM", "decoders of different families"),
        ("llava_llama", "LlavaQwenForCausalLM", "decoders of different families"),
    ],
)
def test_families_that_are_refused(model_type, architecture, said, gate, tmp_path):
    """A family is never forced upon a decoder."""
    llava, seen = original(tmp_path, model_type=model_type, architecture=architecture)
    with pytest.raises(CheckpointError, match=said):
        gate.come_in(llava, seen, to=tmp_path / "neva")


@pytest.mark.parametrize(
    ("name", "side"),
    [
        ("openai/clip-vit-large-patch14-336", 336),
        ("openai/clip-vit-large-patch14", 224),
        ("google/siglip-so400m-patch14-384", 384),
        ("OpenGVLab/InternViT-6B-448px-V1-5", 448),
        ("./checkpoints/clip-2024", 0),
        ("facebook/dinov2-large", 0),
    ],
)
def test_resolution_of_the_encoder_that_a_llava_names(name, side, tmp_path, monkeypatch):
    """An encoder of another resolution than the one that the file names is taken, and said."""
    llava, seen = original(tmp_path)
    change(llava, mm_vision_tower=name)
    sources = [hf.read_source(folder) for folder in (llava, seen)]
    said = "\n".join(hf.compose(sources, Options())[2])
    expected = f"was trained with {name}, {side} pixels a side; the encoder of {seen} takes 28"
    assert (expected in said) == bool(side) and ("a side" in said) == bool(side)
    change(seen, image_size=side or 28)
    sources = [hf.read_source(folder) for folder in (llava, seen)]
    assert "a side" not in "\n".join(hf.compose(sources, Options())[2])


# The gate does not believe what neva read: transformers opens the folder too.


@pytest.mark.parametrize("whole_models", [True, False])
@pytest.mark.parametrize("what", ["decoder", "encoder", "llava"])
def test_a_wrong_choice_of_files_is_found(what, whole_models, tmp_path, monkeypatch):
    """Were the torch file read beside the safetensors, the gate would see other weights."""
    monkeypatch.setattr(parity, "fits", lambda parameters: whole_models)
    folder = tmp_path / "hf"
    config = {"decoder": llama(), "encoder": clip(), "llava": llava(llama(vocab_size=390))}[what]
    states = [random_bits(config, folder, seed) for seed in (1, 2)]
    one_file(folder, states[0])
    torch_file(folder, states[1])
    found = files.weight_sets
    monkeypatch.setattr(files, "weight_sets", lambda folder: found(folder)[::-1])
    source = hf.read_source(folder)
    chosen = hf.plan([source], Options())
    wrong = gates.compare([source], chosen.model, chosen.vision, chosen.read)
    with pytest.raises(CheckpointError, match="is not published: against transformers"):
        parity.check(wrong, "it")


@pytest.mark.parametrize("whole_models", [True, False])
@pytest.mark.parametrize("made", [tied_llama, tied_llava])
@pytest.mark.parametrize("head", ["other", "alone"])
def test_a_head_that_is_wrongly_tied_is_found(head, made, whole_models, tmp_path, monkeypatch):
    """Were the head in the folder dropped, the gate would name it, whole and in pieces."""
    monkeypatch.setattr(parity, "fits", lambda parameters: whole_models)
    made(tmp_path / "hf", head)
    monkeypatch.setattr(hf, "as_tied", lambda source: source)
    source = hf.read_source(tmp_path / "hf")
    if head == "alone":
        with pytest.raises(CheckpointError, match="embed_tokens.weight' is missing"):
            hf.plan([source], Options())
        return
    chosen = hf.plan([source], Options())
    wrong = gates.compare([source], chosen.model, chosen.vision, chosen.read)
    with pytest.raises(CheckpointError, match="head, tied to the embedding, differs by"):
        parity.check(wrong, "it")


def dinov2(folder: Path) -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "mlp_ratio": 2}
    build(tf.Dinov2Config(**sizes, image_size=28, patch_size=14), folder)
    settings = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "do_center_crop": False}
    change(folder, "preprocessor_config.json", **settings, size={"height": 28, "width": 28})


@pytest.mark.parametrize("composed", [False, True])
def test_an_encoder_of_transformers_on_each_path(composed, gate, tmp_path):
    """It is no code of ours: it is compared whole though the rest is compared in pieces."""
    dinov2(tmp_path / "seen")
    sources = [tmp_path / "seen"]
    if composed:
        build(llama(vocab_size=SIZE), tmp_path / "text")
        add_text(tmp_path / "text", image=False, pad=False)
        sources.insert(0, tmp_path / "text")
    out = gate.there_and_back(*sources)
    state = on_disk(out)
    tower = {name.removeprefix("vision_tower."): tensor for name, tensor in state.items()}
    assert all(torch.equal(tower[n], t) for n, t in on_disk(tmp_path / "seen").items())
