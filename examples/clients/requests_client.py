"""One of several workers that ask the same upstream with requests, and keep to its limit together.

    python requests_client.py http://localhost:8000/ 10        # in as many shells as you like

Prints how many of its requests got each status, as JSON.
"""

import json
import sys
from collections import Counter

import requests

from fast_litellm_shm import FixedWindow
from fast_litellm_shm.integrations.requests import SharedLimitAdapter, SharedLimitTimeout


def ask(url: str, count: int) -> Counter[str]:
    """Send ``count`` requests. All workers together send at most 20 an hour, two at a time."""
    answers = Counter[str]()
    limit = SharedLimitAdapter(
        name="requests-example", limits=FixedWindow(20, per=3600), max_in_flight=2, max_wait=30
    )
    with requests.Session() as session:
        session.mount("http://", limit)
        session.mount("https://", limit)
        for _ in range(count):
            try:
                answers[str(session.get(url, timeout=30).status_code)] += 1
            except SharedLimitTimeout as error:  # its turn would come later: it was not sent
                print(error, file=sys.stderr)
                answers["not sent"] += 1
    return answers


if __name__ == "__main__":
    print(json.dumps(ask(sys.argv[1], int(sys.argv[2]))))
