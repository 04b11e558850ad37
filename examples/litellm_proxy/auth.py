"""Keys of clients and their limits. A deployment of yours has LiteLLM's database instead."""

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
    """LiteLLM calls this for each request: ``general_settings.custom_auth``."""
    if api_key not in KEYS:
        raise ValueError(f"unknown key {api_key[:6]}...; the keys are in auth.py")
    return UserAPIKeyAuth(api_key=api_key, **KEYS[api_key])
