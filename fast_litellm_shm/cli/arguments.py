"""The command line of ``fast-shm``: its verbs, their options, and their help."""

from __future__ import annotations

import argparse
import sys
import textwrap
from collections.abc import Callable
from typing import Any, NoReturn

EXIT_OK, EXIT_FAILED, EXIT_USAGE, EXIT_NOT_FOUND, EXIT_INTERRUPTED = 0, 1, 2, 3, 130

_EXIT_CODES = """\
exit codes:
  0    ok
  1    failed, or nothing was done: the message on stderr says why
  2    wrong usage
  3    no segment has that name
  130  interrupted by Ctrl-C (0 for --watch, top and dashboard)"""

_MAIN = """\
examples:
  fast-shm ls                            list the segments
  fast-shm inspect                       show the segment of this user's workers
  fast-shm inspect --name shop --watch   show "shop", again every 2 seconds
  fast-shm top                           show it live, on the whole terminal
  fast-shm dashboard                     show it live, in a browser
  fast-shm export                        print its metrics for Prometheus
  fast-shm reset --limiter chat user-1   forget what user-1 has consumed
  fast-shm set chat user-1 500/minute    give user-1 limits of its own
  fast-shm release --dead                give back the permits of dead processes
  fast-shm state show                    show the file of its durable limits
  fast-shm save                          give back what those have not used
  fast-shm rm --name shop                delete a segment
  fast-shm tokens --model gpt-4o *.md    count the tokens of files
  fast-shm cache build                   compile what tokens are counted with
  fast-shm completion bash               complete this command with the Tab key

Without --name, a verb uses the segment that workers use by default: FAST_LITELLM_SHM_NAME, else
one for the group FAST_LITELLM_SHM_GROUP, else one for each user id. `fast-shm VERB --help`
explains a verb."""

_INSPECT = """\
examples:
  fast-shm inspect --name shop
  fast-shm inspect --top 5 --sort denied   the keys that are denied most
  fast-shm inspect --match 'user-1*'       keys by a glob, case-sensitive
  fast-shm inspect --json | jq '.keys[0]'  all keys, as JSON
  fast-shm inspect --watch 0.5             repeat until Ctrl-C

Permits and pools are shown only while a process holds one.

Control characters in keys are shown as \\n, \\x1b, \\u202e. --json has the keys as they are.
With --json and --watch, one document follows the other."""

_EXPORT = """\
examples:
  fast-shm export | promtool check metrics
  fast-shm export --output /var/lib/node_exporter/textfile/fast_shm.prom
  fast-shm export --format json | jq .segment.denied
  fast-shm export --format csv --keys 100 > keys.csv

--output replaces the file in one step. If there is no segment, it leaves the file as it is.
docs/metrics.md explains the metrics."""

_TOP = """\
examples:
  fast-shm top                           the segment of this user's workers
  fast-shm top --name shop --every 0.5

Keys: q quits, ? shows the others. If there is no segment, top waits for one. If the segment is
removed, it waits for the next one. Needs textual: pip install "fast-litellm-shm[top]"."""

_DASHBOARD = """\
examples:
  fast-shm dashboard                       http://127.0.0.1:8099/ until Ctrl-C
  fast-shm dashboard --name shop --port 0  any free port; the first line says it

The page is read-only and has no password. Everyone who can reach it sees the names of keys:
every user of this host; with --host 0.0.0.0, everyone on the network. Needs starlette and
uvicorn: pip install "fast-litellm-shm[dashboard]"."""

_LS = """\
examples:
  fast-shm ls
  fast-shm ls --json | jq -r '.[].name'

A segment that was deleted is listed as "removed" while processes still use it."""

_RESET = """\
examples:
  fast-shm reset user-1                  what user-1 consumed, in every limiter
  fast-shm reset --limiter chat user-1   ... in the limiter "chat" alone
  fast-shm reset --limiter chat          all keys of "chat"
  fast-shm reset --all                   all keys of all limiters
  fast-shm reset --limiter chat -- -odd  a key that begins with a dash
  fast-shm reset $'two\\nlines'           a key as inspect shows it (bash)

Limits stay as they are: only what was consumed is forgotten. Permits stay, too: see `fast-shm
release`. What calls have reserved of a budget stays for a KEY; without a KEY it is forgotten. For
limits over many hosts the server forgets it, too: set FAST_LITELLM_SHM_CLUSTER as it is set for
the workers."""

