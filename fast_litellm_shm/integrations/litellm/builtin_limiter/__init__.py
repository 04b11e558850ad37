"""LiteLLM's built-in limiter of requests, version 3 (``parallel_request_limiter_v3``): what replaces
it in the proxy, and its store in the segment (``mode: native``)."""
