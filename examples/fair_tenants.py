"""Two tenants share 4 permits over 4 processes: the first floods the queue with heavy calls, the
second comes 2 seconds later with light ones. Each gets half of the service from then on. Prints
what each was served, and with a file name draws it:

    python examples/fair_tenants.py [picture.svg]
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import sys
import time
from typing import Any

from fast_litellm_shm import Quota, Segment

PROCESSES, PERMITS, SECONDS, LATER, RATE = 4, 4, 8.0, 2.0, 20_000  # RATE: tokens a second, of one
TENANTS = {"flood": (400, 50, 0.0), "late": (100, 50, LATER)}  # tokens, tasks, when it comes
Served = tuple[float, str, int]  # when, whom, tokens


def _work(name: str, start: float, out: Any) -> None:
    quota = Quota(max_parallel=PERMITS, name="models", segment=Segment(name))
    served: list[Served] = []

    async def calls(tenant: str, tokens: int, since: float) -> None:
        await asyncio.sleep(max(start + since - time.time(), 0))
        while (left := start + SECONDS - time.time()) > 0:
            async with await quota.wait_async(
                "gpt", tokens=tokens, timeout=left, tenant=tenant
            ) as admission:
                if admission:
                    await asyncio.sleep(tokens / RATE)  # the call of the model
                    served.append((time.time() - start, tenant, tokens))

    async def main() -> None:
        await asyncio.gather(
            *(
                calls(tenant, tokens, since)
                for tenant, (tokens, tasks, since) in TENANTS.items()
                for _ in range(tasks)
            )
        )

    asyncio.run(main())
    out.put(served)


def run() -> list[Served]:
    """What was served, in the order of time."""
    name = f"fair-tenants-{os.getpid()}"
    segment = Segment(name, capacity=1000)
    out: Any = multiprocessing.Queue()
    start = time.time() + 1
    workers = [
        multiprocessing.Process(target=_work, args=(name, start, out)) for _ in range(PROCESSES)
    ]
    try:
        for each in workers:
            each.start()
        found: list[Served] = sorted(sum((out.get() for _ in workers), []))
        for each in workers:
            each.join()
        return found
    finally:
        segment.remove()


def draw(served: list[Served], path: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4))
    for tenant, colour in zip(TENANTS, ("#8c8c8c", "#d1480a"), strict=True):
        times, sums = [TENANTS[tenant][2]], [0]
        for when, whom, tokens in served:
            if whom == tenant:
                times.append(when)
                sums.append(sums[-1] + tokens)
        axes.step(times, sums, where="post", label=tenant, color=colour, linewidth=2)
    axes.axvline(LATER, color="#6b7a8f", linestyle="--", linewidth=1)
    axes.set(xlabel="seconds", ylabel="tokens served", title="Two tenants, 4 processes, 4 permits")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path)


def main() -> None:
    served = run()
    for tenant in TENANTS:
        both = sum(t for when, whom, t in served if whom == tenant and when > LATER + 0.5)
        print(f"{tenant}: {both} tokens while both waited")
    if len(sys.argv) > 1:
        draw(served, sys.argv[1])


if __name__ == "__main__":
    main()
