"""Stages that start from what a user has: Hugging Face folders as they are, parts of their own, and the way back after training."""

import json
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers as tf
import yaml
from click.testing import CliRunner

from neva import api
from neva import config as tree
from neva.checkpoint import index
from neva.checkpoint.nemo import is_neva
from neva.cli import main
from neva.job import TrainConfig
from neva.recipes.demo import TOKENIZER
from tests.families import build, clip, llama, on_disk, pair
from tests.families import llava as vlm
from tests.nemo import write
from tests.oracle.test_convert import SIZE, add_text, original, quiet_load, same_bits, whole
from tests.oracle.test_nemo import NEVA

TINY = (
    "data.sources=[{mock: {samples: 60, words: [4, 20]}}]", "batch.seq_length=192", "batch.rows=2", "data.workers=0", "steps=3", "precision=fp32",
    "log.tensorboard=false", "data.template=v1", "data.system=Hi.",
)  # fmt: skip


def parts(folder: Path) -> tuple[str, str]:
    """A decoder with its tokenizer, and an encoder."""
    build(llama(vocab_size=390, max_position_embeddings=512), folder / "text")
    add_text(folder / "text", image=False, pad=False)
    build(clip(), folder / "seen")
    return str(folder / "text"), str(folder / "seen")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("NEVA_CACHE", str(tmp_path / "cache"))


def test_parts_are_composed_trained_and_exported(tmp_path):
    """llava-tiny on a decoder and an encoder of Hugging Face: their sizes and tokenizer are taken, they are imported once, frozen parts keep
    every bit through two stages, and transformers loads the result."""
    text, seen = parts(tmp_path)
    said: list[str] = []
    last = api.train("llava-tiny", [*TINY, f"init.decoder={text}", f"init.vision={seen}", f"out={tmp_path / 'run'}"], say=said.append)
    assert sum("Importing" in line for line in said) == 2
    config = api.recipe("llava-tiny", [*TINY, f"init.decoder={text}", f"init.vision={seen}"])
    assert [stage.model.decoder.vocab for stage in config] == [390, 390] and config[0].model.vision.width == 32
    assert config[1].data.tokenizer == text
    before, after = on_disk(tmp_path / "seen"), index.stored(last / "weights")
    assert torch.equal(index.read(last / "weights", "vision.patch.weight"), before["embeddings.patch_embedding.weight"])
    assert any(name.startswith("projector.") for name in after)
    out = api.export_checkpoint(tmp_path / "run", tmp_path / "out", say=said.append)
    model = quiet_load(tf.LlavaForConditionalGeneration, out)
    assert model.config.vision_config.num_hidden_layers == 3  # the encoder's last layer, which nothing reads, was carried along
    written = on_disk(out)
    for name, tensor in before.items():
        kept = next(x for n, x in written.items() if n.endswith(name))
        assert torch.equal(kept, tensor), name
    del said[:]
    api.train("llava-tiny", [*TINY, f"init.decoder={text}", f"init.vision={seen}", f"out={tmp_path / 'again'}"], say=said.append)
    assert not any("Importing" in line for line in said)


def test_a_whole_model_is_trained_and_exported(tmp_path):
    """A stage from a llava-hf folder; the export keeps its files' spelling and all that was frozen, bit for bit."""
    whole(tmp_path / "hf")
    stage = ["trainable=[projector.*]", f"init={tmp_path / 'hf'}", f"out={tmp_path / 'run'}"]
    api.train("llava-tiny/finetune", [*TINY, *stage], say=lambda text: None)
    out = api.export_checkpoint(tmp_path / "run", tmp_path / "out", say=lambda text: None)
    before, after = on_disk(tmp_path / "hf"), on_disk(out)
    assert before.keys() == after.keys()
    frozen = {name for name in before if "projector" not in name}
    assert same_bits({n: before[n] for n in frozen}, {n: after[n] for n in frozen})
    assert any(not torch.equal(before[n], after[n]) for n in before.keys() - frozen)
    assert json.loads((out / "config.json").read_text())["image_token_index"] == SIZE + 1
    tf.AutoProcessor.from_pretrained(out)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("frozen", [True, False])
