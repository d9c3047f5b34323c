"""Conversions that are disturbed: two at once, a kill, a folder that may not be written to, a full
disk. Each ends in a line that says what to do, and no file of the user's is touched."""

import multiprocessing
import os
import resource
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from neva import api
from neva.checkpoint import gate, store, stream
from neva.checkpoint.hf import Options
from neva.checkpoint.manifest import MARK, CheckpointError
from neva.checkpoint.target import ExportOptions
from tests.families import build, llama, on_disk
from tests.oracle.test_convert import SIZE, add_text, same_bits

torch.set_num_threads(1)


def model(folder: Path) -> Path:
    build(llama(vocab_size=SIZE), folder)
    add_text(folder, image=False, pad=False)
    return folder


def come_in(folder: Path, out: Path) -> Path:
    return api.import_checkpoint([folder], out, options=Options(), parity=False, say=str)


def go_out(checkpoint: Path, out: Path) -> Path:
    return api.export_checkpoint(checkpoint, out, options=ExportOptions(), parity=False, say=str)


Convert = Callable[[Path, Path], Path]


@pytest.fixture
def sources(tmp_path: Path) -> dict[Convert, Path]:
    """What each conversion converts."""
    hf = model(tmp_path / "hf")
    return {come_in: hf, go_out: come_in(hf, tmp_path / "neva")}


