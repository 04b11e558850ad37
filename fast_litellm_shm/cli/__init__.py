"""fast-shm: look at the shared-memory segments of this host, and tidy them."""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Callable
from typing import Any, NoReturn

EXIT_OK, EXIT_FAILED, EXIT_USAGE, EXIT_NOT_FOUND, EXIT_INTERRUPTED = 0, 1, 2, 3, 130

_EXIT_CODES = """\
exit codes:
  0    ok
  1    something went wrong, or nothing was done; the message on stderr says what
  2    wrong usage
  3    there is no segment of that name
  130  interrupted by Ctrl-C (--watch, top, dashboard: 0)"""

_MAIN = f"""\
examples:
  fast-shm ls                                 which segments there are
  fast-shm inspect                            the segment of this user's workers
  fast-shm inspect --name shop --watch        the same, again every 2 seconds
  fast-shm top                                the same as it lives, on the whole screen
  fast-shm dashboard                          ... in a browser
  fast-shm export                             its numbers, for Prometheus
  fast-shm reset --limiter chat user-1        let user-1 start afresh
  fast-shm release --dead                     give back what dead processes held
  fast-shm rm --name shop                     delete a segment

Without --name, a verb means the segment that workers use by default: FAST_LITELLM_SHM_NAME, else
one for each user id. `fast-shm VERB --help` tells more.

{_EXIT_CODES}"""

_INSPECT = f"""\
examples:
  fast-shm inspect --name shop
  fast-shm inspect --top 5 --sort denied      who is turned away most
  fast-shm inspect --match 'user-1*'          a glob over key names, case sensitive
  fast-shm inspect --json | jq '.keys[0]'     all keys, as JSON
  fast-shm inspect --watch 0.5                until Ctrl-C

Permits and pools are shown where something is held: what processes hold at this moment.
Control characters in keys are shown as \\n, \\x1b, \\u202e; --json has the keys as they are.
With --json and --watch, one document follows the other.

{_EXIT_CODES}"""

_EXPORT = f"""\
examples:
  fast-shm export | promtool check metrics
  fast-shm export --output /var/lib/node_exporter/textfile/fast_shm.prom     (from cron)
  fast-shm export --format json | jq .segment.denied
  fast-shm export --format csv --keys 100 > keys.csv

A file is replaced at once or not at all, and left as it was where there is no segment.
What the numbers mean: docs/metrics.md.

{_EXIT_CODES}"""

_TOP = f"""\
examples:
  fast-shm top                                the segment of this user's workers
  fast-shm top --name shop --every 0.5

Keys: q quits, ? tells the others. Needs textual: pip install "fast-litellm-shm[top]".
Waits for a segment where there is none yet, and for the next one where it was removed.

{_EXIT_CODES}"""

_DASHBOARD = f"""\
examples:
  fast-shm dashboard                          http://127.0.0.1:8099/, until Ctrl-C
  fast-shm dashboard --name shop --port 0     on any free port: it says which

Read-only. Who can reach it sees the names of keys: everybody with an account on this host, and with
--host 0.0.0.0 everybody on the network. Needs starlette and uvicorn:
pip install "fast-litellm-shm[dashboard]".

{_EXIT_CODES}"""

_LS = f"""\
examples:
  fast-shm ls
  fast-shm ls --json | jq -r '.[].name'

{_EXIT_CODES}"""

_RESET = f"""\
examples:
  fast-shm reset user-1                       what user-1 consumed, in every limiter
  fast-shm reset --limiter chat user-1        ... in the limiter "chat" alone
  fast-shm reset --limiter chat               all keys of "chat"
  fast-shm reset --all                        all keys of all limiters
  fast-shm reset --limiter chat -- -odd       a key that begins with a dash
  fast-shm reset $'two\\nlines'                a key as inspect shows it (bash)

Limits stay as they are; only what was consumed is forgotten. Permits stay: see `fast-shm release`.
Of limits over many hosts the server is told: FAST_LITELLM_SHM_CLUSTER must say which it is.

{_EXIT_CODES}"""

_RELEASE = f"""\
examples:
  fast-shm release --dead                     what dead processes held
  fast-shm release --pid 4711                 what 4711 held, if it is dead
  fast-shm release --pid 4711 --force         ... alive or not

Permits of dead processes come back by themselves, when somebody needs them; this does it now. A
living process is refused unless forced: it works on, so more may run at once than the limits say.

{_EXIT_CODES}"""

