"""``fast-shm save``: give back what a segment's durable limits have leased and not used."""

from __future__ import annotations

import argparse
import sys

from fast_litellm_shm import exceptions
from fast_litellm_shm.cli import render, segments
from fast_litellm_shm.cluster.link import UnreachableError
from fast_litellm_shm.durable import link, records, settings
from fast_litellm_shm.limits import dollars


def run(args: argparse.Namespace) -> int:
    place = settings.default().place(args.name)
    with records.opened(place.path):
        pass  # or an error that says that there is none
    segment = segments.open_for_writing(args.name, args.allow_other_owner)
    found = link.of(place, segment)
    try:
        tokens, keys, nanos, of_budgets = found.save()
    except UnreachableError as error:
        raise exceptions.StateFileError(f"nothing was saved: {error}") from error
    if keys:
        print(f"Gave back {render.counted(tokens, 'token')} of {render.counted(keys, 'key')}.")
    if of_budgets:
        print(f"Gave back {dollars(nanos)} dollars of {render.counted(of_budgets, 'key')}.")
    for limiter, left in found.not_saved.items():
        print(
            f"fast-shm: {render.counted(left, 'key')} of limiter '{render.escaped(limiter)}' stay "
            "leased: this command does not know its limits (its keys have plans, or the name has "
            "another kind of limits). A worker that ends cleanly gives back what it knows; the "
            "rest counts as used after a reboot",
            file=sys.stderr,
        )
    if not keys and not of_budgets and not found.not_saved:
        print("Nothing to give back: the state file has it all.")
    return 1 if found.not_saved else 0
