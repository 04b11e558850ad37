"""Names of a package that are loaded when they are first used: its ``__getattr__`` (PEP 562)."""

import importlib
import sys
from collections.abc import Callable, Mapping
from typing import Any


def loader(package: str, modules: Mapping[str, str]) -> Callable[[str], Any]:
    """The ``__getattr__`` of ``package``. modules: the names that each module has, separated by
    spaces; modules are named below fast_litellm_shm."""
    module_of = {name: module for module, names in modules.items() for name in names.split()}

    def load(name: str) -> Any:
        if name not in module_of:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        module = importlib.import_module(f"fast_litellm_shm.{module_of[name]}")
        found = getattr(module, name)
        setattr(sys.modules[package], name, found)  # asked once
        return found

    return load
