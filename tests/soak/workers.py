"""The uvicorn worker of gunicorn, from wherever it is."""

from __future__ import annotations

import warnings

try:
    from uvicorn_worker import UvicornWorker as Uvicorn
except ImportError:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        from uvicorn.workers import UvicornWorker as Uvicorn

__all__ = ["Uvicorn"]
