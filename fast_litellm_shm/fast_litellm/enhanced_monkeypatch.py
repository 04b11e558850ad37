"""``fast_litellm.enhanced_monkeypatch``: the acceleration of litellm, in the shape of that module.

This package replaces two functions of litellm. What that module has to replace others
(``enhanced_patch_function``, ``PerformanceWrapper`` and so on) is not here.
"""

from __future__ import annotations

from typing import Any

from fast_litellm_shm.fast_litellm import acceleration, feature_flags

__all__ = ["enhanced_apply_acceleration", "get_patch_status", "remove_enhanced_acceleration"]


def enhanced_apply_acceleration(rust_extensions_module: object) -> bool:
    """:func:`fast_litellm_shm.apply_acceleration`; False if the given module has no true
    RUST_ACCELERATION_AVAILABLE."""
    if not getattr(rust_extensions_module, "RUST_ACCELERATION_AVAILABLE", False):
        return False
    return acceleration.apply_acceleration()


def remove_enhanced_acceleration() -> None:
    """:func:`fast_litellm_shm.remove_acceleration`."""
    acceleration.remove_acceleration()


def get_patch_status() -> dict[str, Any]:
    """``patched_functions`` (by name of the function: feature_flag, enabled, has_original,
    has_rust), ``feature_flags`` (feature_flags.get_status()), total_patches."""
    feature = acceleration._FEATURE
    patched = {
        f"{patch.module}.{patch.function}": {
            "feature_flag": feature,
            "enabled": feature_flags.is_enabled(feature),
            "has_original": True,
            "has_rust": True,
        }
        for patch in acceleration.PATCHES
        if patch.is_applied()
    }
    return {
        "patched_functions": patched,
        "feature_flags": feature_flags.get_status(),
        "total_patches": len(patched),
    }
