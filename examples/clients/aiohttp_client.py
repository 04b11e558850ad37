"""One of several workers that ask the same upstream with aiohttp, and keep to its limit together.

    python aiohttp_client.py http://localhost:8000/ 10        # in as many shells as you like

Prints how many of its requests got each status, as JSON.
"""

import asyncio
import json
import sys
from collections import Counter

import aiohttp

from fast_litellm_shm import FixedWindow
from fast_litellm_shm.integrations.aiohttp import SharedLimitMiddleware, SharedLimitTimeout


async def ask(url: str, count: int) -> Counter[str]:
    """Send ``count`` requests at once. All workers together send at most 20 an hour, two at a
    time."""
    limit = SharedLimitMiddleware(
        name="aiohttp-example", limits=FixedWindow(20, per=3600), max_in_flight=2, max_wait=30
    )
    async with aiohttp.ClientSession(middlewares=[limit]) as session:

        async def one() -> str:
            try:
                async with session.get(url) as response:
                    await response.read()
                    return str(response.status)
            except SharedLimitTimeout as error:  # its turn would come later: it was not sent
                print(error, file=sys.stderr)
                return "not sent"

        return Counter(await asyncio.gather(*(one() for _ in range(count))))


if __name__ == "__main__":
    print(json.dumps(asyncio.run(ask(sys.argv[1], int(sys.argv[2])))))
