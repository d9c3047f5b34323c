"""What a run says of its samples before the first step, what it leaves out, and where one stops
it. In process."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from neva import api
from neva.training import epochs, stage
from tests import runs

ONE = (
    "model.decoder.layers=1", "model.vision.layers=2", "batch.seq_length=128", "batch.rows=1",
    "data.pool=4", "data.workers=0", "data.system=", "log.tensorboard=false", "precision=fp32",
)  # fmt: skip


def written(folder: Path, rows: list[dict]) -> Path:
    (folder / "images").mkdir(exist_ok=True)
    (folder / "data.json").write_text(json.dumps(rows))
    return folder / "data.json"


def asked(data: Path, out: Path, *overrides: str) -> list[str]:
    source = (f"data.source={data}", f"data.image_folder={data.parent / 'images'}")
    return [*ONE, *source, f"out={out}", *overrides]


def train(overrides: list[str], **options: Any) -> list[str]:
    said: list[str] = []
    api.train("llava-tiny/finetune", overrides, say=said.append, **options)
    return said


def noisy(path: Path) -> bytes:
    """A picture of which a half can be cut off."""
    path.parent.mkdir(exist_ok=True)
    Image.effect_noise((64, 64), 90).convert("RGB").save(path)
    return path.read_bytes()


def mixed(folder: Path) -> tuple[Path, dict[str, str]]:
    """Ten good samples among some too long, some of which an image is missing, and one whose image
    is cut off behind its header; and why each bad one is left out."""
    rows = [runs.row(f"good{n}", "Say it." + " please" * n, "red") for n in range(10)]
    rows += [runs.row(f"long{n}", "Say it.", "red " * (150 + n)) for n in range(3)]
    for name in ("gone0", "gone1", "cut"):
        rows.append(runs.row(name, "<image>\nWhich?", "red", image=f"{name}.png"))
    whole = noisy(folder / "images" / "cut.png")
    (folder / "images" / "cut.png").write_bytes(whole[: len(whole) // 2])
    why = {row["id"]: "long" if row["id"].startswith("long") else "broken" for row in rows[10:]}
    return written(folder, rows), why


def listed(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "skipped.jsonl").read_text().splitlines()]


def test_every_sample_that_is_left_out_is_listed(tmp_path: Path) -> None:
    """Also after a stop: what was listed ahead of the checkpoint is listed once."""
    data, why = mixed(tmp_path)
    chain = ("data.on_error=skip", "steps=8", "checkpoint.every=2", "checkpoint.keep_last=0")
    train(asked(data, tmp_path / "run", *chain))
    lines = listed(tmp_path / "run")
    assert {line["id"]: line["why"] for line in lines} == why
    last = runs.metrics(tmp_path / "run")[-1]
    assert len(lines) == last["skipped_samples"]
    assert all(line["source"] == "data" and line["stage"] == "finetune" for line in lines)
    assert "missing" in next(line["message"] for line in lines if line["id"] == "gone0")
    counts = [0] * 9
    for line in lines:
        counts[line["step"]] += 1
    assert sum(counts[:3]) < len(lines)
    checkpoints = tmp_path / "run" / "checkpoints"
    train(asked(data, tmp_path / "run", *chain), resume=str(checkpoints / "step_2"))
    assert listed(tmp_path / "run") == lines


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_sample_that_stops_a_run_loses_no_step(tmp_path: Path, workers: int) -> None:
    """What was trained is saved first; with the image mended the run goes on bit for bit."""
    rows = [runs.row(f"t{n}", "Say it." + " please" * 12, "red " * 8) for n in range(12)]
    rows[7] = runs.row("cut", "<image>\nWhich?", "red", image="cut.png")
    data = written(tmp_path, rows)
    whole = noisy(tmp_path / "images" / "cut.png")
    chain = ("data.shuffle=false", "data.pool=1", "steps=8", f"data.workers={workers}")
    train(asked(data, tmp_path / "whole", *chain))
    (tmp_path / "images" / "cut.png").write_bytes(whole[: len(whole) // 2])
    said: list[str] = []
    out = tmp_path / "run"
    with pytest.raises(ValueError, match="sample 'cut' of 'data': the image .*cut.png cannot"):
        api.train("llava-tiny/finetune", asked(data, out, *chain), say=said.append)
    (done,) = runs.steps_kept(out)
    assert 0 < done == len(runs.metrics(out)) < 8
    saved = out / "checkpoints" / f"step_{done}"
    assert said[-1].startswith(f"Saved {saved} before the error that follows: once its cause")
    assert "or with data.on_error=skip" in said[-1]
    # as it is it stops there again, and writes nothing
    with pytest.raises(ValueError, match="sample 'cut' of 'data'"):
        train(asked(data, out, *chain), resume="auto")
    assert runs.steps_kept(out) == [done]
    (tmp_path / "images" / "cut.png").write_bytes(whole)
    train(asked(data, out, *chain), resume="auto")
    assert runs.learned(out) == runs.learned(tmp_path / "whole")
    last = "checkpoints/step_8"
    assert runs.digests(out / last) == runs.digests(tmp_path / "whole" / last)


def test_samples_that_would_stop_a_run_are_counted_before_its_first_step(tmp_path: Path) -> None:
    rows = [runs.row(f"t{n}", "Say it.", "red") for n in range(20)]
    for n in (3, 8, 15):
        rows[n] = runs.row(f"gone{n}", "<image>\nWhich?", "red", image=f"{n}.png")
    data = written(tmp_path, rows)
    told = r"sample 'gone3' of 'data': .*3.png is missing.*\(2 more of the 20 samples that were"
    for start in (api.train, api.dry_run):
        with pytest.raises(ValueError, match=told):
            start("llava-tiny/finetune", asked(data, tmp_path / "run", "steps=1"), say=print)
    assert not (tmp_path / "run" / "checkpoints").exists()
    # of the kind that is asked to be left out it is no error
    said = train(asked(data, tmp_path / "run", "steps=1", "data.on_error=skip"))
    (line,) = [line for line in said if "looked at" in line]
    assert "3 are unreadable and left out, sample 'gone3' of 'data': the image" in line


def looked(overrides: list[str]) -> str:
    said: list[str] = []
    api.dry_run("llava-tiny/finetune", overrides, say=said.append)
    (line,) = [line for line in said if "looked at" in line]
    assert line in train(overrides)
    return line


def test_a_run_and_a_dry_run_say_what_their_samples_are(tmp_path: Path) -> None:
    rows = [runs.row(f"t{n}", "Say it.", "red " * n) for n in range(1, 9)]
    rows += [runs.row("long", "Say it.", "red " * 300), runs.row("longer", "Say it.", "red " * 400)]
    rows.append(runs.row("image", "<image>\nWhich?", "red", image="a.png"))
    runs.picture(tmp_path / "images" / "a.png", (1, 2, 3))
    data = written(tmp_path, rows)
    one = looked(asked(data, tmp_path / "a", "steps=1"))
    assert "looked at all 11 samples and the headers of their images; an image takes 16 tok" in one
    assert "2 are too long for a row of 128 tokens and 64 tiles and left out" in one
    assert one.split("the longest is ")[1].startswith("sample 'longer' of 'data' with 1,6")
    cut = looked(asked(data, tmp_path / "b", "steps=1", "data.over_long=truncate"))
    assert "2 are longer than a row and cut at the end; the longest is sample 'longer'" in cut
    assert cut.split("with ")[1] == one.split("with ")[1]


def test_a_look_that_would_take_too_long_is_one_at_some(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data = written(tmp_path, [runs.row(f"t{n}", "Say it.", "red") for n in range(700)])
    monkeypatch.setattr(epochs, "PATIENCE", 0.0)
    monkeypatch.setattr(stage, "PATIENCE", 0.0)
    assert "looked at 512 of 700 samples" in looked(asked(data, tmp_path / "run", "steps=1"))


def test_keys_that_are_not_read_are_said_once(tmp_path: Path) -> None:
    """In a run of two stages, however many rows have them."""
    rows = [runs.row(f"t{n}", "Say it.", "red", images=["a.png"], model="x") for n in range(20)]
    rows[7]["conversations"][1]["weight"] = 0
    data = written(tmp_path, rows)
    chain = asked(data, tmp_path / "run", "steps=2", "data.template=v1")
    said: list[str] = []
    api.train("llava-tiny", chain, say=said.append)
    told = [line for line in said if "is not read" in line]
    image = "did you mean 'image'? It takes a path or a list of paths"
    assert sorted(told) == [
        f"a row of 'data': its key 'images' is not read: {image}",
        "a row of 'data': its key 'model' is not read",
        "a row of 'data': its key 'weight' of its turns is not read: every gpt turn carries loss",
    ]
    said = []
    dry = [*chain, f"out={tmp_path / 'dry'}"]
    api.dry_run("llava-tiny", dry, say=said.append)
    assert sum("'images' is not read" in line for line in said) == 1


def test_links_out_of_the_image_folder_are_followed_where_a_key_says_so(tmp_path: Path) -> None:
    """As in a cache of the Hub, whose images are links to blobs."""
    runs.picture(tmp_path / "blobs" / "a.png", (1, 2, 3))
    (tmp_path / "blobs" / "a.png").rename(tmp_path / "blobs" / "b10b")
    data = written(tmp_path, [runs.row("a", "<image>\nWhich?", "red", image="a.png")] * 3)
    (tmp_path / "images" / "a.png").symlink_to("../blobs/b10b")
    chain = asked(data, tmp_path / "run", "steps=1")
    with pytest.raises(ValueError, match="leads outside the image folder .*data.links=true"):
        train(chain)
    train([*chain, "data.links=true"])
    assert runs.metrics(tmp_path / "run")[-1]["tiles_per_s"] > 0
