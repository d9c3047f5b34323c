"""hf:org/name against a local server that answers as the Hub does: one set of weights of the top
folder, of the revision that was asked for, and nothing else."""

import hashlib
import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from fnmatch import fnmatch
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from neva import api
from neva.checkpoint import hub as hub_of_neva
from neva.data.tokenizer import BESIDE, FILES, PAIRS
from tests.families import build, llama
from tests.oracle.test_convert import SIZE, add_text
from tests.runs import ENVIRONMENT, ROOT


class Hub:
    """Repositories as folders, one for each commit, and what was asked of them."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.commits: dict[tuple[str, str], str] = {}
        """(repository, branch or tag) -> commit."""
        self.got: list[str] = []
        """Files whose content was sent."""
        self.asked: list[str] = []
        self.gated: set[str] = set()
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def add(self, name: str, files: Path, revision: str = "main") -> str:
        """A commit of a repository that holds a copy of these files; gives its number."""
        commit = hashlib.sha1(f"{name} {revision} {sorted(files.rglob('*'))}".encode()).hexdigest()
        shutil.copytree(files, self.folder / name / commit)
        self.commits[name, revision] = commit
        return commit

    def files(self, name: str, revision: str) -> Path | None:
        commit = self.commits.get((name, revision), revision)
        place = self.folder / name / commit
        return place if place.is_dir() else None


class _Handler(BaseHTTPRequestHandler):
    """The three things that huggingface_hub asks for: a revision's commit, its files, and a
    file."""

    hub: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.answer(body=True)

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def answer(self, *, body: bool) -> None:
        path = unquote(self.path.split("?")[0])
        self.hub.asked.append(f"{self.command} {path}")
        parts = path.strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            self.describe("/".join(parts[2:4]), parts[4:], body=body)
        elif len(parts) > 4 and parts[2] == "resolve":
            self.send_file("/".join(parts[:2]), parts[3], "/".join(parts[4:]), body=body)
        else:
            self.refuse("RepoNotFound", body=body)

    def describe(self, name: str, more: list[str], *, body: bool) -> None:
        """/api/models/NAME[/revision/REV] and /api/models/NAME/tree/REV."""
        if not (self.hub.folder / name).is_dir():
            self.refuse("RepoNotFound", body=body)
            return
        revision = more[1] if len(more) > 1 else "main"
        place = self.hub.files(name, revision)
        if place is None:
            self.refuse("RevisionNotFound", body=body)
            return
        if more[:1] == ["tree"]:
            self.send_json([_listed(path, place) for path in sorted(place.rglob("*"))], body=body)
            return
        siblings = [{"rfilename": str(p.relative_to(place))} for p in sorted(place.rglob("*")) if p.is_file()]
        self.send_json({"id": name, "sha": place.name, "siblings": siblings}, body=body)

    def send_file(self, name: str, revision: str, file: str, *, body: bool) -> None:
        place = self.hub.files(name, revision)
        if place is None or not (place / file).is_file():
            self.refuse("EntryNotFound" if place else "RevisionNotFound", body=body)
            return
        if name in self.hub.gated:
            self.refuse("GatedRepo", code=403, body=body)
            return
        content = (place / file).read_bytes()
        tag = f'"{hashlib.sha256(content).hexdigest()}"'
        if body:
            self.hub.got.append(file)
        headers = {"ETag": tag, "X-Repo-Commit": place.name, "Accept-Ranges": "bytes"}
        self.send(content, "application/octet-stream", headers, body=body)

    def refuse(self, code_name: str, *, code: int = 404, body: bool) -> None:
        headers = {"X-Error-Code": code_name, "X-Error-Message": f"{code_name} says the server"}
        self.send(b"{}", "application/json", headers, code=code, body=body)

    def send_json(self, value: Any, *, body: bool) -> None:
        self.send(json.dumps(value).encode(), "application/json", {}, body=body)

    def send(
        self,
        content: bytes,
        kind: str,
        headers: dict[str, str],
        *,
        code: int = 200,
        body: bool,
    ) -> None:
        self.send_response(code)
        for name, value in {**headers, "Content-Type": kind, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(content)


def _listed(path: Path, place: Path) -> dict[str, Any]:
    """An entry of a repository's tree; a large file says that LFS keeps it."""
    name = str(path.relative_to(place))
    if path.is_dir():
        return {"type": "directory", "oid": "0" * 40, "size": 0, "path": name}
    content = path.read_bytes()
    entry = {"type": "file", "oid": hashlib.sha1(content).hexdigest(), "size": len(content), "path": name}
    if path.suffix in (".safetensors", ".bin", ".pth"):
        entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
    return entry


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    made = Hub(tmp_path / "hub")
    yield made
    made.server.shutdown()
    made.server.server_close()


