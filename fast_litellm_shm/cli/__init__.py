"""The command ``fast-shm``: inspect and clean up the shared-memory segments of this host.

Each verb is a module of its own (``ls``, ``inspect``, ``top``, ...) with a function ``run``, and is
imported only when it is called.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys

from fast_litellm_shm.cli import arguments


def _run(args: argparse.Namespace) -> int:
    from fast_litellm_shm import exceptions

    try:
        status: int = importlib.import_module(f"{__name__}.{args.verb}").run(args)
        sys.stdout.flush()
        return status
    except exceptions.SegmentNotFoundError as error:
        from fast_litellm_shm.cli import segments

        print(f"fast-shm: {error}. {segments.hint(args.name)}", file=sys.stderr)
        return arguments.EXIT_NOT_FOUND
    except exceptions.SegmentOwnerError as error:
        print(f"fast-shm: {error} (here: --allow-other-owner)", file=sys.stderr)
    except exceptions.FastShmError as error:
        print(f"fast-shm: {error}", file=sys.stderr)
    return arguments.EXIT_FAILED


def _silence_stdout() -> None:
    """Send the interpreter's last flush nowhere: stdout is closed or full, and it would fail."""
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ValueError):
        return  # not a real file


def main(argv: list[str] | None = None) -> int:
    """Run ``fast-shm`` with these arguments (default: ``sys.argv``); returns its exit code."""
    try:
        try:
            args = arguments.parse(argv)
        except SystemExit as end:
            sys.stdout.flush()
            return end.code if isinstance(end.code, int) else arguments.EXIT_USAGE
        return _run(args)
    except KeyboardInterrupt:
        return arguments.EXIT_INTERRUPTED
    except BrokenPipeError:
        _silence_stdout()
        return arguments.EXIT_OK
    except OSError as error:
        _silence_stdout()  # a full disk behind stdout would be reported once more at exit
        where = f"{error.filename!r}: " if error.filename else ""
        print(f"fast-shm: {where}{error.strerror or error}", file=sys.stderr)
        return arguments.EXIT_FAILED
