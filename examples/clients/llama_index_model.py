"""One of several workers that call a model through LlamaIndex, and keep to one limit together.

    python llama_index_model.py 10        # in as many shells as you like

The model is a mock, which answers at once: put your own in its place. Prints how many calls were
made, and how many were refused, as JSON.
"""

import json
import sys
from collections import Counter

from llama_index.core.llms import MockLLM

from fast_litellm_shm import FixedWindow, RateLimitExceeded
from fast_litellm_shm.integrations.llama_index import SharedRateLimiter


def ask(count: int) -> Counter[str]:
    """Make ``count`` calls. All workers together make at most 20 an hour."""
    limiter = SharedRateLimiter(FixedWindow(20, per=3600), name="llama-index-example", max_wait=5)
    model = MockLLM()
    model.rate_limiter = limiter  # most models take it as an argument: OpenAI(rate_limiter=limiter)
    answers = Counter[str]()
    for _ in range(count):
        try:
            model.complete("Say one word.")
            answers["answered"] += 1
        except RateLimitExceeded as error:
            print(error, file=sys.stderr)
            answers["refused"] += 1
    return answers


if __name__ == "__main__":
    print(json.dumps(ask(int(sys.argv[1]))))
