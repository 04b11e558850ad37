"""The limiters: rates, concurrency, and both with tokens."""
