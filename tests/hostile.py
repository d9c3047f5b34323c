"""Files that were made to harm, and the command that would fall for each:
what `test_hostile.py` runs.

`python -m tests.hostile FOLDER` writes them all, to look at or to run by hand.

Each function of `CORPUS` gets a folder to write to and gives the command. Whatever would run code
runs `canary`, which leaves a file of that name in the working folder.
"""

import gzip
import io
import json
import os
import pickle
import re
import shutil
import struct
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from neva import api
from neva.checkpoint.hf import Options
from neva.checkpoint.manifest import MANIFEST, Manifest, digests, listing, serialise
from neva.models.decoder import DecoderConfig
from neva.models.vlm import VLM, VLMConfig
from tests.families import build, clip, llama
from tests.nemo import config_of, write, write_distributed
from tests.oracle.test_convert import SIZE, add_text

SMALL = DecoderConfig(vocab=512, width=16, layers=2, heads=2, kv_heads=2, ffn=24)
"""The decoder of NeMo's files; its vocabulary is that of tests/data/tiny.model."""
CANARY = "the canary sang\n"


@dataclass(frozen=True, kw_only=True)
class Case:
    """A command, and what must come of it."""

    command: tuple[str, ...]
    says: tuple[str, ...] = ()
    """Words of its one line of an error."""
    works: bool = False
    """Does the command do its work, and the harm alone does not happen?"""
    secret: str = ""
    """A text that may be in no file that the command writes."""


class Runs:
    """Unpickled, it runs the canary."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (exec, (f"import pathlib; pathlib.Path('canary').write_text({CANARY!r})",))


@dataclass(frozen=True)
class Place:
    """Folders of one case: `theirs` is hostile, `mine` holds what is the user's own."""

    folder: Path
    base: Path = field(default=Path())
    """Sound models to make hostile ones of."""

    @property
    def theirs(self) -> Path:
        return self.folder / "theirs"

    @property
    def mine(self) -> Path:
        return self.folder / "mine"

    @property
    def out(self) -> str:
        return str(self.mine / "out")

    def copy(self, name: str) -> Path:
        """A sound model, to be changed."""
        return Path(shutil.copytree(self.base / name, self.theirs / name, symlinks=True))

    def ask(self, checkpoint: Path, *more: str) -> tuple[str, ...]:
        """A question to a checkpoint."""
        return ("generate", str(checkpoint), "--prompt", "What?", "--max-new-tokens", "1", *more)

    def take(self, source: Path, *more: str) -> tuple[str, ...]:
        """An import."""
        return ("import", str(source), "--out", self.out, *more)

    def train(self, *overrides: str) -> tuple[str, ...]:
        """A step of training on the hostile data file `theirs/data.json`."""
        data = (f"data.source={self.theirs}/data.json", f"data.image_folder={self.theirs}")
        small = ("data.workers=0", "batch.seq_length=256", "batch.rows=2", "steps=1", "log.tensorboard=false")
        return ("train", "llava-tiny/finetune", *data, *small, f"out={self.out}", *overrides)

    def rows(self, *rows: Mapping[str, Any] | str) -> None:
        """The data file; a row may be the text of one."""
        texts = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        (self.theirs / "data.json").write_text("[" + ",\n".join(texts) + "]")


def make_base(folder: Path) -> Path:
    """Sound models: a decoder, a checkpoint of a VLM, and a decoder as a NeMo archive and
    folder."""
    text = llama(vocab_size=SIZE + 14, max_position_embeddings=512, bos_token_id=0, eos_token_id=1)
    build(text, folder / "decoder")
    add_text(folder / "decoder", image=False, pad=False)
    build(clip(), folder / "vision")
    sources = [folder / "decoder", folder / "vision"]
    options = Options(template="v1")
    api.import_checkpoint(sources, folder / "checkpoint", options=options, parity=False)
    small = SMALL
    model = VLM(VLMConfig(decoder=small, vision=None, projector="none"))
    tensors = dict(model.named_parameters())
    for tensor in tensors.values():
        tensor.data.normal_(0, 0.1)
    (folder / "nemo").mkdir()
    write(folder / "nemo" / "model.nemo", tensors, small, core=True)
    for kind in ("torch_dist", "zarr"):
        write_distributed(folder / kind, tensors, small, kind)
    return folder


def change_config(folder: Path, **fields: Any) -> Path:
    """Fields of a config.json set."""
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    return folder


