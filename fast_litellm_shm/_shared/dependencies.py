"""numpy, psutil, rich and tiktoken: each is imported by the function that uses it.

In a function, ``from fast_litellm_shm._shared.dependencies import numpy`` does what
``import numpy`` does. If the package is not installed, it raises MissingPackageError.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from fast_litellm_shm.exceptions import MissingPackageError

if TYPE_CHECKING:
    import numpy
    import psutil
    import rich
    import tiktoken

__all__ = ["numpy", "psutil", "rich", "tiktoken"]

if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name not in (name, None):  # the package is there, but not what it needs
                raise
            raise MissingPackageError(
                f"this call needs {name}, which is not installed: pip install {name}", name=name
            ) from error