def point_to(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What HF_ENDPOINT sets when a process begins."""
    monkeypatch.setattr(constants, "ENDPOINT", url)
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """At this port nobody answers."""
    point_to("http://127.0.0.1:9", monkeypatch)


@pytest.fixture(autouse=True)
def home(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    point_to(hub.url, monkeypatch)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "home" / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)


def fetch(name: str) -> Path:
    """What a new process would get: in one all calls get the same."""
    hub_of_neva.download.cache_clear()
    return api.fetch(f"hf:{name}")


def refused(name: str) -> str:
    with pytest.raises(ValueError, match="could not be fetched") as caught:
        fetch(name)
    return str(caught.value)


def llama2(folder: Path) -> Path:
    """A repository as meta-llama/Llama-2-7b-hf is: its weights as safetensors and as torch files,
    in shards, and again in a folder of another program."""
    model = build(llama(vocab_size=SIZE), folder)
    add_text(folder, image=False, pad=False)
    model.save_pretrained(folder, max_shard_size="40KB")
    (folder / "model.safetensors").unlink()
    files: dict[str, str] = {}
    for number, file in enumerate(sorted(folder.glob("*.safetensors"))):
        state = load_file(file)
        name = f"pytorch_model-{number + 1:05d}.bin"
        torch.save(state, folder / name)
        files |= dict.fromkeys(state, name)
    described = {"metadata": {"total_size": 0}, "weight_map": files}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(described))
    (folder / "original").mkdir()
    torch.save({"a": torch.ones(10)}, folder / "original" / "consolidated.00.pth")
    (folder / "original" / "params.json").write_text("{}")
    (folder / "training_args.bin").write_bytes(b"x" * 100)
    (folder / "README.md").write_text("# A model")
    return folder


def in_cache(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_one_set_of_weights_is_downloaded(hub: Hub, tmp_path: Path) -> None:
    """safetensors with their index; no torch file, nothing of a folder, nothing twice."""
    hub.add("meta/llama", llama2(tmp_path / "repo"))
    found = fetch("meta/llama")
    names = in_cache(found)
    shards = {file.name for file in (tmp_path / "repo").glob("*.safetensors")}
    assert len(shards) > 2 and {name for name in names if name.endswith(".safetensors")} == shards
    assert not [name for name in (*names, *hub.got) if name.endswith((".bin", ".pth", ".md")) or "/" in name]
    assert {"config.json", "tokenizer.json", "model.safetensors.index.json"} <= names
    assert sorted(hub.got) == sorted(set(hub.got))
    before = len(hub.got)
    assert fetch("meta/llama") == found and len(hub.got) == before


def test_torch_files_where_there_is_nothing_else(hub: Hub, tmp_path: Path) -> None:
    folder = llama2(tmp_path / "repo")
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    hub.add("meta/llama", folder)
    names = in_cache(fetch("meta/llama"))
    kept = {name for name in names if name.endswith(".bin")}
    assert kept == {file.name for file in folder.glob("pytorch_model-*.bin")} and "training_args.bin" not in kept


def test_the_set_that_the_config_names(hub: Hub, tmp_path: Path) -> None:
    """transformers_weights of config.json comes before all, here as in a folder."""
    folder = llama2(tmp_path / "repo")
    save_file({"x": torch.ones(1)}, folder / "other.safetensors")
    described = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**described, "transformers_weights": "other.safetensors"}))
    hub.add("meta/llama", folder)
    names = in_cache(fetch("meta/llama"))
    assert {name for name in names if name.endswith(".safetensors")} == {"other.safetensors"}


def test_a_revision(hub: Hub, tmp_path: Path) -> None:
    """A branch or a commit behind @; without one, main."""
    for revision, layers in (("main", 3), ("v2", 2)):
        build(llama(num_hidden_layers=layers), tmp_path / revision)
        hub.add("org/name", tmp_path / revision, revision)
    for asked, layers in (("", 3), ("@v2", 2), (f"@{hub.commits['org/name', 'v2']}", 2)):
        folder = fetch(f"org/name{asked}")
        assert json.loads((folder / "config.json").read_text())["num_hidden_layers"] == layers
    assert "v3" in refused("org/name@v3")
    assert "no revision behind the @" in refused("org/name@")


def test_a_projector_of_llavas_first_stage(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "repo").mkdir()
    torch.save({"model.mm_projector.weight": torch.ones(4, 3)}, tmp_path / "repo" / "mm_projector.bin")
    (tmp_path / "repo" / "config.json").write_text("{}")
    hub.add("liuhaotian/pretrain", tmp_path / "repo")
    assert in_cache(fetch("liuhaotian/pretrain")) == {"mm_projector.bin", "config.json"}


@pytest.mark.parametrize(
    ("file", "says"),
    [
        ("adapter_config.json", "LoRA adapter"),
        ("model-q4.gguf", "GGUF"),
        ("flax_model.msgpack", "holds no weights of a model, but config.json"),
    ],
)
def test_what_is_no_model_is_named_before_it_is_downloaded(file: str, says: str, hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "repo").mkdir()
    (tmp_path / "repo" / "config.json").write_text("{}")
    (tmp_path / "repo" / file).write_text("{}")
    hub.add("org/name", tmp_path / "repo")
    assert says in refused("org/name") and file not in {name for name in hub.got if not name.endswith(".json")}


def test_refusals_say_what_to_do(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A repository that is not there, one that wants a licence accepted, a server that is gone."""
    hub.add("org/gated", llama2(tmp_path / "repo"))
    hub.gated.add("org/gated")
    for name in ("org/nothing", "org/gated", "not a name"):
        error = refused(name)
        assert error.startswith(f"hf:{name} could not be fetched (") and "\n" not in error
        assert error.endswith("check the name and the network, or give a local folder")
    no_network(monkeypatch)
    assert refused("org/other").startswith("hf:org/other could not be fetched (")


def test_without_a_network_the_cache_is_taken(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is there whole is used; what is not is said."""
    hub.add("meta/llama", llama2(tmp_path / "repo"))
    found = fetch("meta/llama")
    with monkeypatch.context() as patch:
        patch.setattr(constants, "HF_HUB_OFFLINE", True)
        assert fetch("meta/llama") == found
    no_network(monkeypatch)
    assert fetch("meta/llama") == found
    next(found.glob("*.safetensors")).unlink()
    refused("meta/llama")


def test_the_command_imports_what_it_downloads(hub: Hub, tmp_path: Path) -> None:
    """`neva import hf:org/name --out DIR` in a process that finds the server through
    HF_ENDPOINT."""
    hub.add("meta/llama", llama2(tmp_path / "repo"))
    command = [sys.executable, "-m", "neva", "import", "hf:meta/llama", "--out", str(tmp_path / "neva")]
    home = {"HF_HOME": str(tmp_path / "own"), "HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "PYTHONPATH": str(ROOT)}
    env = {**ENVIRONMENT, **home}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "neva" / "manifest.json").is_file() and (tmp_path / "own").is_dir()
    assert not [name for name in hub.got if name.endswith((".bin", ".pth"))]


def test_every_file_of_a_tokenizer_is_asked_for() -> None:
    """What `load_tokenizer` looks for in a folder is among what is downloaded."""
    for file in (*FILES, *PAIRS.values(), *BESIDE):
        assert any(fnmatch(file, pattern) for pattern in hub_of_neva.TEXTS), file
