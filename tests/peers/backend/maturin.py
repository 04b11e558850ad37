"""In the place of what builds fast-litellm, which needs a Rust toolchain and its crates even to
tell the metadata that the sdist holds already. pip wants no more before it keeps an sdist."""

from __future__ import annotations

import email
import pathlib


def get_requires_for_build_wheel(config_settings: object = None) -> list[str]:
    return []


def prepare_metadata_for_build_wheel(
    metadata_directory: str, config_settings: object = None
) -> str:
    text = pathlib.Path("PKG-INFO").read_text(encoding="utf-8")
    told = email.message_from_string(text)
    name, version = told["Name"].replace("-", "_"), told["Version"]
    info = pathlib.Path(metadata_directory, f"{name}-{version}.dist-info")
    info.mkdir()
    (info / "METADATA").write_text(text, encoding="utf-8")
    return info.name
