"""The `softmining` command. Its subcommands import what they need when they run, so that `--help` is quick."""

from __future__ import annotations

import sys
from pathlib import Path

import tyro

from nerfstudio_softmining.errors import UserError


def demo(output: Path = Path("softmining_demo"), iterations: int = 1000, seed: int = 42) -> int:
    """Train on a small scene that is rendered here, and show what comes out: a few minutes on two CPU cores.

    Args:
        output: Folder for everything that the demo writes.
        iterations: Training steps.
        seed: Seed of the training.
    """
    from nerfstudio_softmining.demo.demo import run_demo

    run_demo(output, iterations, seed)
    return 0


def doctor() -> int:
    """Say what is installed, what works with it and how to get what is missing."""
    from nerfstudio_softmining.doctor import run_doctor

    return run_doctor()


def main() -> int:
    """Run the command line; the result is the exit code."""
    try:
        return tyro.extras.subcommand_cli_from_dict(
            {"demo": demo, "doctor": doctor}, prog="softmining", description="Soft mining for nerfstudio."
        )
    except UserError as error:
        print(f"\nError: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
