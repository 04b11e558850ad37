"""The import hook: it accelerates litellm's token counter when a program imports litellm.

``import fast_litellm_shm`` installs it, as ``import fast_litellm`` does. Until litellm's module is
imported, it loads nothing of tokens, prices and statistics. ``FAST_LITELLM_ENABLED=false`` in the
environment of the program turns it off.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from fast_litellm_shm._shared import log, settings

if TYPE_CHECKING:
    from collections.abc import Callable
    from importlib.machinery import ModuleSpec
    from types import ModuleType

MODULE = "litellm.litellm_core_utils.token_counter"


def _call(accelerate: Callable[[], object]) -> None:
    try:
        accelerate()
    except Exception:  # an import (of litellm, or of this package) must not fail for it
        log.exception("cannot accelerate litellm")


class _Finder:
    """Finds MODULE by the other finders, and makes its loader call accelerate() at the end."""

    accelerate: Callable[[], object]

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name != MODULE:
            return None
        others = [finder for finder in sys.meta_path if finder is not self]
        found = (finder.find_spec(name, path, target) for finder in others)
        spec = next((spec for spec in found if spec is not None), None)
        loader: Any = spec.loader if spec is not None else None
        run = getattr(loader, "exec_module", None)
        if run is None:
            return spec

        def exec_module(module: ModuleType) -> None:
            del loader.exec_module
            run(module)
            remove()
            _call(self.accelerate)

        try:
            loader.exec_module = exec_module
        except AttributeError:
            log.warning("litellm is not accelerated: its loader %r cannot be followed", loader)
        return spec


_finder: Any = _Finder()


def installed() -> bool:
    """Whether it waits for MODULE."""
    return _finder in sys.meta_path


def install(accelerate: Callable[[], object]) -> None:
    """Wait for MODULE, and call accelerate() then. Calling it again is harmless."""
    _finder.accelerate = accelerate
    if not installed():
        sys.meta_path.insert(0, _finder)


def remove() -> None:
    """Wait no longer. Calling it again is harmless."""
    if installed():
        sys.meta_path.remove(_finder)


def on_import(accelerate: Callable[[], object]) -> None:
    """Called when fast_litellm_shm is imported."""
    if not settings.all_enabled():
        return
    if MODULE in sys.modules:
        _call(accelerate)
    else:
        install(accelerate)
