"""The hostile corpus: nothing of it runs, nothing of the user's changes, and
each ends in one line."""

import os
import pickle
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from neva.cli import main
from tests import hostile
from tests.hostile import CORPUS, Case, Place

SECONDS = 10


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hostile.make_base(tmp_path_factory.mktemp("base"))


def contents(folder: Path) -> dict[str, bytes | str]:
    """Every file below a folder, links as what they say."""
    found: dict[str, bytes | str] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = os.readlink(path)
        elif path.is_file():
            found[name] = path.read_bytes()
    return found


@pytest.mark.parametrize("make", CORPUS, ids=lambda make: make.__name__)
def test_it_does_no_harm(
    make: Callable[[Place], Case],
    base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    at = hostile.prepare(tmp_path, base)
    case = make(at)
    here = tmp_path / "here"
    here.mkdir()
    (here / "canary_module.py").write_text("open('canary', 'w').write('x')\ndef run(*_): pass\n")
    (here / "gs").write_text("#!/bin/sh\ntouch canary\n")
    (here / "gs").chmod(0o755)
    monkeypatch.chdir(here)
    monkeypatch.syspath_prepend(here)
    monkeypatch.setenv("PATH", f"{here}:{os.environ['PATH']}")
    monkeypatch.setenv("NEVA_CACHE", str(tmp_path / "cache"))
    before = contents(at.theirs), contents(at.mine)
    started = time.monotonic()
    done = CliRunner().invoke(main, case.command, input="y\n" * 10)
    took = time.monotonic() - started
    sys.modules.pop("canary_module", None)

    assert not (here / "canary").exists()
    after = contents(at.theirs), contents(at.mine)
    assert after[0] == before[0]
    assert {name: after[1].get(name) for name in before[1]} == before[1]
    new = {name: content for name, content in after[1].items() if name not in before[1]}
    assert not case.secret or not any(case.secret.encode() in bytes(c) for c in new.values() if isinstance(c, bytes))
    assert done.exception is None or isinstance(done.exception, SystemExit), repr(done.exception)
    assert took < SECONDS
    if case.works:
        assert done.exit_code == 0, done.output
        return
    assert done.exit_code == 1, done.output
    errors = done.stderr.splitlines()
    assert len(errors) == 1 and errors[0].startswith("error: ") and len(errors[0]) < 2000, done.stderr
    assert all(word in errors[0] for word in case.says), errors[0]
    if case.command[0] != "train":  # whose run folder is there from the start
        assert not any(name.startswith("out") for name in new), sorted(new)


def test_the_canary_would_sing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the corpus rules out does happen where a pickle is trusted."""
    monkeypatch.chdir(tmp_path)
    pickle.loads(pickle.dumps(hostile.Runs()))
    assert (tmp_path / "canary").read_text() == hostile.CANARY
