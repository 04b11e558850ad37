"""Keys and their limits, where a deployment of yours would have LiteLLM's database."""

from __future__ import annotations

from typing import Any

from litellm.proxy._types import UserAPIKeyAuth

KEYS: dict[str, dict[str, Any]] = {
    "sk-requests": {"rpm_limit": 10},
    "sk-tokens": {"tpm_limit": 1000},
    "sk-parallel": {"max_parallel_requests": 4},
    "sk-free": {},
}


async def user_api_key_auth(request: object, api_key: str) -> UserAPIKeyAuth:
    """What LiteLLM asks for each request: ``general_settings.custom_auth``."""
    if api_key not in KEYS:
        raise ValueError(f"there is no key {api_key[:6]}...")
    return UserAPIKeyAuth(api_key=api_key, **KEYS[api_key])
