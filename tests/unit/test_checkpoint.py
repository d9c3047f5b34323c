"""Checkpoints: equal bits after a round trip, no damaged byte accepted, no kill or full disk that costs an older one."""

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor

from neva.checkpoint import store
from neva.checkpoint.store import CheckpointError, Training

CONFIG = {"model": {"layers": 2, "norm": "rms", "eps": 1e-05}, "tags": ["<image>", "ü"], "nothing": None}
STATE = {"step": 3, "stage": "pretrain", "lr": 0.1 + 0.2, "data": {"epoch": 0, "taken": [1, 2, 3]}}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def tensors(seed: int = 0) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {
        "decoder.embed.weight": torch.randn(17, 8, generator=draw),
        "decoder.blocks.0.up.weight": torch.randn(8, 32, generator=draw).bfloat16(),
        "decoder.blocks.0.view": torch.randn(6, 9, generator=draw)[1:4, ::2],
        "vision.patch.weight": torch.randn(4, 3, 2, 2, generator=draw).half(),
        "vision.positions": torch.randint(0, 2**40, (11,), generator=draw),
        "projector.scale": torch.tensor(1.5),
        "projector.empty": torch.zeros(0, 4),
        "projector.odd": torch.tensor([float("nan"), float("inf"), -0.0, 1e-45]),
    }


def training(seed: int = 0) -> Training:
    moments = {f"{name}.exp_avg": tensor.clone() for name, tensor in tensors(seed + 1).items()}
    return Training(tensors=moments, per_rank={"cpu": torch.Generator().manual_seed(seed).get_state()}, state=STATE)


def write_files(folder: Path) -> None:
    (folder / "tokenizer" / "nested").mkdir(parents=True)
    (folder / "tokenizer" / "tokenizer.json").write_text('{"model": {}}')
    (folder / "tokenizer" / "nested" / "merges.txt").write_text("a b")


def put(run: Path, step: int = 3, seed: int = 0, keep_last: int = 0, keep_every: int = 0, imported: bool = False) -> Path:
    return store.save(
        run,
        step=step,
        config=CONFIG,
        write_files=write_files,
        weights=tensors(seed),
        training=None if imported else training(seed),
        keep_last=keep_last,
        keep_every=keep_every,
    )


def blank(like: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.full_like(tensor, 7) for name, tensor in like.items()}