_SET = """\
examples:
  fast-shm set chat user-1 500/minute
  fast-shm set chat user-1 20/s '10000 per day in Europe/Berlin'
  fast-shm set chat user-1 --plan        what its plan says, again

For limiters whose keys have plans (docs/plans.md). The key has these limits (1 to 3) instead of
its plan's, in every process, from its next call on. What it has consumed stays consumed. They stay
until you remove them, or the host reboots. `fast-shm inspect` lists them."""

_RELEASE = """\
examples:
  fast-shm release --dead                permits of all dead processes
  fast-shm release --pid 4711            permits of process 4711, if it is dead
  fast-shm release --pid 4711 --force    ... dead or alive

Permits of dead processes come back without this command, when a caller needs one. A living
process keeps its permits unless you give --force. It goes on working, so more calls may run at
the same time than the limit allows."""

_RM = """\
examples:
  fast-shm rm --name shop
  fast-shm rm --name shop --yes          even while processes use it
  fast-shm rm --unused                   lists what no process uses, and asks

Processes that use the segment keep it, and count apart from new processes until you restart
them. On a terminal, rm asks first; elsewhere, it needs --yes.

--unused keeps a segment that a process uses, one of another user (unless --allow-other-owner is
given), one that was made less than a minute ago, and one of which it cannot tell who uses it. It
says why. What was consumed is forgotten with a segment: none, where "nothing in it counts"."""

_TOKENS = """\
examples:
  fast-shm tokens --model gpt-4o docs/*.md
  git diff | fast-shm tokens -
  fast-shm tokens --max 8000 prompt.txt   exit code 1 if it has more
  fast-shm tokens --json *.txt | jq '.files[] | select(.tokens > 8000)'

Counts as tiktoken does, exactly. Without --model and --encoding: cl100k_base, as the library
counts. The text of a special token, such as <|endoftext|>, counts as ordinary text. A file that is
not UTF-8 is not counted, unless you give --replace. Files may be larger than memory."""

_CACHE = """\
examples:
  fast-shm cache                      list the files
  fast-shm cache build                make those of cl100k_base and o200k_base
  fast-shm cache rm --old             remove what no worker will use any more

Workers count tokens with tables that are compiled once for a host, into one file for each encoding.
All processes share it. They lie in the folder FAST_LITELLM_SHM_CACHE, else in fast_litellm_shm in
the user's cache. docs/tokens.md tells more."""

_CACHE_BUILD = """\
examples:
  fast-shm cache build
  fast-shm cache build o200k_base o200k_harmony
  env FAST_LITELLM_SHM_CACHE=/opt/tokens fast-shm cache build

Files that are there and whole stay as they are. A damaged one is replaced. Takes 1 to 3 s for each
encoding. Needs tiktoken, and tiktoken's own file of the encoding. The last example is for a
container image: docs/tokens.md."""

_CACHE_RM = """\
examples:
  fast-shm cache rm                   all files
  fast-shm cache rm o200k_base        those of one encoding, of every version
  fast-shm cache rm --old             only what is left over, or cannot be used

Processes that count with a file keep it until they end. New ones make another: 1 to 3 s for the
first of them. If a file is in use, rm asks on a terminal; elsewhere, it needs --yes."""


_COMPLETION = """\
examples:
  fast-shm completion bash > ~/.local/share/bash-completion/completions/fast-shm
  fast-shm completion fish > ~/.config/fish/completions/fast-shm.fish
  fast-shm completion zsh > ~/.zfunc/_fast-shm

Verbs, options and their values, and the names of segments. A new shell has it. For zsh, ~/.zshrc
must say `fpath+=~/.zfunc; autoload -Uz compinit; compinit`. The folders must exist. Make the script
anew after an upgrade. Needs shtab: pip install "fast-litellm-shm[completion]"."""


_WITHOUT_SEGMENT = ("tokens", "cache", "completion")

# Behind "unrecognized arguments".
_HINTS = {
    "fast-shm tokens": "options come before all files or after them",
    "fast-shm cache": "options come right behind build or rm, then encodings",
    "fast-shm completion": "give the shell alone: bash, zsh or fish",
    "fast-shm reset": "give one KEY; name its limiter by --limiter, the segment by --name",
}


