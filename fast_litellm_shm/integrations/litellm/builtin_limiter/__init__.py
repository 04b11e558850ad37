"""LiteLLM's built-in limiter, ``parallel_request_limiter_v3``: what stands in its place in the
proxy (:mod:`.replacement`), and in ``mode: native`` the store that it counts in: the segment."""
