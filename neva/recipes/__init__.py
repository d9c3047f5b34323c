"""Recipes by name. A recipe is a function without arguments that returns the stages of a run.

To add one: a file beside this one, and a line in `RECIPES`. The first line of its docstring is its description.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from neva.job import TrainConfig


@dataclass(frozen=True)
class Place:
    """Where a recipe is, and what can be said of it without importing it, which takes seconds."""

    module: str
    function: str
    stages: tuple[str, ...] = ("pretrain", "finetune")


RECIPES: dict[str, Place] = {
    "demo": Place("demo", "demo"),
    "llava-tiny": Place("llava_tiny", "llava_tiny"),
    "llava15-7b": Place("llava15", "llava15_7b"),
    "llava15-13b": Place("llava15", "llava15_13b"),
    "neva-llama2-7b": Place("neva", "neva_llama2_7b"),
    "neva-llama2-13b": Place("neva", "neva_llama2_13b"),
    "neva-llama3-8b": Place("neva", "neva_llama3_8b"),
    "neva-mixtral": Place("neva", "neva_mixtral"),
    "nvlm-d-tiny": Place("nvlm_tiny", "nvlm_d_tiny"),
    "nvlm-x-tiny": Place("nvlm_tiny", "nvlm_x_tiny"),
    "nvlm-h-tiny": Place("nvlm_tiny", "nvlm_h_tiny"),
    "nvlm-d-34b": Place("nvlm", "nvlm_d_34b"),
    "nvlm-d-72b": Place("nvlm", "nvlm_d_72b"),
    "nvlm-x-34b": Place("nvlm", "nvlm_x_34b"),
    "nvlm-x-72b": Place("nvlm", "nvlm_x_72b"),
    "nvlm-h-34b": Place("nvlm", "nvlm_h_34b"),
    "nvlm-h-72b": Place("nvlm", "nvlm_h_72b"),
}
"""Name on the command line -> a function of a file of this folder."""


def get(name: str) -> "tuple[TrainConfig, ...]":
    """The stages of a recipe `NAME`, of one stage `NAME/STAGE`, or of a saved config `FILE.yaml`.

    ValueError for any other path, with what to give in its place.
    """
    from neva import config  # which reads YAML: a list of recipes need not wait for it

    recipe, slash, wanted = name.partition("/")
    if recipe not in RECIPES:
        path = Path(name)
        if advice := _not_a_recipe(path):
            raise ValueError(f"{name} {advice}")
        if path.suffix in (".yaml", ".yml"):
            from neva.job import NAMED, TrainConfig

            return config.load(name, TrainConfig, named=NAMED)
        near = config.nearest(recipe, RECIPES)
        raise ValueError(f"no recipe '{recipe}'.{near} A saved config ends in .yaml.")
    stages = _function(recipe)()
    if not slash:
        return stages
    chosen = tuple(stage for stage in stages if stage.name == wanted)
    if not chosen:
        raise ValueError(f"no stage '{wanted}' in recipe '{recipe}'.{config.nearest(wanted, [s.name for s in stages])}")
    return chosen


def _not_a_recipe(path: Path) -> str:
    """What a path is, if not a saved config, and what to give in its place; empty for one that is
    not there."""
    if path.name == "neva.yaml" and path.is_file():
        advice = _not_a_recipe(path.parent)
        return f"describes a checkpoint, {path.parent}, which {advice}" if advice else ""
    if path.suffix in (".nemo", ".safetensors", ".ckpt", ".bin", ".gguf") and path.is_file():
        return f"is a file of weights, and no recipe. To start from them: neva train RECIPE init={path}"
    if not path.is_dir():
        return ""
    start = f"To start from its weights: neva train RECIPE init={path}"
    if (path / "manifest.json").is_file():
        run = path.resolve().parents[1] / "config.yaml"
        again = f"neva train {run} --resume {path}" if run.is_file() else ""
        goes_on = f" To go on from it: {again}." if again else ""
        return f"is a checkpoint, and no recipe.{goes_on} {start}"
    if (path / "config.yaml").is_file():
        return f"is a run's folder. To go on with it: neva train {path / 'config.yaml'} --resume auto. {start}"
    if (path / "config.json").is_file():
        return f"is a model of Hugging Face's, and no recipe. {start}"
    return f"is a folder, and no recipe: `neva recipes` lists them, and a saved config is a file, {path}/config.yaml"


def listing() -> list[dict[str, Any]]:
    """Every recipe as {"name", "stages", "description"}. No recipe is imported: their texts are
    read."""
    rows = []
    for name, place in RECIPES.items():
        doc = _docs(place.module)[place.function]
        rows.append({"name": name, "stages": list(place.stages), "description": doc})
    return rows


@cache
def _docs(module: str) -> dict[str, str]:
    """Function of a file of this folder -> the first line of its docstring."""
    import ast

    tree = ast.parse(Path(__file__).with_name(f"{module}.py").read_text(encoding="utf-8"))
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    return {node.name: (ast.get_docstring(node) or "").partition("\n")[0] for node in functions}


def _function(name: str) -> "Callable[[], tuple[TrainConfig, ...]]":
    place = RECIPES[name]
    return getattr(importlib.import_module(f"{__name__}.{place.module}"), place.function)
