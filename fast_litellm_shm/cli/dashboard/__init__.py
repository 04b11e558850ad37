"""``fast-shm dashboard``: a segment as it lives, as a web page on this host."""

from __future__ import annotations

import argparse
import importlib.util
import ipaddress
import socket
import sys
import threading

from fast_litellm_shm import exceptions

_BACKLOG = 128


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _listening(host: str, port: int) -> socket.socket:
    """A socket of one's own, so that what is wrong with the address is told in a sentence."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        found = socket.socket(family, kind, protocol)
    except OSError as error:
        raise exceptions.FastShmError(
            f"cannot listen on {host!r}: {error.strerror or error}; --host takes an address of "
            "this host, such as 127.0.0.1"
        ) from None
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
        found.listen(_BACKLOG)
    except OSError as error:
        found.close()
        raise exceptions.FastShmError(
            f"cannot listen on {host} port {port}: {error.strerror}; choose another with --port "
            "(0: any free one), or another address with --host"
        ) from None
    return found


def run(args: argparse.Namespace) -> int:
    """Serve it, until Ctrl-C."""
    missing = [name for name in ("starlette", "uvicorn") if importlib.util.find_spec(name) is None]
    if missing:
        raise exceptions.FastShmError(
            f"dashboard needs {' and '.join(missing)}: pip install "
            '"fast-litellm-shm[dashboard]". `fast-shm top` and `fast-shm inspect --watch` work '
            "without"
        )
    import uvicorn

    from fast_litellm_shm.cli.dashboard.app import Looker, make_app
    from fast_litellm_shm.cli.sampler import Sampler

    sampler = Sampler(args.name, allow_other_owner=args.allow_other_owner)
    sampler.open()
    listener = _listening(args.host, args.port)
    host, port = listener.getsockname()[:2]
    stop = threading.Event()
    looker = Looker(sampler, args.every, stop)
    config = uvicorn.Config(
        make_app(looker, args.allow_host),
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        lifespan="off",
        timeout_graceful_shutdown=1,
    )
    if not _is_loopback(host):
        print(
            f"fast-shm: WARNING: whoever can reach {host} port {port} can read this page, the "
            "names of keys and the commands of workers among it; there is no password. For this "
            "host alone leave --host out, and reach it by `ssh -L`",
            file=sys.stderr,
        )
    shown = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    # Both in threads, so that Ctrl-C comes here at any moment and meets no import or start of
    # theirs: CPython does not stand that.
    server = uvicorn.Server(config)
    looking = threading.Thread(target=looker.look_on, name="looking", daemon=True)
    ended = threading.Event()

    def serve() -> None:
        try:
            server.run(sockets=[listener])
        finally:
            ended.set()

    serving = threading.Thread(target=serve, name="serving", daemon=True)
    try:
        looking.start()
        serving.start()
        print(f"Segment {args.name!r} on http://{shown}:{port}/ (Ctrl-C ends)", flush=True)
        # Not join(): interrupted, CPython before 3.13 takes the thread for ended, and the next
        # join() returns while it runs, into the end of the interpreter.
        ended.wait()
    except KeyboardInterrupt:
        server.should_exit = True
        stop.set()
        for thread in (serving, looking):
            if thread.ident is not None:  # it was started
                thread.join()
        return 0
    finally:
        listener.close()
    raise exceptions.FastShmError("the server has ended by itself: what it wrote above says why")