_RM = f"""\
examples:
  fast-shm rm --name shop
  fast-shm rm --name shop --yes               also while processes are attached

Processes that are attached keep counting in what they have, apart from new ones, until they are
restarted. On a terminal you are asked; elsewhere --yes is needed.

{_EXIT_CODES}"""


class _Parser(argparse.ArgumentParser):
    def __init__(self, **options: Any) -> None:
        super().__init__(
            **options, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
        )

    def error(self, message: str) -> NoReturn:
        if message.startswith("unrecognized arguments"):
            message += " (a segment is named by --name)"
        self.print_usage(sys.stderr)
        self.exit(EXIT_USAGE, f"fast-shm: {message}; see `{self.prog} --help`\n")


def _top(text: str) -> int:
    try:
        top = int(text)
    except ValueError:
        top = -1
    if top < 0:
        raise argparse.ArgumentTypeError(f"must be a whole number, 0 for all keys, not {text!r}")
    return top


def _keys(text: str) -> int:
    try:
        keys = int(text)
    except ValueError:
        keys = -1
    if not 0 <= keys <= 1000:
        raise argparse.ArgumentTypeError(f"must be a whole number, 0 to 1000, not {text!r}")
    return keys


def _pid(text: str) -> int:
    try:
        pid = int(text)
    except ValueError:
        pid = 0
    if not 1 <= pid < 2**31:
        raise argparse.ArgumentTypeError(f"must be the number of a process, not {text!r}")
    return pid


def _pause(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1
    if not math.isfinite(seconds) or not 0.1 <= seconds <= 86400:
        raise argparse.ArgumentTypeError(f"must be seconds, 0.1 to 86400, not {text!r}")
    return seconds


def _port(text: str) -> int:
    try:
        port = int(text)
    except ValueError:
        port = -1
    if not 0 <= port <= 65535:
        raise argparse.ArgumentTypeError(f"must be a port, 0 to 65535, not {text!r}")
    return port


def _version() -> str:
    from fast_litellm_shm import __version__
    from fast_litellm_shm._shared.native import lib

    return f"fast-shm {__version__} (segment layout {lib.FSHM_LAYOUT_VERSION})"


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        print(_version())
        parser.exit()


def _serving(to: argparse.ArgumentParser) -> None:
    to.add_argument(
        "--host",
        default="127.0.0.1",
        metavar="H",
        help="the address to listen on (default 127.0.0.1: this host alone)",
    )
    to.add_argument(
        "--port", type=_port, default=8099, metavar="P", help="0: any free one (default 8099)"
    )
    to.add_argument(
        "--allow-host",
        action="append",
        default=[],
        metavar="NAME",
        help="a name that browsers may use for this host, besides localhost and addresses",
    )


def _exporting(to: argparse.ArgumentParser) -> None:
    to.add_argument(
        "--format",
        choices=("prometheus", "json", "csv"),
        default="prometheus",
        help="(default prometheus: its text format)",
    )
    to.add_argument(
        "--output", metavar="FILE", help="write a file instead of standard output, atomically"
    )
    to.add_argument(
        "--keys",
        type=_keys,
        default=0,
        metavar="N",
        help="also each of the N busiest keys, at most 1000 (default 0)",
    )


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="fast-shm",
        description="Look at the shared-memory segments of this host, and tidy them.",
        epilog=_MAIN,
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="show the version and exit")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)

    def verb(name: str, about: str, epilog: str) -> argparse.ArgumentParser:
        text = about[0].upper() + about[1:] + "."
        return verbs.add_parser(name, help=about, description=text, epilog=epilog)

    def with_owner(to: argparse.ArgumentParser) -> None:
        to.add_argument(
            "--allow-other-owner", action="store_true", help="also a segment of another user"
        )

    def with_name(to: argparse.ArgumentParser) -> None:
        to.add_argument("--name", metavar="N", help="the segment; default: the workers' default")
        with_owner(to)

    def every(to: argparse.ArgumentParser) -> None:
        to.add_argument(
            "--every",
            type=_pause,
            default=1.0,
            metavar="SECONDS",
            help="look every SECONDS (default 1)",
        )

    to = verb("inspect", "show a segment, its processes, limiters and busiest keys", _INSPECT)
    with_name(to)
    to.add_argument("--json", action="store_true", help="JSON; all keys unless --top is given")
    to.add_argument("--top", type=_top, metavar="N", help="at most N keys, 0 for all (default 20)")
    to.add_argument(
        "--sort",
        choices=("busiest", "admitted", "denied", "key"),
        default="busiest",
        help="which keys come first (default busiest: most calls)",
    )
    to.add_argument("--match", metavar="GLOB", help="only keys that fit, such as 'user-*'")
    to.add_argument("--limiter", metavar="L", help="only keys and permits of this limiter")
    to.add_argument(
        "--watch",
        type=_pause,
        nargs="?",
        const=2.0,
        metavar="SECONDS",
        help="again every SECONDS (default 2), until Ctrl-C",
    )

    to = verb("top", "show a segment as it lives, on the whole screen", _TOP)
    with_name(to)
    every(to)

    to = verb("dashboard", "the same as a small web page on this host", _DASHBOARD)
    with_name(to)
    every(to)
    _serving(to)

    to = verb("ls", "list the segments of this host", _LS)
    to.add_argument("--json", action="store_true", help="JSON")
    with_owner(to)

    to = verb("export", "write a segment's numbers for monitoring, once", _EXPORT)
    with_name(to)
    _exporting(to)

    to = verb("reset", "forget what keys have consumed", _RESET)
    with_name(to)
    to.add_argument("--limiter", metavar="L", help="only in this limiter")
    to.add_argument("--all", action="store_true", help="all keys of all limiters")
    to.add_argument("key", nargs="?", metavar="KEY", help="only this key")

    to = verb("release", "give back permits of a process", _RELEASE)
    with_name(to)
    whose = to.add_mutually_exclusive_group(required=True)
    whose.add_argument("--pid", type=_pid, metavar="PID", help="of this process")
    whose.add_argument("--dead", action="store_true", help="of all dead processes")
    to.add_argument("--force", action="store_true", help="also of a living process")

    to = verb("rm", "delete a segment", _RM)
    with_name(to)
    to.add_argument("--yes", "-y", action="store_true", help="do not ask")
    return parser


