"""Entry point: parse the command line and turn errors into one line."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence
from typing import Any

from simple_parsing import ArgumentParser

from mpsae import __version__

_USAGE = {
    "train": "mpsae train [MODEL [DATASET]] [options]",
    "eval": "mpsae eval RUN... [options]",
    "bench": "mpsae bench [--d D --n N --k K --batch B] [options]",
    "convert": "mpsae convert SRC DST --to FORMAT",
    "demo": "mpsae demo [options]",
}


def _commands() -> dict[str, tuple[type, Callable[[Any], object]]]:
    from mpsae.cli import bench, convert, demo, eval, train

    return {
        "train": (train.TrainConfig, train.run),
        "eval": (eval.EvalConfig, eval.run),
        "bench": (bench.BenchConfig, bench.run),
        "convert": (convert.ConvertConfig, convert.run),
        "demo": (demo.DemoConfig, demo.run),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; the exit status: 0, 2 for bad input, 130 when interrupted."""
    parser = ArgumentParser(
        prog="mpsae", description="Matching-pursuit sparse autoencoders: train and judge them."
    )
    parser.add_argument("--version", action="version", version=f"mpsae {__version__}")
    commands = _commands()
    subparsers = parser.add_subparsers(dest="command", required=True)
    for name, (config, _) in commands.items():
        text = (config.__doc__ or "").strip().splitlines()[0]
        subparser = subparsers.add_parser(name, help=text, description=text, usage=_USAGE[name])
        subparser.add_arguments(config, dest="config")
    # one line per retry of every request says less than the error at the end
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    try:
        parsed = parser.parse_args(arguments)
        commands[parsed.command][1](parsed.config)
    except (ValueError, OSError) as error:
        # messages of the packages underneath have several lines
        print(f"mpsae: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0
