"""The site that `make docs` builds from this folder. Warnings are errors there."""

from __future__ import annotations

import sys
from inspect import Signature, signature
from pathlib import Path

from django.conf import settings

import fast_litellm_shm
from fast_litellm_shm import RateLimiter
from fast_litellm_shm.integrations.web import Middleware

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

project = "fast_litellm_shm"
author = "fast_litellm_shm contributors"
version = release = fast_litellm_shm.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx_copybutton",
    "elsewhere",
    "public_names",
    "site_search",
]
nitpicky = True
exclude_patterns = ["_ext", "_static", "_templates"]
templates_path = ["_templates"]
suppress_warnings = ["myst.header"]  # a heading of README.md's kind may skip a level

myst_heading_anchors = 4  # the anchors that a git host makes too
myst_enable_extensions = ["colon_fence"]

html_theme = "furo"
pygments_dark_style = "monokai"
html_title = f"fast_litellm_shm {version}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_use_index = False  # the search finds names, and the pages of the reference list them
html_copy_source = False
html_show_sourcelink = False
html_show_sphinx = False
html_theme_options = {"navigation_with_keys": True, "top_of_page_buttons": []}
copybutton_prompt_text = "$ "

toc_object_entries_show_parents = "hide"
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_inherit_docstrings = False  # of a framework, about itself
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88
# What is too large to install for its name alone.
autodoc_mock_imports = ["langchain_core", "litellm", "llama_index"]
# autodoc takes a class of another name for an alias.
fast_litellm_shm.Reservation.__name__ = "Reservation"
Middleware.__name__ = "Middleware"
# It has a __new__ that takes what __init__ takes.
RateLimiter.__signature__ = signature(
    RateLimiter.__init__
).replace(  # type: ignore[attr-defined]
    parameters=[*signature(RateLimiter.__init__).parameters.values()][1:],
    return_annotation=Signature.empty,
)
settings.configure()  # REST framework reads them when it is imported
# In signatures, without a link: of other packages, and classes that a user only gets.
types_without_page = {
    "BudgetReservation", "Decimal", "Depends", "Function", "Gate", "Granted", "Held", "InFlight",
    "App", "Money", "NDArray", "Place", "Policies", "Upstream", "Use", "datetime",
}  # fmt: skip

# What a reader may type for a page, where its text has other words.
search_words = {
    "adaptive": "backpressure, AIMD, unknown limit",
    "cluster": "Redis, redis server, Redis limits, Redis Cluster, Redis Sentinel, Valkey, "
    "distributed, many hosts",
    "guide": "gunicorn, uvicorn, workers, concurrency, semaphore, tokens per minute, tpm, rpm",
    "operations": "Docker, Kubernetes, containers, systemd, permissions, upgrade",
    "reliability": "kill -9, SIGKILL, crash, worker dies, guarantees",
    "web": "429, Too Many Requests, Retry-After, headers, status, retry after",
}
# Pages of detail: found, but after those for users.
search_last = {"attacks", "changelog", "contributing", "design", "examples", "index"}
