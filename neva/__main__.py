"""What the shell runs: `neva`, and `python -m neva`, as torchrun starts its ranks."""

from neva import launch
from neva.cli import main


def run() -> None:
    """The `neva` command."""
    launch.sleep_soon()
    launch.end_at_once(lambda: main(prog_name="neva"))


if __name__ == "__main__":
    run()
