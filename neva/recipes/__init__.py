"""Recipes by name. A recipe is a function without arguments that returns the stages of a run.

To add one: a file beside this one, and a line in `RECIPES`. The first line of its docstring is its description.
"""

import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from neva import config

if TYPE_CHECKING:
    from neva.job import TrainConfig

RECIPES: dict[str, str] = {
    "demo": "neva.recipes.demo:demo",
    "llava-tiny": "neva.recipes.llava_tiny:llava_tiny",
    "llava15-7b": "neva.recipes.llava15:llava15_7b",
    "llava15-13b": "neva.recipes.llava15:llava15_13b",
    "neva-llama2-7b": "neva.recipes.neva:neva_llama2_7b",
    "neva-llama2-13b": "neva.recipes.neva:neva_llama2_13b",
    "neva-llama3-8b": "neva.recipes.neva:neva_llama3_8b",
    "neva-mixtral": "neva.recipes.neva:neva_mixtral",
    "nvlm-d-tiny": "neva.recipes.nvlm_tiny:nvlm_d_tiny",
    "nvlm-x-tiny": "neva.recipes.nvlm_tiny:nvlm_x_tiny",
    "nvlm-h-tiny": "neva.recipes.nvlm_tiny:nvlm_h_tiny",
    "nvlm-d-34b": "neva.recipes.nvlm:nvlm_d_34b",
    "nvlm-d-72b": "neva.recipes.nvlm:nvlm_d_72b",
    "nvlm-x-34b": "neva.recipes.nvlm:nvlm_x_34b",
    "nvlm-x-72b": "neva.recipes.nvlm:nvlm_x_72b",
    "nvlm-h-34b": "neva.recipes.nvlm:nvlm_h_34b",
    "nvlm-h-72b": "neva.recipes.nvlm:nvlm_h_72b",
}
"""Name on the command line -> module:function, imported when asked for."""


def get(name: str) -> "tuple[TrainConfig, ...]":
    """The stages of a recipe `NAME`, of one stage `NAME/STAGE`, or of a saved config `FILE.yaml`."""
    if name.endswith((".yaml", ".yml")):
        from neva.job import NAMED, TrainConfig

        return config.load(name, TrainConfig, named=NAMED)
    recipe, slash, wanted = name.partition("/")
    if recipe not in RECIPES:
        raise ValueError(f"no recipe '{recipe}'.{config.nearest(recipe, RECIPES)} A saved config ends in .yaml.")
    stages = _function(recipe)()
    if not slash:
        return stages
    chosen = tuple(stage for stage in stages if stage.name == wanted)
    if not chosen:
        raise ValueError(f"no stage '{wanted}' in recipe '{recipe}'.{config.nearest(wanted, [s.name for s in stages])}")
    return chosen


def listing() -> list[dict[str, Any]]:
    """Every recipe as {"name", "stages", "description"}."""
    rows = []
    for name in RECIPES:
        function = _function(name)
        lines = (function.__doc__ or "").strip().splitlines()
        rows.append({"name": name, "stages": [stage.name for stage in function()], "description": lines[0] if lines else ""})
    return rows


def _function(name: str) -> "Callable[[], tuple[TrainConfig, ...]]":
    module, _, function = RECIPES[name].partition(":")
    return getattr(importlib.import_module(module), function)
