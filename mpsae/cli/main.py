"""Entry point: parse the command line and turn errors into one line."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

from simple_parsing import ArgumentParser

from mpsae import __version__
from mpsae.training.distributed import is_first, wait_to_be_ended

_USAGE = {
    "cache": "mpsae cache [MODEL [DATASET]] [options]",
    "train": "mpsae train [MODEL [DATASET]] [options]",
    "eval": "mpsae eval RUN... [options]",
    "probe": "mpsae probe RUN... [options]",
    "latents": "mpsae latents RUN... [options]",
    "autointerp": "mpsae autointerp RUN... [--endpoint URL --explainer MODEL] [options]",
    "report": "mpsae report RUN... [--out PAGE.html]",
    "bench": "mpsae bench [--d D --n N --k K --batch B] [options]",
    "convert": "mpsae convert SRC DST --to FORMAT",
    "push": "mpsae push RUN USER/REPO [options]",
    "demo": "mpsae demo [options]",
}


def _commands() -> dict[str, tuple[type, Callable[[Any], object]]]:
    from mpsae.cli import (
        autointerp,
        bench,
        cache,
        convert,
        demo,
        eval,
        latents,
        probe,
        push,
        report,
        train,
    )

    return {
        "cache": (cache.CacheConfig, cache.run),
        "train": (train.TrainConfig, train.run),
        "eval": (eval.EvalConfig, eval.run),
        "probe": (probe.ProbeConfig, probe.run),
        "latents": (latents.LatentsConfig, latents.run),
        "autointerp": (autointerp.AutointerpConfig, autointerp.run),
        "report": (report.ReportConfig, report.run),
        "bench": (bench.BenchConfig, bench.run),
        "convert": (convert.ConvertConfig, convert.run),
        "push": (push.PushConfig, push.run),
        "demo": (demo.DemoConfig, demo.run),
    }


def _settings(arguments: Sequence[str]) -> Any:
    """Read the file of settings that `mpsae train` starts from, if one is named."""
    from mpsae.cli.train import TrainConfig

    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--config", type=Path)
    path = finder.parse_known_args(arguments)[0].config
    return None if path is None else TrainConfig.from_json(path)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; the exit status: 0, 2 for bad input, 130 at Ctrl-C, 143 at SIGTERM.

    Of the processes that torchrun started, which all get the same error, the first one reports it;
    torchrun itself then ends with status 1.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    if is_first():
        return _run(given)
    with open(os.devnull, "w") as nowhere, redirect_stderr(nowhere), redirect_stdout(nowhere):
        try:
            status = _run(given)
        except SystemExit as end:  # of the parser
            status = int(end.code or 0)
    return wait_to_be_ended(status) if status == 2 else status


def _run(given: list[str]) -> int:
    parser = ArgumentParser(
        prog="mpsae", description="Matching-pursuit sparse autoencoders: train and judge them."
    )
    parser.add_argument("--version", action="version", version=f"mpsae {__version__}")
    commands = _commands()
    subparsers = parser.add_subparsers(dest="command", required=True)
    # one line per retry of every request says less than the error at the end
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    try:
        defaults = {"train": _settings(given)} if given[:1] == ["train"] else {}
        for name, (config, _) in commands.items():
            text = (config.__doc__ or "").strip().splitlines()[0]
            subparser = subparsers.add_parser(name, help=text, description=text, usage=_USAGE[name])
            subparser.add_arguments(config, dest="config", default=defaults.get(name))
        parsed = parser.parse_args(given)
        commands[parsed.command][1](parsed.config)
    except (ValueError, OSError) as error:
        # messages of the packages underneath have several lines
        print(f"mpsae: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as error:
        return 128 + getattr(error, "signal", signal.SIGINT)
    return 0
