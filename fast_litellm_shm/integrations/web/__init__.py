"""What all web integrations have in common: rules, keys, outcomes.

It knows no framework and needs no extra: ``integrations.asgi``, ``.wsgi`` and ``.fastapi`` use it.
"""

from fast_litellm_shm.integrations.web.exceeded import DjangoAnswer429, answer_429
from fast_litellm_shm.integrations.web.gate import Gate as Middleware
from fast_litellm_shm.integrations.web.keys import (
    client_address,
    client_network,
    forwarded_for,
    header,
)
from fast_litellm_shm.integrations.web.outcome import MARK, Outcome
from fast_litellm_shm.integrations.web.request import Request
from fast_litellm_shm.integrations.web.rules import Rule

__all__ = [
    "MARK",
    "DjangoAnswer429",
    "Middleware",
    "Outcome",
    "Request",
    "Rule",
    "answer_429",
    "client_address",
    "client_network",
    "forwarded_for",
    "header",
]
