"""One of several workers that use the SDK of OpenAI, and keep to an account's limit together.

    export OPENAI_API_KEY=...
    python openai_client.py 10        # in as many shells as you like

Prints how many of its calls were answered, and how many were refused, as JSON.
"""

import json
import sys
from collections import Counter

import openai

from fast_litellm_shm import FixedWindow
from fast_litellm_shm.integrations.httpx2 import SharedLimitTransport


def client() -> openai.OpenAI:
    """A client whose calls all workers count together: at most 20 an hour, two at a time."""
    transport = SharedLimitTransport(
        name="openai-example",
        limits=FixedWindow(20, per=3600),
        max_in_flight=2,
        max_wait=30,
        on_refusal="respond",  # a call that is refused raises RateLimitError, without retries
    )
    return openai.OpenAI(http_client=openai.DefaultHttpxClient(transport=transport))


def ask(count: int) -> Counter[str]:
    """Make ``count`` calls."""
    answers = Counter[str]()
    with client() as limited:
        for _ in range(count):
            try:
                limited.responses.create(model="gpt-5", input="Say one word.")
                answers["answered"] += 1
            except openai.RateLimitError as error:  # the workers' own limit, or that of the account
                print(error, error.response.headers.get("Retry-After"), file=sys.stderr)
                answers["refused"] += 1
    return answers


if __name__ == "__main__":
    print(json.dumps(ask(int(sys.argv[1]))))
