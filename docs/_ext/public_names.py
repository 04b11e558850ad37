"""The reference: every public name has its place there, and docstrings link to each other."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
from collections.abc import Iterator
from types import ModuleType
from typing import Any

from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.domains.python import PythonDomain
from sphinx.environment import BuildEnvironment
from sphinx.ext.autodoc.mock import mock
from sphinx.util import logging
from sphinx.util.typing import ExtensionMetadata

import fast_litellm_shm

PACKAGE = fast_litellm_shm.__name__
# Folders whose public names the package itself has: `from fast_litellm_shm import ...`.
INSIDE = {"cli", "fast_litellm", "limiters", "metrics", "pools", "routing", "tokens"}
PAGE = re.compile(r"``docs/([\w-]+)\.md``")
log = logging.getLogger(__name__)


def public_modules() -> Iterator[ModuleType]:
    """What a user imports from: the package, and what is directly in it and in integrations/."""
    yield fast_litellm_shm
    for folder in (fast_litellm_shm, importlib.import_module(f"{PACKAGE}.integrations")):
        for found in pkgutil.iter_modules(folder.__path__, f"{folder.__name__}."):
            name = found.name.rpartition(".")[2]
            if not name.startswith("_") and name not in INSIDE | {"integrations"}:
                yield importlib.import_module(found.name)


def _own(value: Any) -> bool:
    return str(getattr(value, "__module__", "")).startswith(PACKAGE)


def _members(cls: type) -> Iterator[str]:
    """Public methods and attributes that this package adds to what a framework's base class has."""
    theirs = {name for base in cls.__mro__ if not _own(base) for name in vars(base)}
    for base in filter(_own, cls.__mro__):
        yield from (name for name in vars(base) if not name.startswith("_") and name not in theirs)


def undocumented(documented: set[str]) -> Iterator[str]:
    """Public names that are not among `documented`, which has names with their module."""
    modules = list(public_modules())
    seen = {
        id(value)
        for module in modules
        for name, value in vars(module).items()
        if f"{module.__name__}.{name}" in documented
    }
    seen |= {id(getattr(fast_litellm_shm, name)) for name in fast_litellm_shm.__all__}
    for module in modules:
        if not hasattr(module, "__all__"):
            yield f"{module.__name__}.__all__"
            continue
        for name in module.__all__:
            full, value = f"{module.__name__}.{name}", getattr(module, name)
            if full not in documented:
                # An exception, or a name that two modules share: one place is enough.
                if inspect.isroutine(value) or inspect.isclass(value):
                    if id(value) in seen:
                        continue
                yield full
            elif inspect.isclass(value):
                yield from (
                    f"{full}.{member}"
                    for member in dict.fromkeys(_members(value))
                    if f"{full}.{member}" not in documented
                )


def _check(app: Sphinx, env: BuildEnvironment) -> None:
    domain = env.get_domain("py")
    assert isinstance(domain, PythonDomain)
    with mock(app.config.autodoc_mock_imports):
        missing = list(undocumented(set(domain.objects)))
    for name in missing:
        log.warning("the reference does not have %s: name it in a page of docs/reference/", name)


def _resolve(
    app: Sphinx, env: BuildEnvironment, node: pending_xref, text: nodes.Element
) -> nodes.Element | None:
    """A name by its place in the code leads to the public one; those of others have no page here."""
    if node.get("refdomain") != "py":
        return None
    target = node["reftarget"]
    if target.split(".")[0] != PACKAGE and "." in target:
        return text
    domain = env.get_domain("py")
    assert isinstance(domain, PythonDomain)
    module, _, name = target.rpartition(".")
    parts = target.split(".")
    for depth in (1, 2):  # Class, Class.method
        tail = ".".join(parts[-depth:])
        found = [full for full in domain.objects if full.endswith(f".{tail}")]
        same = [full for full in found if full.count(".") == depth] or found
        if same:
            entry = domain.objects[same[0]]
            return nodes.reference(
                "", "", text, internal=True,
                refuri=app.builder.get_relative_uri(node["refdoc"], entry.docname) + f"#{entry.node_id}",
            )
    return None


def _docstring(
    app: Sphinx, what: str, name: str, value: Any, options: Any, lines: list[str]
) -> None:
    text = PAGE.sub(r":doc:`/\1`", "\n".join(lines))
    if callable(value):
        try:
            parameters = [p for p in inspect.signature(value).parameters if p != "self"]
        except (TypeError, ValueError):
            parameters = []
        if parameters:
            names = "|".join(map(re.escape, parameters))
            # "per: seconds" begins what is said of an argument; so does "plans, plan_of: ...".
            text = re.sub(
                rf"(?<![\w`*.:])((?:{names})(?:, (?:{names}))*):(?= |$)",
                lambda found: ", ".join(f"**{each}**" for each in found[1].split(", ")) + ":",
                text,
                flags=re.MULTILINE,
            )
    lines[:] = text.split("\n")


def setup(app: Sphinx) -> ExtensionMetadata:
    app.connect("autodoc-process-docstring", _docstring)
    app.connect("missing-reference", _resolve)
    app.connect("env-check-consistency", _check)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
