"""A stand-in for LiteLLM's UserAPIKeyAuth, whose module needs all that the proxy needs."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

FIELDS = (
    *("api_key", "rpm_limit", "tpm_limit", "max_parallel_requests", "metadata"),
    *("user_id", "user_rpm_limit", "user_tpm_limit"),
    *("team_id", "team_rpm_limit", "team_tpm_limit", "team_metadata"),
    *("team_member_rpm_limit", "team_member_tpm_limit"),
    *("end_user_id", "end_user_rpm_limit", "end_user_tpm_limit"),
    *("org_id", "organization_rpm_limit", "organization_tpm_limit", "organization_metadata"),
    *("model_max_budget", "budget_throttle_pct", "key_alias", "team_alias"),
)


def auth(**given: Any) -> Any:
    """All fields that are read. That they are LiteLLM's, a test in tests/litellm_proxy says."""
    assert set(given) <= set(FIELDS)
    return SimpleNamespace(**{**dict.fromkeys(FIELDS), "api_key": "k", **given})
