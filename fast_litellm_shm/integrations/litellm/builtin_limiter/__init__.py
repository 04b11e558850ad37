"""LiteLLM's built-in limiter, ``parallel_request_limiter_v3``: what stands in its place in the
proxy (:mod:`.replacement`), and in ``mode: native`` the store that it counts in: the segment."""

HOOK = "parallel_request_limiter"  # its name in LiteLLM's table of hooks
