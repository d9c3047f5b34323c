"""`python -m neva`; torchrun starts its ranks so."""

from neva import launch
from neva.cli import main

if __name__ == "__main__":
    if launch.is_rank():
        launch.end_at_once(lambda: main(prog_name="neva"))
    main(prog_name="neva")
