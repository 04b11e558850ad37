"""One of several workers that ask the same upstream, and keep to its limits together.

    python client.py http://localhost:8000/ 10        # in as many shells as you like

Prints how many of its requests got each status, as JSON.
"""

import json
import sys
from collections import Counter

import httpx

from fast_litellm_shm.integrations.httpx import SharedLimitTimeout, SharedLimitTransport


def ask(url: str, count: int) -> Counter[str]:
    """Send ``count`` requests. All workers together have one request in flight. All of them wait if
    the upstream asks for a pause (429 or 503 with Retry-After)."""
    answers = Counter[str]()
    transport = SharedLimitTransport(max_in_flight=1, max_wait=60, name="httpx-example")
    with httpx.Client(transport=transport, timeout=30) as client:
        for _ in range(count):
            try:
                answers[str(client.get(url).status_code)] += 1
            except SharedLimitTimeout as error:  # its turn did not come: it was not sent
                print(error, file=sys.stderr)
                answers["not sent"] += 1
    return answers


if __name__ == "__main__":
    print(json.dumps(ask(sys.argv[1], int(sys.argv[2]))))
