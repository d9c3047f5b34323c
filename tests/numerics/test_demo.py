"""The demo, on forty digits and for a few steps: what its report says is what its
files and its model say."""

import collections
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from neva import api
from neva.data.source import Source
from neva.evaluate import run as evaluation
from neva.infer.generate import Loaded
from neva.recipes import digits
from tests.runs import metrics

pytestmark = pytest.mark.slow
HELD_OUT = 8
SMALL = (
    "model.decoder.layers=1", "model.vision.layers=1", "log.tensorboard=false", "batch.rows=2", "batch.micro_rows=1",
    "data.pool=16", "pretrain:steps=2", "finetune:steps=3", "optim.lr=0.1", "optim.warmup=1", "finetune:trainable=[*,!projector.*]",
)  # fmt: skip
"""The second stage freezes what the first trained, so that it matters which
weights are compared."""


@dataclass(frozen=True, kw_only=True)
class Made:
    """A demo that was run."""

    run: Path
    report: dict
    said: list[str]
    asked: list[bool]
    """Of each evaluation: were its images to be black?"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    run = tmp_path_factory.mktemp("demo") / "run"
    said: list[str] = []
    asked: list[bool] = []
    honest = evaluation.evaluate

    def noting(loaded: Loaded, source: Source, **options: Any) -> list[evaluation.Judged]:
        asked.append(options.get("blank", False))
        return honest(loaded, source, **options)

    with np.load(digits.archive()) as packed:
        few = {name: packed[name][:40] for name in packed}
    np.savez(run.parent / "few.npz", **few)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digits, "archive", lambda: run.parent / "few.npz")
        patch.setattr(digits, "HELD_OUT", HELD_OUT)
        patch.setattr(evaluation, "evaluate", noting)
        report = api.demo([f"out={run}", *SMALL], say=said.append)
    return Made(run=run, report=report, said=said, asked=asked)


def test_the_report_is_written_and_said(made: Made) -> None:
    run = made.run
    found = made.report
    said = made.said
    assert json.loads((run / "report.json").read_text()) == found
    page = (run / "report.html").read_text()
    for kind in found["accuracy"]:
        assert kind.replace("_", " ") in page and f"{found['baselines'][kind] * 100:.1f}%" in page
    assert f"See {run / 'report.html'}" in said[-1] and f"Asking {3 * HELD_OUT} questions" in "\n".join(said)
    assert f"{found['accuracy']['even']:6.1%}" in said[-1]


def test_its_accuracy_is_the_models_with_and_without_images(made: Made, tmp_path: Path) -> None:
    """Asked again by `generate`, question by question, of the file; then of one whose
    images are black files."""
    run = made.run
    found = made.report
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
    assert made.asked == [False, True]


def test_its_stages_are_those_of_the_run(made: Made) -> None:
    run = made.run
    found = made.report
    lines = metrics(run)
    parameters = {name: parameter.numel() for name, parameter in api.load(run).model.named_parameters()}
    projector = sum(count for name, count in parameters.items() if name.startswith("projector."))
    losses = [line["loss"] for line in lines]
    first, second = found["stages"]
    assert (first["name"], first["steps"], first["trainable"]) == ("pretrain", 2, projector)
    assert (first["loss_first"], first["loss_last"]) == (losses[0], losses[1])
    rest = sum(parameters.values()) - projector
    assert (second["name"], second["steps"], second["trainable"]) == ("finetune", 3, rest)
    assert (second["loss_first"], second["loss_last"]) == (losses[2], losses[4])
    assert first["frozen_changed"] == second["frozen_changed"] == 0
    assert found["seconds"] >= sum(line["seconds"] for line in lines)


def test_started_again_it_trains_nothing_and_says_the_same(made: Made) -> None:
    run = made.run
    found = made.report
    before = (run / "metrics.jsonl").read_bytes()
    again = api.demo([f"out={run}", *SMALL], say=lambda line: None)
    assert (run / "metrics.jsonl").read_bytes() == before
    assert {**again, "seconds": 0} == {**found, "seconds": 0}
    assert again["seconds"] > sum(line["seconds"] for line in metrics(run))


def test_a_frozen_tensor_that_changed_is_counted(made: Made, tmp_path: Path) -> None:
    """The count is 0 in a sound run, so that it must be seen to count."""
    from neva.recipes.resolve import resolve
    from neva.training.stage import frozen_changed

    run = made.run
    stages = resolve(api.recipe("demo", [f"out={run}", *SMALL]))
    ends = [run / "checkpoints" / f"step_{step}" for step in (2, 5)]
    frozen = [name for name, _ in api.load(run).model.named_parameters() if not name.startswith("projector.")]
    # the second stage trains all that the first froze
    trained, changed = frozen_changed(stages[0], ends[1], None)
    assert trained > 0 and changed == len(frozen)
    assert frozen_changed(stages[0], ends[0], None)[1] == 0
    assert frozen_changed(stages[0], ends[1], ends[0])[1] == len(frozen)
    assert frozen_changed(stages[1], ends[1], ends[0])[1] == 0 < frozen_changed(stages[1], ends[1], None)[1]
