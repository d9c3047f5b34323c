"""A projector by itself: LLaVA's mm_projector.bin, our own export, and files that are none."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from neva import api
from neva.checkpoint import index
from neva.checkpoint.inspect import inspect
from neva.checkpoint.manifest import CheckpointError
from neva.checkpoint.target import ExportOptions
from neva.models.vlm import PROJECTORS, projector
from tests.families import clip, on_disk

WIDTH, OUT, FFN = 32, 48, 60
TINY = (
    "data.sources=[{mock: {samples: 60, words: [4, 20]}}]", "batch.seq_length=192", "batch.rows=2", "data.workers=0", "steps=2",
    "precision=fp32", "log.tensorboard=false", "data.template=v1", "optim.lr=0.0",
    f"model.decoder.width={OUT}", "model.decoder.heads=4", "model.decoder.kv_heads=4", "model.decoder.layers=1",
    f"model.vision.width={WIDTH}", "model.vision.heads=2", "model.vision.layers=2",
)  # fmt: skip
"""llava-tiny around a projector from 32 to 48, which a learning rate of 0 leaves as it is."""


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("NEVA_CACHE", str(tmp_path / "cache"))


def llavas_own(kind: str) -> nn.Module:
    """LLaVA's `build_vision_projector`, written out."""
    torch.manual_seed(0)
    if kind == "linear":
        return nn.Linear(WIDTH, OUT)
    layers: list[nn.Module] = [nn.Linear(WIDTH, OUT)]
    for _ in range(1, int(kind[3])):
        layers += [nn.GELU(), nn.Linear(OUT, OUT)]
    return nn.Sequential(*layers)


def stage_one(folder: Path, kind: str, prefix: str = "model.mm_projector.", **fields) -> nn.Module:
    """What LLaVA's first stage leaves: mm_projector.bin beside a config.json without weights."""
    made = llavas_own(kind)
    folder.mkdir(parents=True)
    torch.save({prefix + name: tensor for name, tensor in made.state_dict().items()}, folder / "mm_projector.bin")
    described = {"model_type": "llava_llama", "mm_vision_tower": "x", "mm_hidden_size": WIDTH, "hidden_size": OUT, "mm_projector_type": kind}
    (folder / "config.json").write_text(json.dumps({**described, **fields}))
    return made


def trained(*asked: str, out: Path) -> dict[str, Tensor]:
    """The projector of a stage that starts from what is asked for."""
    last = api.train("llava-tiny/finetune", [*TINY, *asked, f"out={out}"], say=str)
    tensors = index.Tensors(last / "weights")
    return {name: tensors.read(name) for name in tensors.described if name.startswith(("projector.", "image_"))}


@pytest.mark.parametrize("kind", ["linear", "mlp2x_gelu", "mlp3x_gelu"])
@pytest.mark.parametrize("given", ["folder", "file"])
def test_llavas_first_stage_is_gone_on_with(kind: str, given: str, tmp_path: Path) -> None:
    """The stage's projector computes what LLaVA's does; a dry run takes it too."""
    made = stage_one(tmp_path / "pretrained", kind)
    path = tmp_path / "pretrained" / ("mm_projector.bin" if given == "file" else "")
    asked = [f"init.projector={path}", f"model.projector={kind}"]
    api.dry_run("llava-tiny/finetune", [*TINY, *asked], say=str)
    found = trained(*asked, out=tmp_path / "run")
    ours = projector(kind, WIDTH, OUT, FFN)
    ours.load_state_dict({name.removeprefix("projector."): tensor for name, tensor in found.items()}, strict=True)
    x = torch.randn(5, WIDTH)
    assert torch.equal(ours(x), made(x))


@pytest.mark.parametrize("prefix", ["mm_projector.", "model.mm_projector."])
def test_a_folder_without_a_config(prefix: str, tmp_path: Path) -> None:
    """The names and shapes say what it is; LLaVA's checkpoints on the way have other names of
    files."""
    made = stage_one(tmp_path / "a", "mlp2x_gelu", prefix)
    (tmp_path / "a" / "config.json").unlink()
    assert inspect(tmp_path / "a")["projector"] == f"mlp2x_gelu, from features of width {WIDTH} to {OUT}"
    (tmp_path / "mm_projector").mkdir()
    (tmp_path / "a" / "mm_projector.bin").rename(tmp_path / "mm_projector" / "checkpoint-200.bin")
    found = trained(f"init.projector={tmp_path / 'mm_projector' / 'checkpoint-200.bin'}", "model.projector=mlp2x_gelu", out=tmp_path / "run")
    assert torch.equal(found["projector.2.weight"], made[2].weight)


def test_with_an_encoder_of_its_own(tmp_path: Path) -> None:
    """init.vision beside it is another import: the folder's config.json names LLaVA's encoder, but
    holds no model."""
    from tests.families import build

    made = stage_one(tmp_path / "pretrained", "mlp2x_gelu")
    build(clip(), tmp_path / "seen")
    asked = [f"init.projector={tmp_path / 'pretrained'}", f"init.vision={tmp_path / 'seen'}", "model.projector=mlp2x_gelu"]
    asked = [text for text in TINY if "model.vision" not in text] + asked
    last = api.train("llava-tiny/finetune", [*asked, f"out={tmp_path / 'run'}"], say=str)
    tensors = index.Tensors(last / "weights")
    assert torch.equal(tensors.read("projector.0.weight"), made[0].weight)
    assert torch.equal(tensors.read("vision.patch.weight"), on_disk(tmp_path / "seen")["embeddings.patch_embedding.weight"])


