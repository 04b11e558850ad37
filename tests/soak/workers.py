"""The uvicorn worker of gunicorn, from the package that has it."""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from typing import Any

_PACKAGE = "uvicorn_worker" if importlib.util.find_spec("uvicorn_worker") else "uvicorn.workers"
with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)
    Uvicorn: Any = importlib.import_module(_PACKAGE).UvicornWorker