def test_an_encoder_of_transformers_is_trained_with(frozen, precision, tmp_path):
    """DINOv2, run by transformers' code, in the loop: sharded, in either precision, frozen or trained, and saved."""
    config = tf.Dinov2Config(hidden_size=32, num_hidden_layers=3, num_attention_heads=2, image_size=28, patch_size=14, mlp_ratio=2)
    build(config, tmp_path / "seen")
    settings = {
        "size": {"height": 28, "width": 28},
        "do_center_crop": False,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
    }
    (tmp_path / "seen" / "preprocessor_config.json").write_text(json.dumps(settings))
    asked = [*TINY, f"precision={precision}", f"init.vision={tmp_path / 'seen'}", f"out={tmp_path / 'run'}"]
    asked += ["model.decoder.layers=1", f"trainable=[projector.*{'' if frozen else ', vision.*'}]", "data.sources.0.mock.text_only_every=3"]
    last = api.train("llava-tiny/pretrain", asked, say=lambda text: None)
    start = next((tmp_path / "cache" / "imports").glob("seen-*/weights"))
    names = [name for name in index.stored(start) if name.endswith("patch_embeddings.projection.weight") or ".layer.0." in name]
    changed = [not torch.equal(index.read(start, n).bfloat16(), index.read(last / "weights", n).bfloat16()) for n in names]
    assert len(names) > 5 and any(changed) == (not frozen)


def test_a_nemo_decoder_is_trained_on(tmp_path):
    """init.decoder takes a .nemo as it takes a folder."""
    both = pair(llama(vocab_size=72, max_position_embeddings=512), tmp_path / "hf")
    archive = write(tmp_path / "model.nemo", dict(both.ours.named_parameters()), both.ours.config.decoder, core=True, tp=2)
    _, seen = parts(tmp_path)
    asked = [*TINY, f"init.decoder={archive}", f"init.vision={seen}", "optim.lr=0.0", f"data.tokenizer={TOKENIZER}", "model.decoder.vocab=72"]
    with pytest.raises(ValueError, match="the tokenizer has 376 tokens but model.decoder.vocab=72"):
        api.train("llava-tiny/pretrain", [*asked, f"out={tmp_path / 'run'}"], say=lambda text: None)
    (stage,) = api.recipe("llava-tiny/pretrain", asked)
    assert stage.model.decoder == replace(both.ours.config.decoder, head_width=None)  # which is what it would be anyway
    place = next((tmp_path / "cache" / "imports").glob("model.nemo-*/manifest.json")).parent
    assert torch.equal(index.read(place / "weights", "decoder.embed.weight"), both.ours.decoder.embed.weight)


def test_show_reads_no_weights_of_a_nemo_decoder(tmp_path):
    """`neva show` takes the config of an archive whose weights are gone, and imports nothing.

    Its output is YAML alone, which trains as it stands.
    """
    both = pair(llama(vocab_size=390, max_position_embeddings=512), tmp_path / "hf")
    config = both.ours.config.decoder
    whole = write(tmp_path / "whole.nemo", dict(both.ours.named_parameters()), config, core=True)
    hollow = tmp_path / "hollow.nemo"
    with tarfile.open(whole) as archive, tarfile.open(hollow, "w") as emptied:
        for member in archive:
            if member.isfile() and not member.name.endswith((".ckpt", ".pt")):
                emptied.addfile(member, archive.extractfile(member))
    assert hollow.stat().st_size < whole.stat().st_size / 2
    asked = [*TINY, f"data.tokenizer={TOKENIZER}", f"model.decoder.vocab={config.vocab}"]
    for path in (whole, hollow):
        command = ["show", "llava-tiny/pretrain", *asked, f"init.decoder={path}"]
        done = CliRunner().invoke(main, command, catch_exceptions=False)
        assert (done.exit_code, done.stderr) == (0, "")
        (tmp_path / "shown.yaml").write_text(done.stdout)
        (shown,) = yaml.safe_load(done.stdout)
        assert shown["init"]["decoder"] == str(path)
        assert shown["model"]["decoder"]["width"] == config.width
        (stage,) = tree.load(tmp_path / "shown.yaml", TrainConfig)
        assert stage.model.decoder == replace(config, head_width=None)
        files = [file for file in (tmp_path / "cache").rglob("*") if file.is_file()]
        assert {file.suffix for file in files} <= {".yaml", ".model", ".json"}
        assert not (tmp_path / "cache" / "imports").exists()
    with pytest.raises(ValueError, match="holds no weights"):
        api.import_checkpoint([hollow], tmp_path / "out", say=lambda text: None)