def assert_same_bits(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert tensor.dtype == right[name].dtype, name
        assert tensor.shape == right[name].shape, name
        assert tensor.contiguous().view(-1).view(torch.uint8).equal(right[name].contiguous().view(-1).view(torch.uint8)), name


def holds(folder: Path, seed: int) -> bool:
    into = blank(tensors())
    store.load_weights(folder, into=into)
    return into["decoder.embed.weight"].equal(tensors(seed)["decoder.embed.weight"])


def steps(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir() if path.name != "latest")


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def no_warning(text: str) -> None:
    raise AssertionError(text)


# Round trip.


def test_round_trip_is_bit_for_bit(tmp_path: Path) -> None:
    folder = put(tmp_path)
    assert folder == tmp_path / "checkpoints" / "step_3"
    assert os.readlink(tmp_path / "checkpoints" / "latest") == "step_3"
    opened = store.open_checkpoint(tmp_path)
    assert opened.folder == folder
    assert opened.manifest.step == 3
    assert opened.manifest.bytes == sum(path.stat().st_size for path in files(folder) if path.name != "manifest.json")
    assert opened.config == store.load_config(folder) == CONFIG
    assert (store.tokenizer_folder(folder) / "nested" / "merges.txt").read_text() == "a b"
    into = blank(tensors())
    addresses = {name: tensor.data_ptr() for name, tensor in into.items()}
    store.load_weights(folder, into=into)
    assert_same_bits(into, tensors())
    assert addresses == {name: tensor.data_ptr() for name, tensor in into.items()}
    fresh = training(5)
    resumed = store.load_training(folder, into=fresh)
    assert resumed.state == STATE
    assert resumed.skipped == ()
    assert_same_bits({**fresh.tensors, **fresh.per_rank}, {**training(0).tensors, **training(0).per_rank})


def test_parameters_are_saved_and_filled_in_place(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module, other = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    arguments = {"config": {}, "write_files": lambda folder: None, "training": Training(), "keep_last": 0, "keep_every": 0}
    folder = store.save(tmp_path, step=0, weights=dict(module.named_parameters()), **arguments)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        store.load_weights(folder, into=dict(other.named_parameters()))
    assert module.weight.equal(other.weight)
    assert other.weight.requires_grad
    assert store.load_training(folder, into=Training()).state == {}


def test_floating_dtypes_are_converted_others_refused(tmp_path: Path) -> None:
    folder = put(tmp_path)
    name = "decoder.embed.weight"
    into = {name: torch.zeros(17, 8, dtype=torch.bfloat16)}
    store.load_weights(folder, into=into, only=lambda key: key == name)
    assert into[name].equal(tensors()[name].bfloat16())
    widened = {"decoder.blocks.0.up.weight": torch.zeros(8, 32)}
    store.load_weights(folder, into=widened, only=lambda key: "up" in key)
    assert widened["decoder.blocks.0.up.weight"].equal(tensors()["decoder.blocks.0.up.weight"].float())
    with pytest.raises(CheckpointError, match=r"'decoder.embed.weight' is torch.float32 in it, torch.int64 in the model"):
        store.load_weights(folder, into={name: torch.zeros(17, 8, dtype=torch.int64)}, only=lambda key: key == name)


def test_mismatches_are_named_and_nothing_is_changed(tmp_path: Path) -> None:
    folder = put(tmp_path)
    into = blank(tensors())
    into["decoder.embed.wait"] = into.pop("decoder.embed.weight")
    with pytest.raises(CheckpointError, match=r"'decoder.embed.wait' is missing in it \(it has 'decoder.embed.weight'\)"):
        store.load_weights(folder, into=into)
    del into["decoder.embed.wait"]
    with pytest.raises(CheckpointError, match=r"decoder.embed.weight: unexpected, the model has none.*neva.yaml"):
        store.load_weights(folder, into=into)
    into["decoder.embed.weight"] = torch.zeros(16, 8)
    with pytest.raises(CheckpointError, match=r"'decoder.embed.weight' has shape \[17, 8\] in it, \[16, 8\] in the model"):
        store.load_weights(folder, into=into)
    into["decoder.embed.weight"] = torch.zeros(17, 8, device="meta")
    with pytest.raises(CheckpointError, match="meta device: materialise"):
        store.load_weights(folder, into=into)
    assert into["projector.scale"] == 7


def test_only_leaves_names_out_on_both_sides(tmp_path: Path) -> None:
    into = blank(tensors())
    store.load_weights(put(tmp_path), into=into, only=lambda name: name.startswith("vision."))
    assert into["vision.positions"].equal(tensors()["vision.positions"])
    assert into["projector.scale"] == 7


def test_import_has_no_training_state(tmp_path: Path) -> None:
    folder = put(tmp_path, imported=True)
    assert not (folder / "training").exists()
    store.verify(folder)
    with pytest.raises(CheckpointError, match=r"no training state.*init.model="):
        store.load_training(folder, into=training())


def test_random_state_of_another_rank_count_is_skipped_and_said(tmp_path: Path) -> None:
    folder = put(tmp_path)
    into = Training(tensors=training().tensors, per_rank={"cpu": torch.zeros(3, dtype=torch.uint8), "cuda": torch.zeros(1)})
    assert store.load_training(folder, into=into).skipped == ("cpu", "cuda")


def test_what_cannot_be_stored_is_refused_by_name(tmp_path: Path) -> None:
    common = {"step": 1, "config": {}, "write_files": write_files, "keep_last": 0, "keep_every": 0}
    for weights, kept, match in (
        ({"w": torch.zeros(2, device="meta")}, None, "'w' is on the meta device"),
        ({}, Training(tensors={"rank0/cpu": torch.zeros(1)}), "rank0/cpu.*Rename"),
        ({}, Training(state={"shape": (1, 2)}), "lists, not tuples"),
        ({}, Training(state={"x": object()}), "not JSON serializable"),
    ):
        with pytest.raises(CheckpointError, match=match):
            store.save(tmp_path, weights=weights, training=kept, **common)
    assert not list(tmp_path.rglob("step_*"))


def test_tokenizer_failures_and_links_leave_nothing_behind(tmp_path: Path) -> None:
    common = {"step": 1, "config": {}, "weights": {}, "training": None, "keep_last": 0, "keep_every": 0}
    with pytest.raises(CheckpointError, match="RuntimeError: no such vocabulary"):
        store.save(tmp_path, write_files=lambda _: (_ for _ in ()).throw(RuntimeError("no such vocabulary")), **common)
    with pytest.raises(CheckpointError, match="is a link"):
        store.save(tmp_path, write_files=lambda folder: (folder / "x").symlink_to("/dev/null"), **common)
    assert steps(tmp_path) == []


# Damage.


def refused_file(folder: Path, path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        store.verify(folder)
    assert str(path) in str(caught.value), f"{path} is not named in: {caught.value}"
    assert "--resume auto" in str(caught.value)


def test_a_hundred_flipped_bits_are_refused(tmp_path: Path) -> None:
    folder = put(tmp_path)
    everything = files(folder)
    assert {"manifest.json", "neva.yaml", ".metadata", "state.json", "merges.txt"} <= {path.name for path in everything}
    draw = random.Random(0)
    by_size = draw.choices(everything, [path.stat().st_size for path in everything], k=100 - 4 * len(everything))
    targets = 4 * everything + by_size
    assert len(targets) == 100
    for path in targets:
        sound = path.read_bytes()
        bit = draw.randrange(8 * len(sound))
        damaged = bytearray(sound)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        refused_file(folder, path)
        path.write_bytes(sound)
    store.verify(folder)


def test_every_byte_of_the_manifest_counts(tmp_path: Path) -> None:
    manifest = put(tmp_path, imported=True) / "manifest.json"
    sound = manifest.read_bytes()
    draw = random.Random(0)
    for place in range(len(sound)):
        damaged = bytearray(sound)
        damaged[place] ^= 1 << draw.randrange(8)
        manifest.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"manifest.json is corrupt"):
            store.verify(manifest.parent)


def test_cut_lengthened_missing_and_added_files_are_refused(tmp_path: Path) -> None:
    folder = put(tmp_path)
    for path in files(folder):
        sound = path.read_bytes()
        for damaged in (sound[:-1], b"", sound + b"\0", None):
            path.unlink() if damaged is None else path.write_bytes(damaged)
            refused_file(folder, path)
            path.write_bytes(sound)
    extra = folder / "weights" / "__9_0.distcp"
    extra.write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"__9_0.distcp: not in the manifest"):
        store.verify(folder)
    extra.unlink()
    store.verify(folder)


def test_files_mixed_from_two_saves_are_refused(tmp_path: Path) -> None:
    one, two = put(tmp_path, step=1, seed=1), put(tmp_path, step=2, seed=2)
    for path in files(one):
        other = two / path.relative_to(one)
        sound = path.read_bytes()
        if sound == other.read_bytes():
            continue
        shutil.copy(other, path)
        with pytest.raises(CheckpointError):
            store.verify(one)
        path.write_bytes(sound)
    shutil.rmtree(one / "weights")
    shutil.copytree(two / "weights", one / "weights")
    refused_file(one, one / "weights" / "__0_0.distcp")


def test_another_format_is_not_called_corrupt(tmp_path: Path) -> None:
    folder = put(tmp_path)
    fields = json.loads((folder / "manifest.json").read_text())
    del fields["sha256"]
    (folder / "manifest.json").write_bytes(store.serialise({**fields, "format": 2, "new": True}))
    with pytest.raises(CheckpointError, match="has format 2; this version of neva reads 1"):
        store.verify(folder)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def test_resume_auto_passes_a_corrupt_checkpoint_over_loudly(tmp_path: Path) -> None:
    assert store.newest_good(tmp_path / "new", warn=no_warning) is None
    (tmp_path / "checkpoints" / "step_9.tmp").mkdir(parents=True)
    assert store.newest_good(tmp_path, warn=no_warning) is None
    one, two, three = (put(tmp_path, step=step, seed=step) for step in (1, 2, 10))
    assert store.newest_good(tmp_path, warn=no_warning) == three
    flip(three / "weights" / "__0_0.distcp")
    (two / "manifest.json").unlink()
    said: list[str] = []
    assert store.newest_good(tmp_path, warn=said.append) == one
    assert len(said) == 2
    assert all(word in said[0] for word in ("CORRUPT", str(three), "trying step_2", "__0_0.distcp"))
    flip(one / "neva.yaml")
    with pytest.raises(CheckpointError, match=r"(?s)All 3 checkpoints.*step_10.*step_2.*step_1/neva.yaml"):
        store.newest_good(tmp_path, warn=said.append)


def test_a_published_step_is_moved_aside_not_overwritten(tmp_path: Path) -> None:
    put(tmp_path, step=5, seed=5)
    flip(put(tmp_path, step=10, seed=1) / "weights" / "__0_0.distcp")
    with pytest.warns(UserWarning, match=r"step_10 was a corrupt checkpoint; it is now step_10.corrupt"):
        again = put(tmp_path, step=10, seed=2)
    with pytest.warns(UserWarning, match=r"step_10 was a sound checkpoint; it is now step_10.replaced"):
        put(tmp_path, step=10, seed=3)
    with pytest.warns(UserWarning, match=r"step_10.replaced-2"):
        put(tmp_path, step=10, seed=4)
    assert steps(tmp_path) == ["step_10", "step_10.corrupt", "step_10.replaced", "step_10.replaced-2", "step_5"]
    assert holds(again, 4)
    assert holds(tmp_path / "checkpoints" / "step_10.replaced", 2)
    assert store.newest_good(tmp_path, warn=no_warning) == again


# Finding and keeping.


def test_find(tmp_path: Path) -> None:
    old, new = put(tmp_path, step=9), put(tmp_path, step=10)
    checkpoints = tmp_path / "checkpoints"
    assert store.find(old) == old
    assert store.find(tmp_path) == store.find(checkpoints) == new
    assert store.find(checkpoints / "latest").resolve() == new
    (checkpoints / "latest").unlink()
    assert store.find(tmp_path) == new
    (checkpoints / "latest").symlink_to("step_11")
    assert store.find(tmp_path) == store.find(checkpoints) == new
    copy = shutil.copytree(old, tmp_path / "my-model")
    assert store.find(copy) == copy
    store.verify(copy)


def test_find_says_what_is_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no such path"):
        store.find(tmp_path / "none")
    with pytest.raises(CheckpointError, match=r"is empty. Expected a step_N folder"):
        store.find(tmp_path)
    (tmp_path / "config.json").touch()
    with pytest.raises(CheckpointError, match=r"holds config.json.*Hugging Face.*neva import"):
        store.find(tmp_path)
    with pytest.raises(CheckpointError, match="it is a file"):
        store.find(tmp_path / "config.json")
    (tmp_path / "checkpoints" / "step_4.tmp").mkdir(parents=True)
    with pytest.raises(CheckpointError, match=r"holds step_4.tmp.*cut off"):
        store.find(tmp_path)
    with pytest.raises(CheckpointError, match="no checkpoint folder"):
        store.verify(tmp_path / "step_1")


def test_retention(tmp_path: Path) -> None:
    for step in range(1, 8):
        put(tmp_path, step=step, keep_last=2, keep_every=3)
    assert steps(tmp_path) == ["step_3", "step_6", "step_7"]
    put(tmp_path / "all", step=1)
    put(tmp_path / "all", step=2)
    assert steps(tmp_path / "all") == ["step_1", "step_2"]
    with pytest.raises(CheckpointError, match="keep_last is -1"):
        put(tmp_path, step=9, keep_last=-1)


def test_retention_keeps_the_one_just_written_and_counts_no_broken_one(tmp_path: Path) -> None:
    put(tmp_path, step=1)
    put(tmp_path, step=10)
    put(tmp_path, step=5, keep_last=1)
    assert steps(tmp_path) == ["step_10", "step_5"]
    (tmp_path / "checkpoints" / "step_10" / "neva.yaml").unlink()
    put(tmp_path, step=6, keep_last=2)
    assert steps(tmp_path) == ["step_10", "step_5", "step_6"]


def test_leftovers_of_a_kill_are_removed(tmp_path: Path) -> None:
    checkpoints = tmp_path / "checkpoints"
    (checkpoints / "step_2.tmp" / "weights").mkdir(parents=True)
    (checkpoints / "step_1.old.tmp").mkdir()
    (checkpoints / "latest.tmp").symlink_to("step_2")
    put(tmp_path, step=3)
    assert sorted(path.name for path in checkpoints.iterdir()) == ["latest", "step_3"]


# Kills.

LOOP = """
import itertools, sys
from pathlib import Path
from tests.unit.test_checkpoint import put
import torch
torch.set_num_threads(1)
first = int(sys.argv[2])
print("ready", flush=True)
for step in itertools.count(first):
    put(Path(sys.argv[1]), step=step, seed=step, keep_last=2, keep_every=50)
    print(step, flush=True)
"""


def check_kills(run: Path, kills: int, draw: random.Random) -> None:
    root = Path(__file__).parents[2]
    first = 1
    for _ in range(kills):
        process = subprocess.Popen(
            [sys.executable, "-c", LOOP, str(run), str(first)],
            cwd=root,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert process.stdout
        assert process.stdout.readline() == "ready\n"
        time.sleep(draw.uniform(0, 0.25))
        process.kill()
        told, errors = process.communicate()
        assert process.returncode == -signal.SIGKILL, errors
        done = first - 1 + len(told.splitlines())
        newest = store.newest_good(run, warn=no_warning)
        if newest is None:
            assert done == 0
            continue
        step = store.step_of(newest)
        assert step >= done, f"step {done} was reported as saved, but {newest} is the newest"
        assert holds(newest, step)
        store.verify(store.find(run))
        assert store.step_of(store.find(run)) >= done - 1
        first = step + 1


def test_killed_at_random_moments(tmp_path: Path) -> None:
    check_kills(tmp_path, 4, random.Random(time.time_ns()))


@pytest.mark.soak
def test_killed_at_a_hundred_random_moments(tmp_path: Path) -> None:
    check_kills(tmp_path, 100, random.Random(0))


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("call", ["os.fsync", "Path.rename", "Path.replace", "Path.symlink_to", "shutil.rmtree"])
def test_killed_before_each_system_call(tmp_path: Path, call: str) -> None:
    """The process dies before the n-th such call of its second save, for every n there is; random moments rarely hit these."""
    for number in range(1, 60):
        run = tmp_path / str(number)
        child = os.fork()
        if not child:
            die_at(run, call, number)
        _, status = os.waitpid(child, 0)
        newest = store.newest_good(run, warn=no_warning)
        assert newest is not None
        assert store.step_of(newest) in (1, 2)
        assert holds(newest, store.step_of(newest))
        store.verify(store.find(run))
        put(run, step=3, seed=3, keep_last=1)
        assert steps(run) == ["step_3"]
        shutil.rmtree(run)
        if os.WIFEXITED(status):
            assert os.WEXITSTATUS(status) == 0
            assert number > 1
            return
    raise AssertionError(f"{call} never ran out")


def die_at(run: Path, call: str, number: int) -> None:
    """In a forked child: save step 1, then be killed at the `number`-th use of `call` while step 2 is saved and step 1 removed."""
    code = 1
    try:
        put(run, step=1, seed=1)
        owner = {"os": os, "Path": Path, "shutil": shutil}[call.split(".")[0]]
        name = call.split(".")[1]
        real, count = getattr(owner, name), iter(range(1, 10_000))

        def deadly(*arguments: object, **options: object) -> object:
            if next(count) == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments, **options)

        setattr(owner, name, deadly)
        put(run, step=2, seed=2, keep_last=1)
        code = 0
    finally:
        os._exit(code)


# Disks.


@contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    """A real file system of 256 KiB where we may mount one, else a limit on the size of a file: both fail in `write`."""
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", folder], capture_output=True, check=False)
    if mounted.returncode == 0:
        try:
            yield folder
        finally:
            subprocess.run(["umount", folder], check=True)
        return
    with file_limit(200_000):
        yield folder


@contextmanager
def file_limit(size: int) -> Iterator[None]:
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("shape", [(100_000,), (90, 1000)], ids=["one big tensor", "many small ones"])
def test_full_disk(tmp_path: Path, shape: tuple[int, ...]) -> None:
    big = torch.zeros(shape)
    weights = {"big": big} if big.dim() == 1 else {f"w{number}": row for number, row in enumerate(big)}
    with small_disk(tmp_path / "disk") as run:
        older = put(run, step=1, seed=1)
        common = {"config": CONFIG, "write_files": write_files, "keep_last": 1, "keep_every": 0}
        with pytest.raises(CheckpointError) as caught:
            store.save(run, step=2, weights=weights, training=None, **common)
        with pytest.raises(CheckpointError):
            store.save(run, step=2, weights={}, training=Training(tensors=weights), **common)
        assert steps(run) == ["step_1"]
        store.verify(older)
        assert store.newest_good(run, warn=no_warning) == older
        put(run, step=2, seed=2, keep_last=1)
    message = str(caught.value)
    assert str(run / "checkpoints" / "step_2.tmp") in message
    assert "No space left" in message or "File too large" in message
    assert f"{4 * big.numel():,} bytes" in message
    assert "Free some space" in message
    assert "untouched" in message


def test_a_limit_on_file_sizes(tmp_path: Path) -> None:
    older = put(tmp_path, step=1)
    with file_limit(100_000), pytest.raises(CheckpointError, match=r"File too large.*It needs 400,000 bytes"):
        store.save(
            tmp_path,
            step=2,
            config={},
            write_files=write_files,
            weights={"big": torch.zeros(100_000)},
            training=None,
            keep_last=1,
            keep_every=0,
        )
    assert steps(tmp_path) == ["step_1"]
    store.verify(older)


def test_unwritable_places(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for run in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(CheckpointError, match=f"Could not save {run}.*set out= to a folder"):
            put(run)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").touch()
    with pytest.raises(CheckpointError, match=r"Could not save.*File exists"):
        put(tmp_path / "run")


def test_only_newer_checkpoints_are_set_aside(tmp_path):
    """Going on from step 2 makes step 3 anew; 2 itself and 1 stay as they are."""
    folders = [put(tmp_path, step=step) for step in (1, 2, 3)]
    (said,) = store.set_newer_aside(folders[1])
    assert "step_3.replaced" in said
    assert sorted(path.name for path in (tmp_path / "checkpoints").glob("step_*")) == ["step_1", "step_2", "step_3.replaced"]
    assert [store.verify(folder).step for folder in folders[:2]] == [1, 2]
