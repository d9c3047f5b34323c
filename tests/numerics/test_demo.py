"""The demo, on forty digits and for a few steps: what its report says is what its files and its model say."""

import collections
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from neva import api
from neva.recipes import digits
from tests.runs import metrics

pytestmark = pytest.mark.slow
HELD_OUT = 8
SMALL = (
    "model.decoder.layers=1", "model.vision.layers=1", "log.tensorboard=false", "batch.rows=2", "batch.micro_rows=1",
    "data.pool=16", "pretrain:steps=2", "finetune:steps=3", "optim.lr=0.1", "optim.warmup=1",
)  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict, list[str]]:
    """The run's folder, its report, and what was said."""
    run, said = tmp_path_factory.mktemp("demo") / "run", []
    with np.load(digits.archive()) as packed:
        few = {name: packed[name][:40] for name in packed}
    np.savez(run.parent / "few.npz", **few)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digits, "archive", lambda: run.parent / "few.npz")
        patch.setattr(digits, "HELD_OUT", HELD_OUT)
        found = api.demo([f"out={run}", *SMALL], say=said.append)
    return run, found, said


def test_the_report_is_written_and_said(made: tuple[Path, dict, list[str]]) -> None:
    run, found, said = made
    assert json.loads((run / "report.json").read_text()) == found
    page = (run / "report.html").read_text()
    for kind in found["accuracy"]:
        assert kind.replace("_", " ") in page and f"{found['baselines'][kind] * 100:.1f}%" in page
    assert f"See {run / 'report.html'}" in said[-1] and f"Asking {3 * HELD_OUT} questions" in "\n".join(said)
    assert f"{found['accuracy']['even']:6.1%}" in said[-1]


def test_its_accuracy_is_the_models_with_and_without_images(made: tuple[Path, dict, list[str]], tmp_path: Path) -> None:
    """Asked again by `generate`, question by question, of the file; then of one whose images are black files."""
    run, found, _ = made
    rows = json.loads((run / "data" / "heldout.json").read_text())
    assert len(rows) == 3 * HELD_OUT
    for name in {name for row in rows for name in ([row["image"]] if isinstance(row["image"], str) else row["image"])}:
        with Image.open(run / "data" / "images" / name) as image:
            Image.new("RGB", image.size).save(tmp_path / name)
    for key, folder in (("accuracy", run / "data" / "images"), ("blank_image", tmp_path)):
        answers = [
            answer["text"] for answer in api.generate(run, data=run / "data" / "heldout.json", image_folder=folder, batch_size=1, max_new_tokens=8)
        ]
        right = collections.defaultdict(list)
        for row, answer in zip(rows, answers, strict=True):
            right[row["kind"]].append(answer.strip() == row["conversations"][1]["value"])
        assert found[key] == pytest.approx({kind: sum(marks) / len(marks) for kind, marks in right.items()})
    for kind, best in found["baselines"].items():
        truths = collections.Counter(row["conversations"][1]["value"] for row in rows if row["kind"] == kind)
        assert best == pytest.approx(max(truths.values()) / HELD_OUT)
    assert found["held_out_images"] == HELD_OUT


def test_its_stages_are_those_of_the_run(made: tuple[Path, dict, list[str]]) -> None:
    run, found, _ = made
    lines = metrics(run)
    parameters = {name: parameter.numel() for name, parameter in api.load(run).model.named_parameters()}
    projector = sum(count for name, count in parameters.items() if name.startswith("projector."))
    losses = [line["loss"] for line in lines]
    assert found["stages"] == [
        {"name": "pretrain", "steps": 2, "trainable": projector, "frozen_changed": 0, "loss_first": losses[0], "loss_last": losses[1]},
        {"name": "finetune", "steps": 3, "trainable": sum(parameters.values()), "frozen_changed": 0, "loss_first": losses[2], "loss_last": losses[4]},
    ]  # fmt: skip
    assert found["seconds"] >= sum(line["seconds"] for line in lines)


def test_started_again_it_trains_nothing_and_says_the_same(made: tuple[Path, dict, list[str]]) -> None:
    run, found, _ = made
    before = (run / "metrics.jsonl").read_bytes()
    again = api.demo([f"out={run}", *SMALL], say=lambda line: None)
    assert (run / "metrics.jsonl").read_bytes() == before
    assert {**again, "seconds": 0} == {**found, "seconds": 0}
    assert again["seconds"] > sum(line["seconds"] for line in metrics(run))


def test_a_frozen_tensor_that_changed_is_counted(made: tuple[Path, dict, list[str]], tmp_path: Path) -> None:
    """The count is 0 in a sound run, so that it must be seen to count."""
    from neva.recipes.resolve import resolve
    from neva.training.stage import frozen_changed

    run, _, _ = made
    stages = resolve(api.recipe("demo", [f"out={run}", *SMALL]))
    ends = [run / "checkpoints" / f"step_{step}" for step in (2, 5)]
    frozen = [name for name, _ in api.load(run).model.named_parameters() if not name.startswith("projector.")]
    trained, changed = frozen_changed(stages[0], ends[1], None)  # the second stage trains all that the first froze
    assert trained > 0 and changed == len(frozen)
    assert frozen_changed(stages[0], ends[0], None)[1] == 0
    assert frozen_changed(stages[0], ends[1], ends[0])[1] == len(frozen)
