"""What neva makes a folder in, or removes, is its own: a user's of the same name stays."""

from pathlib import Path

import pytest

from neva.checkpoint import store
from neva.checkpoint.manifest import MARK
from neva.checkpoint.stream import Staging


@pytest.mark.parametrize("kind", ["file", "folder", "link"])
def test_a_users_own_is_in_the_way(kind: str, tmp_path: Path) -> None:
    place = tmp_path / "out.tmp"
    early = Staging(tmp_path / "out")  # before the place was taken
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / MARK).write_text("of")
    if kind == "file":
        place.write_text("mine")
    elif kind == "folder":
        place.mkdir()
        (place / "mine").write_text("mine")
    else:
        place.symlink_to(tmp_path / "real")
    with pytest.raises(ValueError, match="neva did not make it"):
        Staging(tmp_path / "out")
    with pytest.raises(ValueError, match="neva did not make it"), early as staging:
        staging.begin("of")
    assert place.exists() and (tmp_path / "real" / MARK).exists()


def test_a_link_that_leads_nowhere_takes_the_name(tmp_path: Path) -> None:
    (tmp_path / "out").symlink_to(tmp_path / "nothing")
    with pytest.raises(ValueError, match="exists already"):
        Staging(tmp_path / "out")


def test_a_save_removes_what_a_save_left_and_nothing_else(tmp_path: Path) -> None:
    for name in ("step_3.tmp", "step_2.old.tmp", "notes.tmp", "real"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x").write_text("x")
    (tmp_path / "step_7.tmp").symlink_to(tmp_path / "real")
    store._begin(tmp_path / "step_9.tmp", {}, lambda folder: None, None)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"notes.tmp", "real", "step_9.tmp"}
    assert (tmp_path / "real" / "x").exists() and (tmp_path / "notes.tmp" / "x").exists()
