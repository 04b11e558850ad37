"""The package's log. ``logging`` is imported by the first line that is logged."""

from __future__ import annotations


def warning(text: str, *values: object) -> None:
    """Log a warning as ``fast_litellm_shm``; values fill in ``text``, as logging does."""
    import logging

    logging.getLogger("fast_litellm_shm").warning(text, *values, stacklevel=2)


def exception(text: str, *values: object) -> None:
    """Log an error with the traceback of the exception that is being handled."""
    import logging

    logging.getLogger("fast_litellm_shm").exception(text, *values, stacklevel=2)
