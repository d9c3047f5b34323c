"""neva trains, evaluates and serves vision-language models of the LLaVA family.

`import neva` is cheap: the functions below arrive with their libraries at first use.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from neva.api import (
        evaluate,
        export_checkpoint,
        generate,
        import_checkpoint,
        inspect,
        load,
        recipe,
        train,
    )

__version__ = "0.1.0"
__all__ = [
    "evaluate",
    "export_checkpoint",
    "generate",
    "import_checkpoint",
    "inspect",
    "load",
    "recipe",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'neva' has no attribute '{name}'")
    from neva import api

    return getattr(api, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