def refused(convert: Convert, source: Path, out: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        convert(source, out)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Two at once.


@pytest.mark.parametrize("convert", [come_in, go_out])
def test_of_two_at_once_one_is_refused(convert: Convert, sources: dict[Convert, Path], tmp_path: Path) -> None:
    """The second says so and takes nothing away; the first ends as if it had been alone."""
    out = tmp_path / "out"
    began, go_on = threading.Event(), threading.Event()
    first = stream.Staging.finish

    def waiting(self: stream.Staging) -> Path:
        began.set()
        assert go_on.wait(60)
        return first(self)

    done: list[Path] = []
    worker = threading.Thread(target=lambda: done.append(convert(sources[convert], out)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stream.Staging, "finish", waiting)
        worker.start()
        assert began.wait(60)
        before = sorted(path.name for path in (tmp_path / "out.tmp").rglob("*"))
        with pytest.raises(ValueError, match="out.tmp is being written by another neva: wait until it is done, or name another"):
            convert(sources[convert], out)
        assert sorted(path.name for path in (tmp_path / "out.tmp").rglob("*")) == before
        go_on.set()
        worker.join(60)
    assert done == [out] and not (out / MARK).exists()
    if convert is come_in:
        store.verify(out)
    else:
        assert same_bits(on_disk(out), on_disk(sources[come_in]))


def hold(folder: Path, out: Path) -> None:
    """An import that never ends."""
    gate.compare = lambda *args, **more: time.sleep(600)
    api.import_checkpoint([folder], out, options=Options(), say=str)


def test_a_killed_process_holds_nothing_back(tmp_path: Path) -> None:
    """Of two processes the second is refused as long as the first lives; then it goes on from what
    that left."""
    hf, out = model(tmp_path / "hf"), tmp_path / "out"
    process = multiprocessing.get_context("fork").Process(target=hold, args=(hf, out))
    process.start()
    assert process.pid is not None
    try:
        end = time.monotonic() + 120
        while not (tmp_path / "out.tmp" / "neva.yaml").exists():
            assert time.monotonic() < end and process.is_alive()
            time.sleep(0.02)
        with pytest.raises(ValueError, match="another neva"):
            come_in(hf, out)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stream, "_write_all", None)  # not called again
        come_in(hf, out)
    assert store.verify(out).step == 0 and not (tmp_path / "out.tmp").exists()


@pytest.mark.parametrize("convert", [come_in, go_out])
def test_a_kill_between_the_name_and_the_mark(
    convert: Convert, sources: dict[Convert, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same command says that it is done, and takes the mark away."""

    class Killed(BaseException):
        pass

    def rename(self: Path, target: Path) -> Path:
        os.rename(self, target)
        if self.name == "out.tmp":
            raise Killed
        return target

    out = tmp_path / "out"
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Path, "rename", rename)
        convert(sources[convert], out)
    assert (out / MARK).is_file()
    with pytest.raises(ValueError, match="out is there, and whole: what made it was killed when all was done. Use it"):
        convert(sources[convert], out)
    assert not (out / MARK).exists()
    with pytest.raises(ValueError, match="exists already"):
        convert(sources[convert], out)
    if convert is come_in:
        store.verify(out)


def test_a_folder_that_is_not_whole_keeps_its_mark(tmp_path: Path) -> None:
    """--out names what an import has left half-written: its mark is not for this command."""
    hf = model(tmp_path / "hf")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(stream.Staging, "finish", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
        come_in(hf, tmp_path / "out")
    with pytest.raises(ValueError, match="out.tmp exists already"):
        come_in(hf, tmp_path / "out.tmp")
    assert (tmp_path / "out.tmp" / MARK).is_file()
    come_in(hf, tmp_path / "out")


# Disks.


def may_mount() -> bool:
    """May this process mount a file system? A test process in a container often may not."""
    with tempfile.TemporaryDirectory() as place:
        command = ["mount", "-t", "tmpfs", "-o", "size=4k", "tmpfs", place]
        if subprocess.run(command, capture_output=True, check=False).returncode:
            return False
        subprocess.run(["umount", place], check=True)
    return True


needs_mount = pytest.mark.skipif(not may_mount(), reason="no file system may be mounted here")


@contextmanager
def mounted(folder: Path, *options: str) -> Iterator[Path]:
    """A file system of its own."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", *options, "tmpfs", folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


@needs_mount
@pytest.mark.parametrize("convert", [come_in, go_out])
def test_a_full_disk(convert: Convert, sources: dict[Convert, Path], tmp_path: Path) -> None:
    """The error says how much is needed and free; with more room the same command goes on."""
    with mounted(tmp_path / "disk", "-o", "size=160k") as disk:
        (disk / "mine.txt").write_text("my own")
        said = refused(convert, sources[convert], disk / "out")
        assert f"Could not write {disk / 'out.tmp'}" in said and "No space left on device" in said
        assert "bytes in all" in said and "are free" in said and "the same command goes on" in said
        assert (disk / "mine.txt").read_text() == "my own" and not (disk / "out").exists()
        subprocess.run(["mount", "-o", "remount,size=8m", disk], check=True)
        convert(sources[convert], disk / "out")
        assert sorted(path.name for path in disk.iterdir()) == ["mine.txt", "out"]


@pytest.mark.parametrize("convert", [come_in, go_out])
def test_a_file_that_may_not_grow(convert: Convert, sources: dict[Convert, Path], tmp_path: Path) -> None:
    """A quota of the size of a file, where no disk may be mounted."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, before[1]))
    try:
        said = refused(convert, sources[convert], tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert "File too large" in said and "name another disk's folder with --out" in said
    convert(sources[convert], tmp_path / "out")


@needs_mount
@pytest.mark.parametrize("convert", [come_in, go_out])
def test_a_read_only_folder(convert: Convert, sources: dict[Convert, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a cache in one."""
    with mounted(tmp_path / "disk") as disk:
        (disk / "mine.txt").write_text("my own")
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        said = refused(convert, sources[convert], disk / "out")
        assert said.startswith(f"Could not write {disk / 'out.tmp'}: Read-only file system.")
        assert "name another folder with --out" in said
        monkeypatch.setenv("NEVA_CACHE", str(disk / "cache"))
        with pytest.raises(ValueError, match="cannot be written to .*: set NEVA_CACHE to a folder that can be"):
            api.import_checkpoint([sources[come_in]], say=str)
        assert [path.name for path in disk.iterdir()] == ["mine.txt"]


def test_a_place_below_a_file(sources: dict[Convert, Path], tmp_path: Path) -> None:
    (tmp_path / "letter").write_text("Dear")
    for convert, source in sources.items():
        assert f"Could not write {tmp_path / 'letter'}" in refused(convert, source, tmp_path / "letter" / "out")
    assert (tmp_path / "letter").read_text() == "Dear"


# What is said meanwhile.


def test_a_long_import_says_how_far_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A line where some seconds have passed, and none for a small model."""
    hf = model(tmp_path / "hf")
    clock = iter(range(0, 10_000, 3))
    monkeypatch.setattr(stream.time, "monotonic", lambda: float(next(clock)))
    monkeypatch.setattr(stream, "UNIT", 60_000)
    said: list[str] = []
    api.import_checkpoint([hf], tmp_path / "neva", options=Options(), parity=False, say=said.append)
    assert any(line.startswith("Writing ") for line in said)
    steps = [line for line in said if " MiB/s, " in line]
    assert 2 <= len(steps) <= 5 and all("of 0.0 GiB" in line and line.endswith(" s left") for line in steps)
    monkeypatch.undo()
    said.clear()
    api.import_checkpoint([hf], tmp_path / "again", options=Options(), parity=False, say=said.append)
    assert not [line for line in said if "GiB" in line]