EXPORTED = ["linear", "mlp2x_gelu", "norm_mlp2x_gelu", "norm_linear", "norm_ffn_gelu"]


@pytest.mark.parametrize("kind", EXPORTED)
def test_our_own_export_comes_back(kind: str, tmp_path: Path) -> None:
    """Of every projector that has weights, into a stage and as a checkpoint by itself."""
    assert {next(pattern for pattern in PROJECTORS if __import__("re").fullmatch(pattern, kind))} <= PROJECTORS.keys()
    last = api.train("llava-tiny/finetune", [*TINY, f"model.projector={kind}", "optim.lr=0.01", f"out={tmp_path / 'first'}"], say=str)
    out = api.export_checkpoint(last, tmp_path / "out", options=ExportOptions(part="projector"), say=str)
    found = trained(f"init.projector={out}", f"model.projector={kind}", "seed=7", out=tmp_path / "then")
    before = index.Tensors(last / "weights")
    assert found and all(torch.equal(before.read(name), tensor) for name, tensor in found.items())
    place = api.import_checkpoint([out], tmp_path / "alone", say=str)
    assert inspect(place)["projector"].startswith(f"{kind}, ") and inspect(out)["holds"] == "projector"
    assert "largest difference to transformers 0.0e+00" in inspect(place)["origin"]


def test_learned_vectors_go_with_it(tmp_path: Path) -> None:
    """The vectors of start and end belong to the projector, out and in again."""
    more = ["model.use_im_start_end=true", "model.projector=linear"]
    last = api.train("llava-tiny/finetune", [*TINY, *more, "optim.lr=0.01", f"out={tmp_path / 'first'}"], say=str)
    out = api.export_checkpoint(last, tmp_path / "out", options=ExportOptions(part="projector"), say=str)
    found = trained(f"init.projector={out}", *more, "seed=7", out=tmp_path / "then")
    assert torch.equal(found["image_vectors"], index.read(last / "weights", "image_vectors"))
    with pytest.raises(ValueError, match="init.projector is of another model: image_vectors has .* there and nothing here"):
        trained(f"init.projector={out}", "model.projector=linear", out=tmp_path / "x")


def test_another_projector_is_named(tmp_path: Path) -> None:
    stage_one(tmp_path / "a", "linear")
    asked = [*TINY, f"init.projector={tmp_path / 'a'}", "model.projector=mlp2x_gelu"]
    with pytest.raises(ValueError, match="init.projector is of another model: .*; say model.projector=linear, or take another"):
        api.dry_run("llava-tiny/finetune", asked, say=str)
    with pytest.raises(ValueError, match="holds no whole model"):
        api.recipe("llava-tiny", [f"init.model={tmp_path / 'a'}"])
    with pytest.raises(ValueError, match="holds no decoder"):
        api.recipe("llava-tiny", [f"init.decoder={tmp_path / 'a'}"])


def nothing(path: Path) -> str:
    save_file({"a": torch.ones(2)}, path)
    return "holds no projector: expected names such as model.mm_projector.0.weight, found others"


def half(path: Path) -> str:
    state = {f"model.mm_projector.{name}": tensor.detach().contiguous() for name, tensor in llavas_own("mlp2x_gelu").state_dict().items()}
    del state["model.mm_projector.2.bias"]
    save_file(state, path)
    return "'model.mm_projector.2.bias' is missing"


def with_embedding(path: Path) -> str:
    """LLaVA trains the embedding beside it with mm_use_im_start_end."""
    state = {f"model.mm_projector.{name}": tensor.detach().contiguous() for name, tensor in llavas_own("linear").state_dict().items()}
    save_file({**state, "model.embed_tokens.weight": torch.ones(9, OUT)}, path)
    return "'model.embed_tokens.weight' is unexpected"


def broken(path: Path) -> str:
    path.write_bytes(b"\x08" + bytes(7) + b"notjson!")
    return "cannot be read"


@pytest.mark.parametrize("made", [nothing, half, with_embedding, broken])
def test_files_that_hold_no_projector(made, tmp_path: Path) -> None:
    said = made(tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match=said) as caught:
        api.import_checkpoint([tmp_path / "x.safetensors"], tmp_path / "neva", say=str)
    assert "\n" not in str(caught.value) and not list(tmp_path.glob("neva*"))


def test_a_projector_answers_nothing(tmp_path: Path) -> None:
    stage_one(tmp_path / "a", "linear")
    place = api.import_checkpoint([tmp_path / "a"], tmp_path / "neva", say=str)
    with pytest.raises(ValueError, match="holds a projector alone, which cannot answer"):
        api.load(place)
    with pytest.raises(CheckpointError, match="holds a projector alone"):
        api.export_checkpoint(place, tmp_path / "out", say=str)
