"""``fast-shm dashboard``: a segment live, as a web page of this host."""

from __future__ import annotations

import argparse
import importlib.util
import ipaddress
import logging
import socket
import sys
import threading

from fast_litellm_shm import exceptions
from fast_litellm_shm._shared.native import why_no_descriptor

_BACKLOG = 16  # connections that wait; as many does asyncio accept, or fail to accept, in a row


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _listening(host: str, port: int) -> socket.socket:
    """A listening socket. It is made here, not by uvicorn, for better error messages."""
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


class _OnceForNoDescriptor(logging.Filter):
    """Replaces asyncio's report of each connection that it cannot accept by one sentence."""

    def __init__(self) -> None:
        super().__init__()
        self._reported = False

    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        why = why_no_descriptor(error.errno or 0) if isinstance(error, OSError) else None
        if why and not self._reported:
            self._reported = True
            print(
                f"fast-shm: WARNING: cannot accept another connection: {why}, such as pages of "
                "this dashboard. Those that are connected are still answered",
                file=sys.stderr,
                flush=True,
            )
        return why is None


def run(args: argparse.Namespace) -> int:
    """Serve the page until Ctrl-C."""
    missing = [name for name in ("starlette", "uvicorn") if importlib.util.find_spec(name) is None]
    if missing:
        raise exceptions.FastShmError(
            f"dashboard needs {' and '.join(missing)}: pip install "
            '"fast-litellm-shm[dashboard]". `fast-shm top` and `fast-shm inspect --watch` work '
            "without"
        )
    import uvicorn

    from fast_litellm_shm.cli.dashboard.app import Poller, make_app
    from fast_litellm_shm.cli.sampler import Sampler

    sampler = Sampler(args.name, allow_other_owner=args.allow_other_owner)
    sampler.open()
    listener = _listening(args.host, args.port)
    host, port = listener.getsockname()[:2]
    stop = threading.Event()
    poller = Poller(sampler, args.every, stop)
    config = uvicorn.Config(
        make_app(poller, args.allow_host),
        backlog=_BACKLOG,
        loop="asyncio",  # uvloop says nothing when it has no descriptor for a connection
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        lifespan="off",
        timeout_graceful_shutdown=1,
    )
    if not _is_loopback(host):
        print(
            f"fast-shm: WARNING: everyone who can reach {host} port {port} can read this page with "
            "the names of keys and the commands of workers. There is no password. To serve this "
            "host alone, leave --host out, and reach it by `ssh -L`",
            file=sys.stderr,
        )
    shown = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    # Both run in threads, so that Ctrl-C always interrupts this thread. CPython does not survive it
    # in the middle of an import or of the start of a thread.
    server = uvicorn.Server(config)
    logging.getLogger("asyncio").addFilter(_OnceForNoDescriptor())
    polling = threading.Thread(target=poller.run, name="polling", daemon=True)
    ended = threading.Event()

    def serve() -> None:
        try:
            server.run(sockets=[listener])
        finally:
            ended.set()

    serving = threading.Thread(target=serve, name="serving", daemon=True)
    try:
        polling.start()
        serving.start()
        print(f"Segment {args.name!r} on http://{shown}:{port}/ (Ctrl-C ends)", flush=True)
        # Not join(): if it is interrupted, CPython before 3.13 takes the thread for ended. Then the
        # next join() returns while the thread runs, and the interpreter ends under it.
        ended.wait()
    except KeyboardInterrupt:
        server.should_exit = True
        stop.set()
        for thread in (serving, polling):
            if thread.ident is not None:  # it has started
                thread.join()
        return 0
    finally:
        listener.close()
    raise exceptions.FastShmError(
        "the web server has stopped: its messages above say why. Start it again"
    )