def _check(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """What argparse cannot say: what belongs together, and the segment's name."""
    from fast_litellm_shm._shared import segment, settings

    if args.verb == "reset":
        if args.all and (args.key is not None or args.limiter is not None):
            parser.error("--all means every limiter and key: leave out KEY and --limiter")
        if not args.all and args.key is None and args.limiter is None:
            parser.error("say what to reset: a KEY, --limiter L, or --all")
    if args.verb == "release" and args.force and args.dead:
        parser.error("--force is for a living process: it goes with --pid")
    try:
        settings.allow_other_owner()
        if args.verb != "ls":
            if args.name is None:
                args.name = settings.segment_name()
            segment.path_of(args.name)
    except ValueError as error:
        parser.error(str(error))


def _verb(name: str) -> Callable[[argparse.Namespace], int]:
    from fast_litellm_shm.cli import admin, dashboard, export, inspect, listing, top

    return {
        "dashboard": dashboard.run,
        "export": export.run,
        "inspect": inspect.run,
        "ls": listing.run,
        "release": admin.release,
        "reset": admin.reset,
        "rm": admin.remove,
        "top": top.run,
    }[name]


def _run(args: argparse.Namespace) -> int:
    from fast_litellm_shm import exceptions
    from fast_litellm_shm.cli import listing

    try:
        status = _verb(args.verb)(args)
        sys.stdout.flush()
        return status
    except exceptions.SegmentNotFoundError as error:
        print(f"fast-shm: {error}. {listing.names_there_are()}", file=sys.stderr)
        return EXIT_NOT_FOUND
    except exceptions.SegmentOwnerError as error:
        print(f"fast-shm: {error} (here: --allow-other-owner)", file=sys.stderr)
    except exceptions.FastShmError as error:
        print(f"fast-shm: {error}", file=sys.stderr)
    return EXIT_FAILED


def _silence_stdout() -> None:
    """The reader has gone: let the interpreter's last flush go nowhere instead of complaining."""
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ValueError):
        return  # not a real file


def main(argv: list[str] | None = None) -> int:
    """The command ``fast-shm``; returns its exit code."""
    try:
        parser = _parser()
        try:
            args = parser.parse_args(argv)
            _check(args, parser)
        except SystemExit as end:
            sys.stdout.flush()
            return end.code if isinstance(end.code, int) else EXIT_USAGE
        return _run(args)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        _silence_stdout()
        return EXIT_OK
    except OSError as error:
        _silence_stdout()  # else a full disk behind stdout is reported once more at exit
        print(f"fast-shm: {error.strerror or error}", file=sys.stderr)
        return EXIT_FAILED
