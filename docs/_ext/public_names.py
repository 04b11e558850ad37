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
from sphinx.ext.autodoc.mock import ismock, mock
from sphinx.util import logging
from sphinx.util.typing import ExtensionMetadata

import fast_litellm_shm

PACKAGE = fast_litellm_shm.__name__
# Folders whose public names the package itself has: `from fast_litellm_shm import ...`.
INSIDE = {
    "cli",
    "fast_litellm",
    "integrations",
    "limiters",
    "metrics",
    "pools",
    "routing",
    "tokens",
}
PAGE = re.compile(r"(?:``)?\bdocs/([\w-]+)\.md(?:``)?")
log = logging.getLogger(__name__)


def public_modules() -> Iterator[tuple[str, ModuleType]]:
    """What a user imports from: the package, and what is directly in it and in integrations/."""
    yield PACKAGE, fast_litellm_shm
    for folder in (fast_litellm_shm, importlib.import_module(f"{PACKAGE}.integrations")):
        for found in pkgutil.iter_modules(folder.__path__, f"{folder.__name__}."):
            name = found.name.rpartition(".")[2]
            if not name.startswith("_") and name not in INSIDE:
                yield found.name, importlib.import_module(found.name)


def _own(value: Any) -> bool:
    return str(getattr(value, "__module__", "")).startswith(PACKAGE)


def _members(cls: type) -> set[str]:
    """Public methods and attributes that this package adds to what a framework's base class has."""
    ours = [base for base in cls.__mro__ if _own(base)]
    names = {name for base in ours for name in vars(base) if not name.startswith("_")}
    others = [base for base in cls.__mro__ if base not in ours]
    if any(map(ismock, others)):  # nobody knows what they have
        return set()
    return names - {name for base in others for name in vars(base)}


def undocumented(documented: set[str]) -> Iterator[str]:
    """Public names that are not among `documented`. One place is enough for a class that several
    modules have."""
    modules = list(public_modules())
    places = {
        id(value): f"{path}.{name}"
        for path, module in modules
        for name, value in [(name, getattr(module, name)) for name in dir(module)]
        if f"{path}.{name}" in documented
    }
    for path, module in modules:
        if not hasattr(module, "__all__"):
            yield f"{path}.__all__"
            continue
        for name in module.__all__:
            full, value = f"{path}.{name}", getattr(module, name)
            if full in documented:
                if inspect.isclass(value) and value.__name__ == name:  # not a former name of it
                    every = (f"{full}.{member}" for member in sorted(_members(value)))
                    yield from (each for each in every if each not in documented)
            elif id(value) not in places or isinstance(value, (bool, int)):
                yield full


def _check(app: Sphinx, env: BuildEnvironment) -> None:
    domain = env.get_domain("py")
    assert isinstance(domain, PythonDomain)
    documented = {name for name, entry in domain.objects.items() if not entry.aliased}
    with mock(app.config.autodoc_mock_imports):
        missing = list(undocumented(documented))
    for name in missing:
        log.warning("the reference does not have %s: name it in a page of docs/reference/", name)


def _skip(app: Sphinx, what: str, name: str, value: Any, skip: bool, options: Any) -> bool | None:
    if what not in ("class", "exception") or name.startswith("_"):
        return None
    data = app.env.temp_data
    module = importlib.import_module(data["autodoc:module"])
    cls = getattr(module, data["autodoc:class"])
    return None if name in _members(cls) or any(map(ismock, cls.__mro__)) else True


def _resolve(
    app: Sphinx, env: BuildEnvironment, node: pending_xref, text: nodes.Element
) -> nodes.Element | None:
    """A name by its place in the code leads to the public one; those of other packages, and those
    that begin with _, have no page here."""
    if node.get("refdomain") != "py":
        return None
    parts = node["reftarget"].split(".")
    if parts[-1].startswith("_") or (len(parts) > 1 and parts[0] != PACKAGE):
        return text
    domain = env.get_domain("py")
    assert isinstance(domain, PythonDomain)
    for depth in (2, 1) if len(parts) > 1 else (1,):  # Class.method, Class
        tail = ".".join(parts[-depth:])
        found = [name for name in domain.objects if name == tail or name.endswith(f".{tail}")]
        if found:
            entry = domain.objects[min(found, key=lambda name: (name.count("."), name))]
            uri = app.builder.get_relative_uri(node["refdoc"], entry.docname)
            return nodes.reference("", "", text, internal=True, refuri=f"{uri}#{entry.node_id}")
    return text if parts[-1] in app.config.types_without_page else None


def _docstring(
    app: Sphinx, what: str, name: str, value: Any, options: Any, lines: list[str]
) -> None:
    """Files of docs/ become links, and "per: seconds" begins what is said of an argument."""
    text = PAGE.sub(r":doc:`/\1`", "\n".join(lines))
    try:
        parameters = inspect.signature(value).parameters
        names = "|".join(each.rstrip("_") for each in parameters if each != "self")
    except (TypeError, ValueError):
        names = ""
    if names:
        text = re.sub(
            rf"(?:^|(?<=[.;] ))((?:{names})(?:, (?:{names}))*):(?= |$)",
            lambda found: ", ".join(f"**{each}**" for each in found[1].split(", ")) + ":",
            text,
            flags=re.MULTILINE,
        )
    lines[:] = text.split("\n")


def setup(app: Sphinx) -> ExtensionMetadata:
    app.add_config_value("types_without_page", set(), "env", [set])
    app.connect("autodoc-process-docstring", _docstring)
    app.connect("autodoc-skip-member", _skip)
    app.connect("missing-reference", _resolve)
    app.connect("env-check-consistency", _check)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
