"""``python -m bench``: every question, one after another. Peers that are missing are named."""

from __future__ import annotations

import argparse

from bench import bytes_per_key, check_cost, pool_cost


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument(
        "--iterations", type=int, default=41, help="rounds of each timing (default 41)"
    )
    rounds = max(parser.parse_args().iterations, 5)
    print(f"# {(check_cost.__doc__ or '').splitlines()[0]}")
    check_cost.show(check_cost.run(rounds=rounds))
    print(f"\n# {(pool_cost.__doc__ or '').splitlines()[0]}")
    pool_cost.show(pool_cost.run(rounds=rounds))
    print(f"\n# {(bytes_per_key.__doc__ or '').splitlines()[0]}")
    bytes_per_key.show(bytes_per_key.run())


if __name__ == "__main__":
    main()