def llava_without_encoder(folder: Path) -> tuple[str, str]:
    """A LLaVA of the original repository that reads the encoder's last layer, and that encoder, with room for text."""
    original(folder, max_position_embeddings=512)
    described = json.loads((folder / "llava" / "config.json").read_text())
    (folder / "llava" / "config.json").write_text(json.dumps({**described, "mm_vision_select_layer": -1}))
    return str(folder / "llava"), str(folder / "clip")


def test_a_llava_is_imported_with_its_encoder(tmp_path):
    """init.model and init.vision of a LLaVA without encoder are one import: the model is that of `neva import`, in a dry run too."""
    llava, seen = llava_without_encoder(tmp_path)
    asked = [*TINY, f"init.model={llava}", f"init.vision={seen}", f"out={tmp_path / 'run'}", "optim.lr=0.0"]
    said: list[str] = []
    api.dry_run("llava-tiny/finetune", asked, say=said.append)
    assert not (tmp_path / "cache").exists()  # a dry run reads configs alone
    last = api.train("llava-tiny/finetune", asked, say=said.append)
    assert sum("Importing" in line for line in said) == 1
    whole = api.import_checkpoint([llava, seen], tmp_path / "neva", say=said.append)
    names = index.stored(whole / "weights")
    assert names.keys() == index.stored(last / "weights").keys()
    assert all(torch.equal(index.read(whole / "weights", name), index.read(last / "weights", name)) for name in names)
    (stage,) = api.recipe("llava-tiny/finetune", asked)
    assert stage.model.vision.select_layer == -1 and stage.model.image.aspect == "pad"
    out = api.export_checkpoint(last, tmp_path / "out", say=said.append)
    quiet_load(tf.LlavaForConditionalGeneration, out)


@pytest.mark.parametrize("part", ["decoder", "projector"])
def test_a_part_of_a_llava_without_encoder(part, tmp_path):
    """Its decoder or projector alone comes out of the same import, beside the encoder, which is imported by itself."""
    llava, seen = llava_without_encoder(tmp_path)
    asked = [*TINY, f"init.{part}={llava}", f"init.vision={seen}", f"out={tmp_path / 'run'}", "optim.lr=0.0"]
    asked += ["model.projector=mlp2x_gelu", "model.decoder.width=48"] if part == "projector" else []
    last = api.train("llava-tiny/finetune", asked, say=lambda text: None)
    name, theirs = {"decoder": ("decoder.embed.weight", "model.embed_tokens.weight"), "projector": ("projector.0.weight",) * 2}[part]
    state = torch.load(Path(llava) / "pytorch_model.bin", weights_only=True)
    assert torch.equal(index.read(last / "weights", name), state[theirs.replace("projector.", "model.mm_projector.")])


def test_a_neva_is_imported_with_its_encoder(tmp_path):
    """The same of a NeMo archive, whose config is read without unpacking it."""
    both = pair(vlm(llama(vocab_size=390, max_position_embeddings=512)), tmp_path / "hf")
    both.theirs.model.vision_tower.save_pretrained(tmp_path / "clip")
    archive = write(tmp_path / "neva.nemo", dict(both.ours.named_parameters()), both.ours.config.decoder, core=True, more=NEVA)
    assert is_neva(archive) and not list(tmp_path.glob("*unpacked*"))
    asked = [*TINY, f"init={archive}", f"init.vision={tmp_path / 'clip'}", f"data.tokenizer={TOKENIZER}", f"out={tmp_path / 'run'}", "optim.lr=0.0"]
    last = api.train("llava-tiny/finetune", asked, say=lambda text: None)
    assert len(list((tmp_path / "cache" / "imports").glob("*/manifest.json"))) == 1
    assert torch.equal(index.read(last / "weights", "projector.2.weight"), both.ours.projector[2].weight)


