"""A gateway in which each key may spend $1 a day, and each team $50 a month, over all its workers.

    uvicorn --workers 4 app:app
    curl -i -H 'X-Api-Key: key-of-ann' localhost:8000/chat
    curl -H 'X-Api-Key: key-of-ann' localhost:8000/spent
    fast-shm inspect

The model is made up: it takes 5 ms, and each call costs $0.013.
"""

import asyncio
import os
from typing import Annotated

from fastapi import Depends, FastAPI, Header, HTTPException

from fast_litellm_shm import Budget

#: The team of each key. A real program keeps hashes of the keys, in its database.
API_KEYS = {"key-of-ann": "research", "key-of-bob": "research"}

keys = Budget(usd=1, per="day", timezone="Europe/Berlin", name="keys", warn_at=0.8)
teams = Budget(usd=50, per="month", timezone="Europe/Berlin", name="teams")

app = FastAPI()


def caller(x_api_key: Annotated[str, Header()] = "") -> str:
    """A key that is known. Who makes keys up spends nothing, and takes no room."""
    if x_api_key not in API_KEYS:
        raise HTTPException(401, "unknown key")
    return x_api_key


async def model() -> float:
    """Calls the model; here it only takes a moment. Returns what the call cost, in dollars."""
    await asyncio.sleep(0.005)
    return 0.013


@app.get("/chat")
async def chat(key: Annotated[str, Depends(caller)]) -> int:
    """Which worker answered, if the key and its team have $0.02 left: no call costs more."""
    with keys.reserve(key, usd=0.02, also=[(teams, API_KEYS[key])]) as reservation:
        if not reservation:
            after = reservation.retry_after
            headers = {} if after is None else {"Retry-After": str(int(after) + 1)}
            raise HTTPException(429, reservation.reason, headers)
        cost = await model()  # what fails here, or is cancelled, costs nothing
        reservation.settle(usd=cost)
    return os.getpid()


@app.get("/spent")
async def spent(key: Annotated[str, Depends(caller)]) -> dict[str, str | float | None]:
    """What the key has spent today."""
    usage = keys.usage(key)
    return {
        "spent": str(usage.spent),
        "remaining": str(usage.remaining),
        "reset_after": usage.reset_after,
    }


@app.get("/ready")
async def ready() -> int:
    """Which worker answered."""
    return os.getpid()
