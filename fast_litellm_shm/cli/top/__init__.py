"""``fast-shm top``: a segment live, on the whole terminal."""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys

from fast_litellm_shm import exceptions


def run(args: argparse.Namespace) -> int:
    """Show it, until q."""
    if importlib.util.find_spec("textual") is None:
        raise exceptions.FastShmError(
            'top needs textual, which is not installed: pip install "fast-litellm-shm[top]". '
            "`fast-shm inspect --watch` works without it"
        )
    # textual writes to stderr
    if not all(stream.isatty() for stream in (sys.stdin, sys.stdout, sys.stderr)):
        raise exceptions.FastShmError(
            "top needs a terminal: its input, output or error output is not one. "
            "`fast-shm inspect --watch` writes to anything, with --json for programs"
        )
    if os.environ.get("TERM", "") in ("", "dumb"):
        raise exceptions.FastShmError(
            f"top needs a terminal that can move its cursor, and TERM is "
            f"{os.environ.get('TERM', '')!r}: set it (TERM=xterm-256color), or use "
            "`fast-shm inspect --watch`"
        )
    from fast_litellm_shm.cli.sampler import Sampler
    from fast_litellm_shm.cli.top.app import Top

    sampler = Sampler(args.name, allow_other_owner=args.allow_other_owner)
    sampler.open()
    app = Top(sampler, args.every)
    app.run()
    return app.return_code or 0
