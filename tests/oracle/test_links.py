"""Links in a folder that is imported: those of a Hub cache into its own blobs are files, others are not followed."""

import json
import shutil
from pathlib import Path

import pytest
import transformers as tf

from neva import api
from neva.checkpoint.manifest import CheckpointError
from neva.models.decoder import DecoderConfig
from neva.models.vlm import VLM, VLMConfig
from tests.families import build, llama, on_disk
from tests.nemo import write_distributed
from tests.oracle.test_convert import SIZE, add_text, same_bits

SECRET = json.dumps({"password": "hunter2"})


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A decoder with a tokenizer and generation settings, without links."""
    folder = tmp_path_factory.mktemp("plain") / "decoder"
    build(llama(vocab_size=SIZE, max_position_embeddings=512, bos_token_id=0, eos_token_id=1), folder)
    add_text(folder, image=False, pad=False)
    tf.GenerationConfig(eos_token_id=[1]).save_pretrained(folder)
    return folder


def cached(plain: Path, hub: Path) -> Path:
    """The folder as huggingface_hub keeps it: each name a relative link to a blob. Gives the snapshot."""
    model = hub / "models--org--name"
    snapshot = model / "snapshots" / "0a1b2c"
    snapshot.mkdir(parents=True)
    (model / "blobs").mkdir()
    for number, file in enumerate(sorted(plain.iterdir())):
        shutil.copy(file, model / "blobs" / f"{number:040x}")
        (snapshot / file.name).symlink_to(f"../../blobs/{number:040x}")
    return snapshot


def taken(folder: Path, out: Path, said: list[str] | None = None) -> Path:
    say = (said if said is not None else []).append
    return api.import_checkpoint([folder], out, parity=False, say=say)


def test_a_hub_cache_is_imported_as_the_files_that_it_links(plain: Path, tmp_path: Path) -> None:
    snapshot = cached(plain, tmp_path / "hub")
    assert all(path.is_symlink() for path in snapshot.iterdir())
    said: list[str] = []
    linked, copied = taken(snapshot, tmp_path / "linked", said), taken(plain, tmp_path / "copied")
    assert not [line for line in said if "left out" in line]
    kept = {path.relative_to(copied) for path in (copied / "source").rglob("*")}
    assert Path("source/decoder/generation_config.json") in kept
    assert {path.relative_to(linked) for path in (linked / "source").rglob("*")} == kept
    assert not any(path.is_symlink() for path in linked.rglob("*"))
    out = api.export_checkpoint(linked, tmp_path / "out", parity=False)
    assert same_bits(on_disk(out), on_disk(plain))


def test_a_hub_cache_under_a_link_is_one_too(plain: Path, tmp_path: Path) -> None:
    """The whole cache may lie on another disk."""
    snapshot = cached(plain, tmp_path / "disk" / "hub")
    (tmp_path / "home").symlink_to(tmp_path / "disk")
    assert (taken(tmp_path / "home" / snapshot.relative_to(tmp_path / "disk"), tmp_path / "out") / "manifest.json").is_file()


def other_models_blob(snapshot: Path) -> Path:
    place = snapshot.parents[2] / "models--other--private" / "blobs" / "1"
    place.parent.mkdir(parents=True)
    return place


def beside_the_blobs(snapshot: Path) -> Path:
    return snapshot.parents[1] / "secret"


def through_the_blobs(snapshot: Path) -> Path:
    """Where a link from the blobs leads on."""
    return snapshot.parents[3] / "secret"


def like_the_blobs(snapshot: Path) -> Path:
    """A name that only begins as theirs."""
    place = snapshot.parents[1] / "blobs-of-mine" / "1"
    place.parent.mkdir()
    return place


@pytest.mark.parametrize("place", [other_models_blob, beside_the_blobs, through_the_blobs, like_the_blobs])
@pytest.mark.parametrize("name", ["generation_config.json", "tokenizer_config.json"])
def test_a_link_elsewhere_is_not_followed(name: str, place, plain: Path, tmp_path: Path) -> None:
    snapshot = cached(plain, tmp_path / "hub")
    secret = place(snapshot)
    secret.write_text(SECRET)
    blob = snapshot / name
    if place is through_the_blobs:
        blob = blob.resolve()
    blob.unlink()
    blob.symlink_to(secret)
    assert (snapshot / name).read_text() == SECRET
    out, said = tmp_path / "out", []
    if name == "tokenizer_config.json":
        with pytest.raises(CheckpointError, match=rf"{name} is a link that leads out of its folder"):
            taken(snapshot, out)
        assert not out.exists()
        return
    taken(snapshot, out, said)
    assert any(f"{name} is left out" in line for line in said)
    assert not any("hunter2" in path.read_text(errors="replace") for path in (out / "source").rglob("*") if path.is_file())


def test_folders_that_are_named_as_a_caches_make_none(plain: Path, tmp_path: Path) -> None:
    """A stranger's archive with a folder snapshots/ in it: its links may not leave for any blobs/ above."""
    folder = tmp_path / "blobs" / "snapshots" / "model"
    shutil.copytree(plain, folder)
    secret = tmp_path / "blobs" / "secret.json"
    secret.write_text(SECRET)
    (folder / "tokenizer_config.json").unlink()
    (folder / "tokenizer_config.json").symlink_to(secret)
    with pytest.raises(CheckpointError, match="leads out of its folder"):
        taken(folder, tmp_path / "out")


@pytest.mark.parametrize("name", ["model_config.yaml", "tokenizer.model"])
def test_a_link_out_of_a_nemo_folder_is_not_followed(name: str, tmp_path: Path) -> None:
    small = DecoderConfig(vocab=512, width=16, layers=1, heads=2, kv_heads=2, ffn=24)
    model = VLM(VLMConfig(decoder=small, vision=None, projector="none"))
    tensors = dict(model.named_parameters())
    for tensor in tensors.values():
        tensor.data.normal_(0, 0.1)
    folder = write_distributed(tmp_path / "nemo", tensors, small, "torch_dist")
    shutil.copy(Path(__file__).parents[1] / "data" / "tiny.model", folder / "tokenizer.model")
    taken(folder, tmp_path / "sound")
    (folder / name).rename(tmp_path / "elsewhere")
    (folder / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match=rf"{name} is a link that leads out of its folder"):
        taken(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()
