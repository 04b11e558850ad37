"""``fast-shm completion``: what a shell needs to complete the command line, from its parser."""

from __future__ import annotations

import argparse
from typing import Any

from fast_litellm_shm import exceptions
from fast_litellm_shm.cli import arguments, segments

SHELLS = ("bash", "zsh", "fish")

# Prints the names of the segments of this host. Plain tools: a Python for each key would be slow.
_NAMES = (
    "ls -1 {folder} 2>/dev/null | sed -n 's/^fast_litellm_shm[.][0-9]*[.]//p' | "
    "grep -vE '[.][0-9a-f]{{16}}[.](lock|tmp)$' | sort -u"
)
_FUNCTIONS = {
    "bash": '_fast_shm_segments() {{ compgen -W "$({names})" -- "$1"; }}',
    "zsh": '_fast_shm_segments() {{ compadd -- ${{(f)"$({names})"}}; }}',
    "fish": "function _fast_shm_segments\n  {names}\nend",
}


def _segment_names() -> dict[str, Any]:
    """How an option is completed with the name of a segment, for shtab."""
    names = _NAMES.format(folder=segments.directory())
    return {
        "bash": "_fast_shm_segments",
        "zsh": "_fast_shm_segments",
        "fish": "(_fast_shm_segments)",
        "preamble": {shell: text.format(names=names) for shell, text in _FUNCTIONS.items()},
    }


def run(args: argparse.Namespace) -> int:
    """Print the script."""
    try:
        import shtab
    except ModuleNotFoundError as error:
        raise exceptions.MissingPackageError(
            "completion needs shtab, which is not installed: "
            'pip install "fast-litellm-shm[completion]". Once the script is made, it works without',
            name="shtab",
        ) from error
    parser, verbs = arguments.parsers()
    parts = dict.fromkeys([parser, *verbs.values()])
    names, files = _segment_names(), shtab.FILE
    for part in parts:
        for action in part._actions:
            if action.dest == "name":
                action.complete = names  # type: ignore[attr-defined]
            elif action.dest in ("file", "output"):
                action.complete = files  # type: ignore[attr-defined]
    print(shtab.complete(parser, shell=args.shell))
    return 0
