"""Ways to write a request for one path."""

from __future__ import annotations

import random
from typing import NamedTuple


class Spelling(NamedTuple):
    target: str
    headers: tuple[str, ...] = ()
    method: str = "GET"


def _words(text: str) -> list[str]:
    return text.split()


#: {p}: a path such as /login, {bare}: the same without its first slash, {e}: with its last
#: character percent-encoded, {ee}: twice.
TARGETS = _words(r"""
{p} {p}? {p}?x=/ready {e} {ee} {p}#f {p};x {p};x=/ready {p}%23f {p}%3Fx {p}%3Bx /{p} //{p}
{p}/ {p}// /{p}/ %2F{bare} /%2F{bare} {p}%2F {p}/%2F //x{p} /.{p} {p}/. {p}/./ {p}/..
/..{p} /x/..{p} /%2E{p} /x/%2E%2E{p} /x/%2e%2e%2f{bare} /ready/..{p} /static/..{p}
/static//..{p} /static/..%2f{bare} /static/../..{p} {p}%0A {p}%0A%0A {p}/%0A {p}%0A/
{p}%0D {p}%0D%0A {p}%00 {p}%20 {p}%09 {p}%E2%80%A8 {p}%1C %20{p} %0A{p} %09{p} %00{p}
{p}%FF %FF{p} /%FF{bare} {p}%C3 {p}%EF%BF%BD {p}%ED%A0%80 /%C0%AF{bare} http://x{p}
http://x/{p} http://x{p}/ http://x{p};y http://x{p}%3Fy http://x{p}%23y http://x{p}%0A
HTTP://x{p} http:{p} http:{bare} x:{p} x:{bare} http:///{p} http://x:80{p} ws://x{p}
//{p}/x/.. http://ready{p} http://x/static/..{p} {bare} \{bare} /\{bare} /%5C{bare}
/./{p}//. /%2F%2F{bare} /api{p} /api/{p} //api{p} /x/api{p} /api/api{p} /api{bare}
/apix{p} /api/..{p} /t/b{p} /t/ready{p} /t/a/t/a{p} /t/static{p} /t/a//{bare} /t/a{p}/
/t/a{p}%0A http://x/t/c{p} http://x/api{p}
""")
#: A header of a trusted peer, such as a proxy that passes on what a client wrote.
HEADERS = [
    ("/x{p}", "SCRIPT_NAME: /x"),
    ("/static{p}", "SCRIPT_NAME: /static"),
    ("/ready{p}", "SCRIPT_NAME: /ready"),
    ("/static{bare}", "SCRIPT_NAME: /static"),
    ("/x/{p}", "SCRIPT_NAME: /x"),
    ("/x/{p}", "SCRIPT_NAME: /x/"),
    ("{p}", "Script-Name: /x"),
    ("/ready", "PATH_INFO: {p}"),
    ("/ready", "X-Original-URL: {p}"),
    ("/ready", "X-Rewrite-URL: {p}"),
    ("{p}", "X-Forwarded-Prefix: /static"),
    ("{p}", "X-HTTP-Method-Override: OPTIONS"),
]
METHODS = ("HEAD", "get", "Get")
#: For patterns: what a framework may take for an empty {id} or {rest}.
EMPTY = ("{first}", "{first}/", "{first}//", "/{first}//a", "{first}/%0A", "{first}/%FF")


def spellings(path: str, prefix: str = "") -> list[Spelling]:
    """prefix: stands before the path where an application is mounted."""
    encoded = f"%{ord(path[-1]):02x}"
    twice = path[:-1] + encoded.replace("%", "%25")
    words = {"p": path, "bare": path[1:], "e": path[:-1] + encoded, "ee": twice}
    targets = [each.format(**words) for each in TARGETS]
    found = [Spelling(prefix + each) for each in targets if each[0] in "/%"]
    if prefix:
        found += [Spelling(each.replace("http://x", f"http://x{prefix}")) for each in targets]
    else:
        found += [Spelling(each) for each in targets if each[0] not in "/%"]
        found += [Spelling(t.format(**words), (h.format(**words),)) for t, h in HEADERS]
    first = path[: path.index("/", 1)] if "/" in path[1:] else path
    found += [Spelling(prefix + each.format(first=first)) for each in EMPTY]
    return found + [Spelling(prefix + path, method=method) for method in METHODS]


_PIECES = _words(r"""
/ // /. /.. /./ /../ . .. %2F %2f %5C \ %25 %252F %2E %0A %0D %00 %20 %09 %FF %C3
%EF%BF%BD ; ;x %3B ? %3F # %23 : @ x /x http:// http://x http: //x /api /static /ready
/t/b %1C + , = & ~
""")


def at_random(path: str, prefix: str, random: random.Random) -> Spelling:
    """Something like the path. prefix: as of :func:`spellings`."""
    text = path
    for _ in range(random.randint(1, 4)):
        at = random.choice((0, len(text), random.randint(0, len(text))))
        match random.randrange(8):
            case 0 | 1 | 2:
                text = text[:at] + random.choice(_PIECES) + text[at:]
            case 3 | 4 if at < len(text):
                text = text[:at] + f"%{ord(text[at]):02{random.choice('xX')}}" + text[at + 1 :]
            case 5:
                text = f"{text[:at]}/{random.choice(('x', '..', '.', ''))}{text[at:]}"
            case 6:
                text = random.choice(_PIECES) + text
            case _:
                text += random.choice(_PIECES)
    if random.randrange(8) == 0:
        text = text.replace("/", "//")
    if random.randrange(3) or not text.startswith("http://x"):
        text = prefix + text
    else:
        text = text.replace("http://x", f"http://x{prefix}", 1)
    headers: tuple[str, ...] = ()
    if not prefix and random.randrange(5) == 0:
        mount = random.choice(("/x", "/static", "/", "/x/", "/ready", "//", "/api", "/%78"))
        headers, text = (f"SCRIPT_NAME: {mount}",), mount + text
    return Spelling(text, headers, random.choice(("GET", "GET", "GET", "HEAD")))
