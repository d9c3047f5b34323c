"""Import and export on each path of the gate."""

from pathlib import Path

import pytest

from neva import api
from neva.checkpoint import parity
from neva.checkpoint.hf import Options
from neva.checkpoint.target import ExportOptions


class Gate:
    """Import and export on one of the gate's paths, and what they said."""

    def __init__(self, checked: bool):
        self.checked = checked
        self.said: list[str] = []

    def come_in(self, *sources: Path, to: Path, **options) -> Path:
        asked = Options(**options)
        say, parity = self.said.append, self.checked
        return api.import_checkpoint(sources, to, options=asked, parity=parity, say=say)

    def go_out(self, checkpoint: Path, to: Path, **options) -> Path:
        asked = ExportOptions(**options)
        say, parity = self.said.append, self.checked
        return api.export_checkpoint(checkpoint, to, options=asked, parity=parity, say=say)

    def there_and_back(self, *sources: Path, **options) -> Path:
        """The folder that an export of an import of these is."""
        place = sources[0].parent
        return self.go_out(self.come_in(*sources, to=place / "neva", **options), place / "out")

    @property
    def warnings(self) -> str:
        return "\n".join(line for line in self.said if line.startswith("warning"))


@pytest.fixture(params=["whole", "pieces", "no parity"])
def gate(request, monkeypatch) -> Gate:
    """The gate comparing whole models, forced onto its pieces, and left out."""
    monkeypatch.setattr(parity, "fits", lambda parameters: request.param == "whole")
    return Gate(checked=request.param != "no parity")