def test_a_llava_without_its_encoder_is_refused_before_anything_starts(tmp_path):
    """The message names the key of a recipe; an encoder that is a checkpoint of ours cannot be imported with it."""
    llava, seen = llava_without_encoder(tmp_path)
    for more in ([], [f"init.vision={api.import_checkpoint([seen], tmp_path / 'seen', say=lambda text: None)}"]):
        with pytest.raises(ValueError, match=r"llava \(llava-original\) does not hold its encoder: give .* in a recipe with init.vision=FOLDER"):
            api.dry_run("llava-tiny", [*TINY, f"init={llava}", *more, f"out={tmp_path / 'run'}"], say=lambda text: None)


def test_a_processor_of_another_size_is_refused_before_anything_starts(tmp_path):
    """What an import of the encoder would refuse, a dry run refuses."""
    _, seen = parts(tmp_path)
    settings = {"size": {"height": 56, "width": 56}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (tmp_path / "seen" / "preprocessor_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="brings images to 56 pixels, its encoder takes 28"):
        api.dry_run("llava-tiny", [*TINY, f"init.vision={seen}", f"out={tmp_path / 'run'}"], say=lambda text: None)


def test_what_was_asked_for_comes_before_what_init_brings(tmp_path):
    """Overrides of the model win over the config that init finds; one that does not fit the weights is refused by name."""
    text, seen = parts(tmp_path)
    (stage,) = api.recipe(
        "llava-tiny/finetune", [f"init.decoder={text}", f"init.vision={seen}", "model.decoder.hidden_dropout=0.1", "model.vision.select_layer=-1"]
    )
    assert stage.model.decoder.hidden_dropout == 0.1 and stage.model.vision.select_layer == -1 and stage.model.decoder.width == 48
    with pytest.raises(ValueError, match="init.decoder is of another model: decoder.blocks.0.mlp.gate.weight has"):
        api.train("llava-tiny/finetune", [*TINY, f"init.decoder={text}", "model.decoder.ffn=64", f"out={tmp_path / 'run'}"], say=lambda text: None)


def test_bad_inits_are_named(tmp_path):
    """A path that holds nothing, or another part, is said before anything starts."""
    text, seen = parts(tmp_path)
    with pytest.raises(ValueError, match="No checkpoint at"):
        api.recipe("llava-tiny", [f"init.decoder={tmp_path / 'nothing'}"])
    with pytest.raises(ValueError, match=f"init.decoder={seen} holds no decoder"):
        api.recipe("llava-tiny", [f"init.decoder={seen}"])
    with pytest.raises(ValueError, match=f"init.model={text} holds no whole model"):
        api.recipe("llava-tiny", [f"init={text}"])
    with pytest.raises(ValueError, match="hf:no-such/model could not be fetched"):
        api.import_checkpoint(["hf:no-such/model"], tmp_path / "x")


@pytest.mark.parametrize("name", ["llava15-7b", "neva-llama3-8b", "neva-mixtral"])
def test_dry_run(name, tmp_path, capsys):
    """A large recipe says that its samples are made up, what is trained, and the memory of each rank; and writes nothing."""
    api.dry_run(name, ["data.workers=0", f"out={tmp_path / 'run'}"], ranks=8)
    said = capsys.readouterr().out
    assert said.startswith("data.source and data.folder are not set: pretrain, finetune will train on made-up text and images")
    assert "Memory of 8 ranks, each, in GiB" in said and "Device found: " in said
    assert "  pretrain: " in said and "  finetune: " in said
    assert not (tmp_path / "run").exists()


def test_memory_by_hand():
    """LLaVA-1.5 7B in bf16 on 8 ranks: 6.76 G parameters are trained in finetune, 16 bytes each; the encoder is stored in bf16."""
    from neva import plan

    _, finetune = api.recipe("llava15-7b")
    m = plan.memory(finetune, ranks=8, precision="bf16")
    trained, frozen = 6_738_415_616 + 20_979_712, 290_909_184
    assert m.gradients == -(-4 * trained // 8) and m.optimiser == -(-8 * trained // 8)
    assert abs(m.weights - (4 * trained + 2 * frozen) / 8) < 1e6
    assert m.total == m.weights + m.gradients + m.optimiser + m.gathered + m.activations
