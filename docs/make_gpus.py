"""Writes the table of docs/gpus.md from the recipes, on meta devices: `make keys`."""

from dataclasses import replace
from pathlib import Path

from neva import api, plan
from neva.job import TrainConfig
from neva.parallel import machine

PAGE = Path(__file__).with_name("gpus.md")
BEGIN, END = "<!-- made by make_gpus.py -->", "<!-- end -->"
GPU = machine.asked(80.0)
LAST_BLOCKS = ("projector.*", "decoder.blocks.2[0-9].*", "decoder.blocks.3[01].*", "head.*")
RECIPES: dict[str, dict[str, object]] = {
    "llava15-7b": {},
    "llava15-7b/finetune, the last 12 blocks": {"trainable": LAST_BLOCKS},
    "llava15-13b": {},
    "neva-llama3-8b": {},
    "neva-mixtral": {},
    "nvlm-d-34b": {"recompute": "block"},
    "nvlm-x-34b": {"recompute": "block"},
    "nvlm-h-34b": {"recompute": "block"},
}
"""Recipe and a note on it -> what is changed."""


def table() -> str:
    """A row for each stage: what a rank needs in GiB, of one and of eight, and the least number
    that fits."""
    lines = [
        "| recipe | stage | weights, gradients, Adam of all ranks | activations | one rank | each of eight | fits 80 GB from |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, changes in RECIPES.items():
        recipe, _, note = name.partition(",")
        for stage in api.recipe(recipe, changes):
            lines.append(_row(recipe.partition("/")[0], stage, note=f"{note and ','}{note}{_changed(changes)}"))
    return "\n".join(lines)


def _changed(changes: dict[str, object]) -> str:
    return ", recompute=block" if "recompute" in changes else ""


def _row(recipe: str, stage: TrainConfig, *, note: str) -> str:
    needs = plan.needs(replace(stage, precision="bf16"), precision="bf16", cuda=True)
    one, eight = needs.on(1), needs.on(8)
    kept = one.weights + one.gradients + one.optimiser
    ranks = next((n for n in (1, 2, 4, 8, 16, 32, 64) if plan.fits(needs.on(n), GPU, 1)), None)
    cells = (kept, one.activations, one.total, eight.total)
    shown = " | ".join(f"{size / 2**30:.1f}" for size in cells)
    gpus = "no number of GPUs" if ranks is None else "one GPU" if ranks == 1 else f"{ranks} GPUs"
    return f"| {recipe} | {stage.name}{note} | {shown} | {gpus} |"


def page() -> str:
    """The page's text with the table made anew."""
    before, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
    return f"{before}{BEGIN}\n{table()}\n{END}{rest.split(END)[1]}"


def main() -> None:
    PAGE.write_text(page(), encoding="utf-8")
    print(PAGE)


if __name__ == "__main__":
    main()