def reseal(folder: Path) -> Path:
    """A checkpoint with a manifest that matches what it holds now: a manifest
    authenticates nobody."""
    files = digests(folder, listing(folder))
    sealed = asdict(Manifest(step=0, files=dict(sorted(files.items()))))
    (folder / MANIFEST).write_bytes(serialise(sealed))
    return folder


def change_index(folder: Path, change: Callable[[Any], None]) -> Path:
    """A DCP index with something changed in it."""
    index = pickle.loads((folder / ".metadata").read_bytes())
    change(index)
    (folder / ".metadata").write_bytes(pickle.dumps(index))
    return folder


def png(width: int, height: int, pixels: bytes) -> bytes:
    """A grey PNG whose header says this size."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(pixels)) + chunk(b"IEND", b"")


def row(id: str = "a", **fields: Any) -> dict[str, Any]:
    talk = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A star."}]
    return {"id": id, "image": "a.png", "conversations": talk, **fields}


def archive(path: Path, members: Mapping[str, bytes], *, mode: Any = "w") -> Path:
    with tarfile.open(path, mode) as file:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))
    return path


def nemo_config() -> bytes:
    return yaml.safe_dump(config_of(SMALL)).encode()


LAUGHS = "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10) if n else 'ha'}]\n" for n in range(12))
"""Twelve lines that unfold to 10^12 values."""
MERGED = "".join(f"a{n}: &a{n} {{{'<<: [' + ', '.join([f'*a{n - 1}'] * 10) + ']' if n else 'x: 1'}}}\n" for n in range(9))
"""The same by merged keys, which are copied when they are read."""


# Code in weights and beside them.


def pickled_weights(at: Place) -> Case:
    """A torch file that runs code when it is unpickled."""
    folder = at.copy("decoder")
    (folder / "model.safetensors").unlink()
    torch.save({"model.embed_tokens.weight": Runs()}, folder / "pytorch_model.bin")
    return Case(command=at.take(folder), says=("pytorch_model.bin", "would run code"))


def pickled_weights_of_old(at: Place) -> Case:
    """The same in torch's format before 1.6, a bare pickle."""
    folder = at.copy("decoder")
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Runs()))
    return Case(command=at.take(folder), says=("pytorch_model.bin",))


def pickled_nemo(at: Place) -> Case:
    buffer = io.BytesIO()
    torch.save({"model.embedding": Runs()}, buffer)
    members = {"model_config.yaml": nemo_config(), "model_weights.ckpt": buffer.getvalue()}
    path = archive(at.theirs / "model.nemo", members)
    return Case(command=at.take(path), says=("model_weights.ckpt", "would run code"))


def index_that_runs(at: Place) -> Case:
    folder = at.copy("checkpoint")
    (folder / "weights" / ".metadata").write_bytes(pickle.dumps(Runs()))
    return Case(command=at.ask(reseal(folder)), says=(".metadata", "would run code"))


def index_record_that_runs(at: Place) -> Case:
    """A record that DCP hands to pickle, in a weight's place."""
    folder = at.copy("checkpoint")

    def change(index: Any) -> None:
        index.state_dict_metadata["head.weight"] = BytesStorageMetadata()

    change_index(folder / "weights", change)
    file = next((folder / "weights").glob("*.distcp"))
    buffer = io.BytesIO()
    torch.save(Runs(), buffer)
    file.write_bytes(buffer.getvalue() + file.read_bytes())
    return Case(command=at.ask(reseal(folder)), says=("head.weight", "would run code"))


def function_in_generate(at: Place) -> Case:
    return Case(command=at.ask(_with_function(at)), says=("canary_module:run", "--trust-code"))


def function_in_training(at: Place) -> Case:
    at.rows(row())
    Image.new("RGB", (9, 9)).save(at.theirs / "a.png")
    command = at.train(f"init.model={_with_function(at)}")
    return Case(command=command, says=("canary_module:run", "--trust-code"))


def function_in_inspect(at: Place) -> Case:
    return Case(command=("inspect", str(_with_function(at))), works=True)


def _with_function(at: Place) -> Path:
    folder = at.copy("checkpoint")
    described = yaml.safe_load((folder / "neva.yaml").read_text())
    described["model"]["image"]["process"] = "canary_module:run"
    (folder / "neva.yaml").write_text(yaml.safe_dump(described))
    return reseal(folder)