_SAVE = """\
examples:
  fast-shm save --name shop

A segment leases tokens of durable limits ahead. What it has not used comes back when its last
process ends cleanly. Where processes are killed instead (a shutdown that waits for nobody), run
this before the host goes down. Workers that still run lease anew when they need tokens."""

_STATE = """\
examples:
  fast-shm state show                    what the file has of each key
  fast-shm state check                   is it sound? reads all of it
  fast-shm state compact                 remove what counts no more
  fast-shm state export backup.json      a copy; workers may run
  fast-shm state import backup.json      put its keys back
  fast-shm state claim                   let this host use a file of another one

The file lies in FAST_LITELLM_SHM_STATE, as it is set for the workers. docs/durable.md explains
durable limits."""


class _Formatter(argparse.HelpFormatter):
    """Wraps paragraphs at the width of the terminal, and leaves examples as they are."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return "\n\n".join(
            part if "\n  " in part else textwrap.fill(part, width, break_on_hyphens=False)
            for part in text.split("\n\n")
        )


class _Parser(argparse.ArgumentParser):
    def __init__(self, **options: Any) -> None:
        super().__init__(**options, formatter_class=_Formatter, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        if message.startswith("unrecognized arguments"):
            message += f" ({_HINTS.get(self.prog, 'a segment is named by --name')})"
        self.print_usage(sys.stderr)
        end = "\n" if "\n" in message else "; "  # a message that points at a place has lines
        self.exit(EXIT_USAGE, f"fast-shm: {message}{end}see `{self.prog} --help`\n")


def _number(kind: type[int | float], least: float, most: float, what: str) -> Callable[[str], Any]:
    """A converter for ``type=`` of an option."""

    def convert(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = least - 1
        if not least <= value <= most:  # so is NaN
            raise argparse.ArgumentTypeError(f"must be {what}, not {text!r}")
        return value

    return convert


_KEYS_SHOWN = _number(int, 0, 2**31, "a whole number, 0 for all keys")
_KEYS_EXPORTED = _number(int, 0, 1000, "a whole number, 0 to 1000")
_PID = _number(int, 1, 2**31 - 1, "the number of a process")
_SECONDS = _number(float, 0.1, 86400, "seconds, 0.1 to 86400")
_PORT = _number(int, 0, 65535, "a port, 0 to 65535")
_MOST_TOKENS = _number(int, 0, 2**63 - 1, "a whole number of tokens")


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from fast_litellm_shm import __version__
        from fast_litellm_shm._shared.native import lib

        print(f"fast-shm {__version__} (segment layout {lib.FSHM_LAYOUT_VERSION})")
        parser.exit()


def parsers() -> tuple[_Parser, dict[str, _Parser]]:
    """The whole command line, and the part of each verb."""
    parser = _Parser(
        prog="fast-shm",
        description="Inspect and clean up the shared-memory segments of this host; count tokens.",
        epilog=f"{_MAIN}\n\n{_EXIT_CODES}",
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="show the version and exit")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)

    def verb(name: str, about: str, epilog: str) -> _Parser:
        made = verbs.add_parser(
            name,
            help=about,
            description=f"{about[0].upper()}{about[1:]}.",
            epilog=f"{epilog}\n\n{_EXIT_CODES}",
        )
        if name in _WITHOUT_SEGMENT:
            return made
        if name != "ls":
            made.add_argument("--name", metavar="N", help="the segment; default: the workers' one")
        made.add_argument(
            "--allow-other-owner", action="store_true", help="accept a segment of another user"
        )
        return made

    _inspect(verb("inspect", "show a segment: its processes, limiters and busiest keys", _INSPECT))
    _live(verb("top", "show a segment live, on the whole terminal", _TOP))
    _dashboard(verb("dashboard", "show a segment live, as a web page of this host", _DASHBOARD))
    to = verb("ls", "list the segments of this host", _LS)
    to.add_argument("--json", action="store_true", help="JSON")
    _export(verb("export", "write a segment's metrics for monitoring, once", _EXPORT))
    to = verb("reset", "forget what keys have consumed", _RESET)
    to.add_argument("--limiter", metavar="L", help="only in this limiter")
    to.add_argument("--all", action="store_true", help="all keys of all limiters")
    to.add_argument("key", nargs="?", metavar="KEY", help="only this key")
    to = verb("set", "give a key limits of its own", _SET)
    to.add_argument("limiter", metavar="LIMITER", help="the limiter's name")
    to.add_argument("key", metavar="KEY", help="the key")
    to.add_argument("limit", nargs="*", metavar="LIMIT", help="such as 100/minute")
    to.add_argument("--plan", action="store_true", help="remove them: its plan counts again")
    to = verb("release", "give back the permits of a process", _RELEASE)
    whose = to.add_mutually_exclusive_group(required=True)
    whose.add_argument("--pid", type=_PID, metavar="PID", help="of this process")
    whose.add_argument("--dead", action="store_true", help="of all dead processes")
    to.add_argument("--force", action="store_true", help="also of a living process")
    verb("save", "give back what durable limits have leased and not used", _SAVE)
    _state(verb("state", "show, check or copy the file of durable limits", _STATE))
    to = verb("rm", "delete a segment", _RM)
    to.add_argument("--yes", "-y", action="store_true", help="do not ask")
    to.add_argument(
        "--unused", action="store_true", help="all segments that no process uses, of every release"
    )
    to = verb("completion", "print what a shell needs to complete this command", _COMPLETION)
    to.add_argument("shell", choices=("bash", "zsh", "fish"), help="which shell")
    _tokens(verb("tokens", "count the tokens of files", _TOKENS))
    _cache(
        verb("cache", "list the files that tokens are counted with; make or remove them", _CACHE)
    )
    return parser, verbs.choices


def _inspect(to: argparse.ArgumentParser) -> None:
    to.add_argument("--json", action="store_true", help="JSON; all keys unless --top is given")
    to.add_argument(
        "--top", type=_KEYS_SHOWN, metavar="N", help="at most N keys, 0 for all (default 20)"
    )
    to.add_argument(
        "--sort",
        choices=("busiest", "admitted", "denied", "key"),
        default="busiest",
        help="which keys come first (default busiest: most calls)",
    )
    to.add_argument("--match", metavar="GLOB", help="only keys that match, such as 'user-*'")
    to.add_argument("--limiter", metavar="L", help="only keys and permits of this limiter")
    to.add_argument(
        "--watch",
        type=_SECONDS,
        nargs="?",
        const=2.0,
        metavar="SECONDS",
        help="repeat every SECONDS (default 2) until Ctrl-C",
    )


def _state(to: argparse.ArgumentParser) -> None:
    actions = ("show", "check", "compact", "export", "import", "claim")
    to.add_argument("action", choices=actions, help="what to do")
    to.add_argument("file", nargs="?", metavar="FILE", help="of an export; -: stdout or stdin")
    to.add_argument("--json", action="store_true", help="show: JSON, all keys")
    to.add_argument(
        "--top", type=_KEYS_SHOWN, default=20, metavar="N", help="show: at most N keys, 0 for all"
    )


def _live(to: argparse.ArgumentParser) -> None:
    to.add_argument(
        "--every",
        type=_SECONDS,
        default=1.0,
        metavar="SECONDS",
        help="time from one sample to the next (default 1)",
    )


def _dashboard(to: argparse.ArgumentParser) -> None:
    _live(to)
    to.add_argument(
        "--host",
        default="127.0.0.1",
        metavar="H",
        help="the address to listen on (default 127.0.0.1: this host alone)",
    )
    to.add_argument(
        "--port", type=_PORT, default=8099, metavar="P", help="0: any free port (default 8099)"
    )
    to.add_argument(
        "--allow-host",
        action="append",
        default=[],
        metavar="NAME",
        help="a name under which browsers reach this host; localhost and addresses always work",
    )


def _export(to: argparse.ArgumentParser) -> None:
    to.add_argument(
        "--format",
        choices=("prometheus", "json", "csv"),
        default="prometheus",
        help="default: prometheus (its text format)",
    )
    to.add_argument("--output", metavar="FILE", help="replace this file instead of printing")
    to.add_argument(
        "--keys",
        type=_KEYS_EXPORTED,
        default=0,
        metavar="N",
        help="also each of the N busiest keys, at most 1000 (default 0)",
    )


def _tokens(to: argparse.ArgumentParser) -> None:
    which = to.add_mutually_exclusive_group()
    which.add_argument("--model", metavar="M", help="count as this model does, such as gpt-4o")
    which.add_argument("--encoding", metavar="E", help="count in this encoding of tiktoken")
    to.add_argument(
        "--max", type=_MOST_TOKENS, metavar="N", help="say which files have more than N tokens"
    )
    to.add_argument(
        "--replace", action="store_true", help="count bytes that are not UTF-8 as U+FFFD"
    )
    to.add_argument("--json", action="store_true", help="JSON")
    to.add_argument("file", nargs="*", metavar="FILE", help="- or nothing: standard input")


def _cache(to: argparse.ArgumentParser) -> None:
    to.add_argument("--json", action="store_true", help="JSON")
    actions = to.add_subparsers(dest="action", metavar="ACTION")

    def action(name: str, about: str, epilog: str) -> argparse.ArgumentParser:
        return actions.add_parser(
            name,
            help=about,
            description=f"{about[0].upper()}{about[1:]}.",
            epilog=f"{epilog}\n\n{_EXIT_CODES}",
        )

    made = action("build", "make the files that are missing or damaged", _CACHE_BUILD)
    made.add_argument(
        "encoding", nargs="*", metavar="ENCODING", help="default: cl100k_base and o200k_base"
    )
    made = action("rm", "remove files", _CACHE_RM)
    made.add_argument("--yes", "-y", action="store_true", help="do not ask")
    made.add_argument(
        "--old", action="store_true", help="only of other versions, unfinished, or unusable ones"
    )
    made.add_argument("encoding", nargs="*", metavar="ENCODING", help="only files of these")


def _check_state(args: argparse.Namespace, wrong: Callable[[str], NoReturn]) -> None:
    if args.action == "import" and args.file is None:
        wrong("say which FILE to import; - for stdin")
    if args.file is not None and args.action not in ("export", "import"):
        wrong(f"{args.action} takes no FILE")


def _check_reset(args: argparse.Namespace, wrong: Callable[[str], NoReturn]) -> None:
    if args.all and (args.key is not None or args.limiter is not None):
        wrong("--all means every limiter and key: leave out KEY and --limiter")
    if not args.all and args.key is None and args.limiter is None:
        wrong("say what to reset: a KEY, --limiter L, or --all")


def _check_set(args: argparse.Namespace, wrong: Callable[[str], NoReturn]) -> None:
    from fast_litellm_shm import limits

    if args.plan and args.limit:
        wrong("--plan removes the limits of the key: give no LIMIT")
    if not args.plan and not args.limit:
        wrong("say which LIMIT the key gets, such as 100/minute; or --plan")
    try:
        if len(limits.checked(args.limit) if args.limit else ()) > 3:
            wrong("a key gets at most 3 limits")
    except ValueError as error:
        wrong(str(error))


def _check(args: argparse.Namespace, wrong: Callable[[str], NoReturn]) -> None:
    """What argparse cannot say: options that do not go together."""
    if args.verb == "tokens" and not args.file and sys.stdin is not None and sys.stdin.isatty():
        wrong("name files, or - to type a text that Ctrl-D ends")
    if args.verb == "reset":
        _check_reset(args, wrong)
    if args.verb == "set":
        _check_set(args, wrong)
    if args.verb == "rm" and args.unused and args.name is not None:
        wrong("--unused is about all segments: leave out --name")
    if args.verb == "cache" and args.json and args.action:
        wrong(f"--json is for the list of files: leave out {args.action}")
    if args.verb == "release" and args.force and args.dead:
        wrong("--force is for a living process: it goes with --pid")
    if args.verb == "state":
        _check_state(args, wrong)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The arguments, checked; ``name`` is that of the segment. Raises SystemExit if they are wrong
    or ask for help."""
    parser, verbs = parsers()
    args, unknown = parser.parse_known_args(argv)
    wrong = verbs[args.verb].error
    if unknown:
        wrong(f"unrecognized arguments: {' '.join(unknown)}")
    _check(args, wrong)
    from fast_litellm_shm._shared import segment, settings

    try:
        if args.verb in _WITHOUT_SEGMENT:
            settings.tokenizer_download()
            return args
        settings.allow_other_owner()
        settings.segment_group()
        if args.verb in ("state", "save", "reset"):
            from fast_litellm_shm.durable.settings import default

            default()
        if args.verb != "ls":
            if args.name is None:
                args.name = settings.segment_name()
            segment.path_of(args.name)
    except ValueError as error:
        wrong(str(error))
    return args
