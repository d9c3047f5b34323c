"""The run folder's list of samples that were not trained."""

import json
from collections.abc import Sequence
from pathlib import Path

from neva.data.draw import Bad
from neva.training.metrics import StepReport

SKIPPED = "skipped.jsonl"
"""A line for each time that a sample is left out: {step, stage, source, id, why, message}."""


def write_skipped(out: Path, report: StepReport, skipped: Sequence[Bad]) -> None:
    """Append what was left out on the way to a step. `why` is `long` or `broken`."""
    if not skipped:
        return
    lines = []
    for bad in skipped:
        row = {
            "step": report.step,
            "stage": report.stage,
            "source": bad.source,
            "id": bad.id,
            "why": bad.why,
            "message": bad.message,
        }
        lines.append(json.dumps(row) + "\n")
    with (out / SKIPPED).open("a", encoding="utf-8") as file:
        file.writelines(lines)