def object_in_yaml(at: Place) -> Case:
    folder = at.copy("checkpoint")
    with (folder / "neva.yaml").open("a") as file:
        file.write("\nextra: !!python/object/apply:os.system ['touch canary']\n")
    return Case(command=at.ask(reseal(folder)), says=("neva.yaml",))


def code_beside_tokenizer(at: Place) -> Case:
    folder = at.copy("decoder")
    (folder / "theirs.py").write_text("open('canary', 'w').write('x')\nclass Tokenizer: pass\n")
    path = folder / "tokenizer_config.json"
    mapped = {"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": ["theirs.Tokenizer"] * 2}}
    path.write_text(json.dumps({**json.loads(path.read_text()), **mapped}))
    return Case(command=at.take(folder), works=True)


def postscript(at: Place) -> Case:
    """A program in place of an image, which Pillow gives to Ghostscript."""
    at.rows(row())
    image = io.BytesIO()
    Image.new("RGB", (8, 8)).save(image, "EPS")
    (at.theirs / "a.png").write_bytes(image.getvalue())
    return Case(command=at.train(), says=("sample 'a'", "none of the formats"))


# Ways out of a folder.


def index_leads_up(at: Place) -> Case:
    return _index_names(at, "../../../mine/letter.txt")


def index_is_absolute(at: Place) -> Case:
    return _index_names(at, str(at.mine / "letter.txt"))


def _index_names(at: Place, name: str) -> Case:
    folder = at.copy("checkpoint")

    def change(index: Any) -> None:
        for info in index.storage_data.values():
            info.relative_path = name

    change_index(folder / "weights", change)
    return Case(command=at.ask(reseal(folder)), says=("files outside its folder",))


def nemo_index_leads_up(at: Place) -> Case:
    folder = at.copy("torch_dist")
    shutil.move(folder / "model_weights" / "__0_0.distcp", at.theirs / "elsewhere")

    def change(index: Any) -> None:
        for info in index.storage_data.values():
            info.relative_path = "../../elsewhere"

    change_index(folder / "model_weights", change)
    return Case(command=at.take(folder), says=("files outside its folder",))


