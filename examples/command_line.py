"""Shared by the examples' command lines: arguments that are checked before any work, and an orderly interruption."""

from __future__ import annotations

import argparse
import errno
import math
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

import torch


def new_parser(docstring: str) -> argparse.ArgumentParser:
    """A parser that shows defaults, and the first line of a module's docstring as its description."""
    return argparse.ArgumentParser(
        description=docstring.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )


def positive_int(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"should be a positive integer, got {text!r}")
    return int(text)


def ratio(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"should be a number in (0, 1], got {text!r}")
    return value


def check_seed(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    if not 0 <= args.seed < 2**32 - 1:
        parser.error(f"argument --seed: should be in [0, 2**32 − 2], got {args.seed}")


def check_device(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Stop unless tensors can be made on `args.device`."""
    try:
        torch.empty(0, device=args.device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        parser.error(f"argument --device: {args.device!r} cannot be used: {str(error).splitlines()[0]}")


def make_output_dir(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Call this after all other checks, because nothing should be written before them."""
    try:
        args.output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"argument --output-dir: {error}")


def training_arguments(
    parser: argparse.ArgumentParser, argv: list[str] | None, folder: str, **values: object
) -> argparse.Namespace:
    """The arguments of a parser and --seed, --device and --output-dir, checked; `values` are added to them."""
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output-dir", type=Path, default=Path("outputs") / folder)
    args = parser.parse_args(argv, argparse.Namespace(**values))
    check_seed(parser, args)
    check_device(parser, args)
    make_output_dir(parser, args)
    return args


def benchmark_arguments(
    argv: list[str] | None, docstring: str, name: str, rounds: int, **sizes: tuple[list[int], str]
) -> argparse.Namespace:
    """The arguments of a benchmark: its sizes, each with default and help, and those that all benchmarks have."""
    parser = new_parser(docstring)
    for size, (default, text) in sizes.items():
        parser.add_argument(f"--{size}", type=positive_int, nargs="+", default=default, help=text)
    parser.add_argument("--rounds", type=positive_int, default=rounds, help="of each step, interleaved")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output-dir", type=Path, default=Path("outputs") / name)
    args = parser.parse_args(argv)
    check_device(parser, args)
    make_output_dir(parser, args)
    return args


def exit_code(job: Callable[[], None], kept: str) -> int:
    """0 after the job; 130 after Ctrl-C, and 1 if a file cannot be written. `kept` then says what the job has left."""
    try:
        job()
    except KeyboardInterrupt:
        print(f"\nInterrupted. {kept}", file=sys.stderr)
        return 130
    except Exception as error:
        reason = _writing_error(error)
        if reason is None:
            raise
        print(f"\nCannot write: {reason}. {kept}", file=sys.stderr)
        return 1
    return 0


_NOT_WRITABLE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO}


def _writing_error(error: BaseException | None) -> str | None:
    """Why the system could not write, from anywhere in the chain of causes, where torch and safetensors hide it."""
    while error is not None:
        number = error.errno if isinstance(error, OSError) else None
        if number is None and (found := re.search(r"\(os error (\d+)\)", str(error))):
            number = int(found[1])
        if number in _NOT_WRITABLE:
            return os.strerror(number)
        if re.search("iostream error|inline_container", str(error)):
            return "a file ends before its end, on a full disk or at a limit of its size"
        error = error.__cause__ or error.__context__
    return None