def shards_lead_up(at: Place) -> Case:
    folder = at.copy("decoder")
    shutil.move(folder / "model.safetensors", at.theirs / "elsewhere.safetensors")
    index = {"weight_map": {"model.embed_tokens.weight": "../elsewhere.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return Case(command=at.take(folder), says=("files outside its folder",))


def member_leads_up(at: Place) -> Case:
    path = archive(
        at.theirs / "model.nemo",
        {"../evil.txt": b"evil", "model_config.yaml": nemo_config()},
    )
    return Case(command=at.take(path), says=("evil.txt",))


def member_is_a_link(at: Place) -> Case:
    path = at.theirs / "model.nemo"
    with tarfile.open(path, "w") as file:
        link = tarfile.TarInfo("tokenizer.model")
        link.type, link.linkname = tarfile.SYMTYPE, str(at.mine / "letter.txt")
        file.addfile(link)
    return Case(command=at.take(path), says=("tokenizer.model",))


def zarr_leads_up(at: Place) -> Case:
    """Separators between the numbers of a chunk are part of its path."""
    folder = at.copy("zarr")
    place = next((folder / "model_weights").glob("*/.zarray"))
    array = json.loads(place.read_text())
    place.write_text(json.dumps({**array, "dimension_separator": "/../../"}))
    return Case(command=at.take(folder), says=(".zarray",))


def config_is_a_link(at: Place) -> Case:
    return _linked(at, "tokenizer_config.json")


def template_is_a_link(at: Place) -> Case:
    return _linked(at, "chat_template.jinja")


def _linked(at: Place, name: str) -> Case:
    folder = at.copy("decoder")
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(at.mine / "secret.json")
    return Case(command=at.take(folder), says=(name, "leads out of its folder"), secret="hunter2")


def settings_are_a_link(at: Place) -> Case:
    """A file that is only copied, so that export can give it back."""
    folder = at.copy("decoder")
    (folder / "generation_config.json").unlink(missing_ok=True)
    (folder / "generation_config.json").symlink_to(at.mine / "secret.json")
    return Case(command=at.take(folder), works=True, secret="hunter2")


def image_leads_up(at: Place) -> Case:
    at.rows(row(image="../mine/picture.png"))
    return Case(command=at.train(), says=("sample 'a'", "'..'"))


def image_is_a_link(at: Place) -> Case:
    at.rows(row())
    (at.theirs / "a.png").symlink_to(at.mine / "picture.png")
    return Case(command=at.train(), says=("sample 'a'", "outside the image folder"))


# What is the user's.


def staging_is_the_users(at: Place) -> Case:
    _own(at.mine / "out.tmp")
    return Case(command=at.take(at.copy("decoder")), says=("out.tmp", "did not make it"))


def unpacking_is_the_users(at: Place) -> Case:
    _own(at.mine / "out.unpacked")
    nemo = at.copy("nemo") / "model.nemo"
    return Case(command=at.take(nemo), says=("out.unpacked", "did not make it"))


def export_over_the_users(at: Place) -> Case:
    _own(at.mine / "out.tmp")
    command = ("export", str(at.copy("checkpoint")), "--out", at.out, "--part", "decoder")
    return Case(command=command, says=("out.tmp", "did not make it"))


def staging_is_a_link(at: Place) -> Case:
    _own(at.mine / "papers")
    (at.mine / "out.tmp").symlink_to("papers")
    return Case(command=at.take(at.copy("decoder")), says=("out.tmp", "did not make it"))


def _own(folder: Path) -> None:
    """A folder of the user's, with files named as neva once named its own marks."""
    folder.mkdir()
    for name in ("thesis.txt", "import.json", "export.json", "unpacked"):
        (folder / name).write_text("years of work")


def nemo_folder(at: Place) -> Case:
    """A folder with a tokenizer under another name, beside which a link was once put."""
    folder = at.copy("torch_dist")
    tokenizer = Path(__file__).parent / "data" / "tiny.model"
    shutil.copy(tokenizer, folder / "0a1b_tokenizer.model")
    return Case(command=at.take(folder, "--no-parity"), works=True)


# Bombs.


def gzip_bomb(at: Place) -> Case:
    path = at.theirs / "model.nemo"
    with gzip.open(path, "wb", compresslevel=1) as file, tarfile.open(fileobj=file, mode="w") as tar:
        for name in ("a.bin", "b.bin", "model_config.yaml"):
            info = tarfile.TarInfo(name)
            info.size = 200 * 2**20
            tar.addfile(info, io.BytesIO(bytes(info.size)))
    return Case(command=at.take(path), says=("model.nemo", "would unpack to more"))


def header_bomb(at: Place) -> Case:
    """A header of 4 GB, which tarfile would read into memory."""
    path = at.theirs / "model.nemo"
    info = tarfile.TarInfo("PaxHeader")
    info.type, info.size = tarfile.XHDTYPE, 2**32
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(info.tobuf(tarfile.GNU_FORMAT))
        file.write(bytes(2**20))
    return Case(command=at.take(path), says=("model.nemo", "would unpack to more"))


def sparse_bomb(at: Place) -> Case:
    """A member of a few bytes that says that it is a terabyte of holes."""
    path = at.theirs / "model.nemo"
    config = tarfile.TarInfo("model_config.yaml")
    info = tarfile.TarInfo("weights.bin")
    info.pax_headers = {"GNU.sparse.major": "0", "GNU.sparse.minor": "1", "GNU.sparse.size": str(10**12),
                        "GNU.sparse.map": "0,0", "GNU.sparse.name": "weights.bin"}  # fmt: skip
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as file:
        config.size = len(nemo_config())
        file.addfile(config, io.BytesIO(nemo_config()))
        file.addfile(info, io.BytesIO(b""))
    return Case(command=at.take(path), says=("model.nemo", "would unpack to more"))


def aliases_in_nemo(at: Place) -> Case:
    path = archive(at.theirs / "model.nemo", {"model_config.yaml": LAUGHS.encode()})
    return Case(command=at.take(path), says=("aliases unfold",))


def merges_in_nemo(at: Place) -> Case:
    path = archive(at.theirs / "model.nemo", {"model_config.yaml": MERGED.encode()})
    return Case(command=at.take(path), says=("aliases unfold",))


def aliases_in_checkpoint(at: Place) -> Case:
    folder = at.copy("checkpoint")
    with (folder / "neva.yaml").open("a") as file:
        file.write(LAUGHS)
    return Case(command=("inspect", str(reseal(folder))), says=("aliases unfold",))


def nested_yaml(at: Place) -> Case:
    folder = at.copy("checkpoint")
    (folder / "neva.yaml").write_text("[" * 100_000)
    return Case(command=("inspect", str(reseal(folder))), says=("neva.yaml", "nests too deep"))


def yaml_within_itself(at: Place) -> Case:
    folder = at.copy("checkpoint")
    (folder / "neva.yaml").write_text("model: &m {decoder: *m}\n")
    return Case(command=("inspect", str(reseal(folder))), says=("neva.yaml", "within itself"))


def _converts(at: Place, text: str, *says: str, works: bool = False) -> Case:
    (at.theirs / "neva_config.yaml").write_text(text)
    command = (
        "convert-config",
        str(at.theirs / "neva_config.yaml"),
        "--out",
        str(at.mine / "c.yaml"),
    )
    return Case(command=command, says=says, works=works)


def multiplied(at: Place) -> Case:
    """A number whose digits double with each line: it is told as unresolved."""
    lines = [f"x{n}: ${{multiply:${{x{n - 1}}},${{x{n - 1}}}}}" for n in range(1, 60)]
    return _converts(at, "x0: 9999999\n" + "\n".join(lines) + _real("${x59}"), works=True)


def doubled_text(at: Place) -> Case:
    lines = [f"x{n}: ${{x{n - 1}}}${{x{n - 1}}}" for n in range(1, 60)]
    return _converts(at, "x0: ha\n" + "\n".join(lines) + _real("${x59}"), works=True)


def _real(name: str) -> str:
    """A real neva_config.yaml with this name."""
    text = (Path(__file__).parent / "data" / "neva_config.yaml").read_text()
    return "\n" + re.sub(r"(?m)^name: .*$", f"name: {name}", text, count=1)


def doubled_tree(at: Place) -> Case:
    lines = [f"x{n}:\n  a: ${{x{n - 1}}}\n  b: ${{x{n - 1}}}" for n in range(1, 60)]
    return _converts(at, "x0: {a: 1}\n" + "\n".join(lines) + "\n", "unfold")


def aliases_in_config(at: Place) -> Case:
    return _converts(at, LAUGHS, "aliases unfold")


def deep_row(at: Place) -> Case:
    at.rows('{"id": "a", "conversations": ' + "[" * 100_000 + "]" * 100_000 + "}", row())
    Image.new("RGB", (9, 9)).save(at.theirs / "a.png")
    return Case(command=at.train(), says=("sample '0'", "nests too deep"))


def deep_config(at: Place) -> Case:
    folder = at.copy("decoder")
    (folder / "config.json").write_text('{"a":' * 100_000 + "1" + "}" * 100_000)
    return Case(command=at.take(folder), says=("config.json", "nests too deep"))


def deep_tokenizer(at: Place) -> Case:
    folder = at.copy("decoder")
    (folder / "tokenizer_config.json").write_text('{"a":' * 100_000 + "1" + "}" * 100_000)
    return Case(command=at.take(folder), says=("tokenizer", "cannot be read"))


def long_image(at: Place) -> Case:
    """98 bytes, which padded to a square would be 1.3 GiB."""
    at.rows(row())
    (at.theirs / "a.png").write_bytes(png(18_800, 1, bytes(18_801)))
    return Case(command=at.train(), says=("sample 'a'", "elongated"))


def huge_image(at: Place) -> Case:
    at.rows(row())
    (at.theirs / "a.png").write_bytes(png(60_000, 60_000, bytes(60_001)))
    return Case(command=at.train(), says=("sample 'a'", "too large"))


def layers_without_end(at: Place) -> Case:
    folder = change_config(at.copy("decoder"), num_hidden_layers=10**18)
    return Case(command=at.take(folder), says=("num_hidden_layers",))


def vocabulary_without_end(at: Place) -> Case:
    folder = change_config(at.copy("decoder"), vocab_size=10**18)
    return Case(command=("inspect", str(folder)), says=("vocab_size",))


def layers_of_a_checkpoint(at: Place) -> Case:
    folder = at.copy("checkpoint")
    described = yaml.safe_load((folder / "neva.yaml").read_text())
    described["model"]["decoder"]["layers"] = 10**12
    (folder / "neva.yaml").write_text(yaml.safe_dump(described))
    return Case(command=at.ask(reseal(folder)), says=("layers",))


def index_of_an_exabyte(at: Place) -> Case:
    folder = at.copy("torch_dist")

    def change(index: Any) -> None:
        for record in index.state_dict_metadata.values():
            record.size = torch.Size([10**15])

    change_index(folder / "model_weights", change)
    return Case(command=at.take(folder), says=(".metadata", "damaged"))


def zarr_of_an_exabyte(at: Place) -> Case:
    folder = at.copy("zarr")
    place = next((folder / "model_weights").glob("*/.zarray"))
    place.write_text(json.dumps({**json.loads(place.read_text()), "shape": [10**9, 10**9]}))
    return Case(command=at.take(folder), says=(".zarray",))


def header_of_an_exabyte(at: Place) -> Case:
    folder = at.copy("decoder")
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", 2**62) + b"{}")
    return Case(command=at.take(folder), says=("model.safetensors",))


def manifest_of_nothing(at: Place) -> Case:
    folder = at.copy("checkpoint")
    (folder / MANIFEST).write_bytes(serialise({"format": 1, "step": [], "files": {"a": {"b": 1}}}))
    return Case(command=("inspect", str(folder)), says=("checkpoint", "cannot be read"))


def commands_in_an_id(at: Place) -> Case:
    at.rows(row(id="\x1b]0;owned\x07\x1b[2J\nerror: all is well", image="none.png"))
    return Case(command=at.train(), says=("\\u001b]0;owned",))


# Weights, tokenizers and templates that are more than they seem.


def stack_without_end(at: Place) -> Case:
    """A stack of 10^15 layers without a number in them."""
    folder = at.copy("zarr")
    place = folder / "model_weights" / "model.decoder.layers.mlp.linear_fc2.weight" / ".zarray"
    place.write_text(json.dumps({**json.loads(place.read_text()), "shape": [10**15, 0, 0]}))
    return Case(command=at.take(folder), says=("no stack",))


def stack_without_end_in_dcp(at: Place) -> Case:
    """The same in an index of DCP."""
    folder = at.copy("torch_dist")

    def change(index: Any) -> None:
        name = next(name for name in index.state_dict_metadata if "linear_fc2" in name)
        index.state_dict_metadata[name].size = torch.Size([10**15, 0, 0])

    change_index(folder / "model_weights", change)
    return Case(command=at.take(folder), says=("no stack",))


def _torch_weights(at: Place, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    folder = at.copy("decoder")
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    change(tensors)
    torch.save(tensors, folder / "pytorch_model.bin")
    return folder


def numbers_read_again(at: Place) -> Case:
    """Four bytes that are read as every number of a matrix of 800 MB."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            if "gate_proj" in name or "up_proj" in name:
                tensors[name] = torch.zeros(1).as_strided((2**22, tensor.shape[1]), (0, 0))
            if "down_proj" in name:
                tensors[name] = torch.zeros(1).as_strided((tensor.shape[0], 2**22), (0, 0))

    folder = change_config(_torch_weights(at, change), intermediate_size=2**22)
    return Case(command=at.take(folder, "--no-parity"), says=("pytorch_model.bin", "does not hold"))


def weights_without_data(at: Place) -> Case:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors.update({name: tensor.to("meta") for name, tensor in tensors.items()})

    return Case(command=at.take(_torch_weights(at, change)), says=("no plain tensor",))


def packed_weights(at: Place) -> Case:
    """A torch file whose records are compressed, as 200 MB of zeros in 200 KB."""
    folder = _torch_weights(at, lambda tensors: None)
    plain = folder / "plain.bin"
    (folder / "pytorch_model.bin").rename(plain)
    target = folder / "pytorch_model.bin"
    with zipfile.ZipFile(plain) as read, zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as made:
        for name in read.namelist():
            made.writestr(name, read.read(name))
        made.writestr("archive/data/zeros", bytes(200 * 10**6))
    plain.unlink()
    return Case(command=at.take(folder), says=("pytorch_model.bin", "compressed"))


def _tokenizer(at: Place, part: str, steps: str) -> Case:
    """A letter becomes 10^12."""
    folder = at.copy("decoder")
    path = folder / "tokenizer.json"
    longer = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 100}
    step = {"type": "Sequence", steps: [longer] * 6}
    path.write_text(json.dumps({**json.loads(path.read_text()), part: step}))
    return Case(command=at.take(folder), says=("replacements", part))


def text_that_grows(at: Place) -> Case:
    return _tokenizer(at, "normalizer", "normalizers")


def answer_that_grows(at: Place) -> Case:
    return _tokenizer(at, "decoder", "decoders")


def pattern_without_end(at: Place) -> Case:
    """A pattern that tries more ways than there are."""
    folder = at.copy("decoder")
    path = folder / "tokenizer.json"
    pattern = {"Regex": "(.*.*.*.*.*.*.*.*)*[^\\s\\S]"}
    step = {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}
    path.write_text(json.dumps({**json.loads(path.read_text()), "pre_tokenizer": step}))
    return Case(command=at.take(folder), says=("tokenizer",))


def template_without_end(at: Place) -> Case:
    """Loops in loops, which write nothing."""
    folder = at.copy("checkpoint")
    path = folder / "neva.yaml"
    loop = "{% for i in range(100000) %}"
    end = "{% endfor %}"
    described = {**yaml.safe_load(path.read_text()), "template": loop * 3 + end * 3}
    path.write_text(yaml.safe_dump(described))
    return Case(command=at.ask(reseal(folder)), says=("chat template",))


def template_is_a_number(at: Place) -> Case:
    folder = at.copy("decoder")
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": 7}))
    return Case(command=at.take(folder), says=("chat_template", "no text"))


def config_leads_to_itself(at: Place) -> Case:
    folder = at.copy("decoder")
    (folder / "chat_template.jinja").symlink_to("chat_template.jinja")
    return Case(command=at.take(folder), says=("chat_template.jinja", "link"))


def image_leads_to_itself(at: Place) -> Case:
    (at.theirs / "a.png").symlink_to("a.png")
    at.rows(row())
    return Case(command=at.train(), says=("a.png",))


def image_is_a_pipe(at: Place) -> Case:
    """Who opens it waits for somebody who writes."""
    os.mkfifo(at.theirs / "a.png")
    at.rows(row())
    return Case(command=at.train(), says=("a.png", "a pipe"))


def deep_kind(at: Place) -> Case:
    """JSON that is read, but nests too deep to be shown."""
    at.rows(json.dumps(row(kind=7)).replace("7", "[" * 490 + "]" * 490))
    return Case(command=at.train(), says=("kind",))


CORPUS: tuple[Callable[[Place], Case], ...] = (
    pickled_weights, pickled_weights_of_old, pickled_nemo, index_that_runs, index_record_that_runs,
    function_in_generate, function_in_training, function_in_inspect, object_in_yaml,
    code_beside_tokenizer, postscript,
    index_leads_up, index_is_absolute, nemo_index_leads_up, shards_lead_up, member_leads_up,
    member_is_a_link, zarr_leads_up, config_is_a_link, template_is_a_link, settings_are_a_link,
    image_leads_up, image_is_a_link,
    staging_is_the_users, unpacking_is_the_users, export_over_the_users, staging_is_a_link, nemo_folder,
    gzip_bomb, header_bomb, sparse_bomb, aliases_in_nemo, merges_in_nemo, aliases_in_checkpoint,
    nested_yaml, yaml_within_itself, multiplied, doubled_text, doubled_tree, aliases_in_config,
    deep_row, deep_config, deep_tokenizer, long_image, huge_image, layers_without_end,
    vocabulary_without_end, layers_of_a_checkpoint, index_of_an_exabyte, zarr_of_an_exabyte,
    header_of_an_exabyte, manifest_of_nothing, commands_in_an_id,
    stack_without_end, stack_without_end_in_dcp, numbers_read_again, weights_without_data, packed_weights,
    text_that_grows, answer_that_grows, pattern_without_end, template_without_end, template_is_a_number,
    config_leads_to_itself, image_leads_to_itself, image_is_a_pipe, deep_kind,
)  # fmt: skip


def prepare(folder: Path, base: Path) -> Place:
    """The two folders of a case. `mine` holds a letter, a picture and a secret."""
    at = Place(folder, base)
    for each in (at.theirs, at.mine):
        each.mkdir(parents=True)
    (at.mine / "letter.txt").write_text("Dear all,\n" * 1000)
    (at.mine / "secret.json").write_text('{"password": "hunter2"}')
    Image.new("RGB", (12, 9), (1, 2, 3)).save(at.mine / "picture.png")
    return at


if __name__ == "__main__":
    root = Path(sys.argv[1])
    models = make_base(root / "base")
    for make in CORPUS:
        case = make(prepare(root / make.__name__, models))
        print("neva", *case.command)
