"""Settings come from the environment when they are needed, and a broken one is named."""

from __future__ import annotations

import os
import stat

import pytest

from fast_litellm_shm import Segment, SegmentCapacityError
from fast_litellm_shm._shared import settings


def test_name(monkeypatch: pytest.MonkeyPatch, segment_name: str) -> None:
    monkeypatch.setenv("FAST_LITELLM_SHM_NAME", segment_name)
    assert Segment().name == segment_name
    assert Segment.default().name == segment_name


def test_name_by_user_where_it_is_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FAST_LITELLM_SHM_NAME")
    assert settings.segment_name() == f"uid{os.geteuid()}"
    monkeypatch.setenv("FAST_LITELLM_SHM_NAME", "")
    assert settings.segment_name() == f"uid{os.geteuid()}"


@pytest.mark.parametrize("bad", ["a/b", ".hidden", "x" * 65, "naïve", "a b"])
def test_a_bad_name_is_shown(monkeypatch: pytest.MonkeyPatch, bad: str) -> None:
    monkeypatch.setenv("FAST_LITELLM_SHM_NAME", bad)
    with pytest.raises(ValueError) as caught:
        Segment()
    assert repr(bad) in str(caught.value)
    assert "A-Z a-z 0-9 . _ -" in str(caught.value)


def test_capacity(monkeypatch: pytest.MonkeyPatch, segment_name: str) -> None:
    monkeypatch.setenv("FAST_LITELLM_SHM_CAPACITY", "123")
    assert Segment(segment_name).stats()["capacity"] == 123
    monkeypatch.setenv("FAST_LITELLM_SHM_CAPACITY", "124")
    with pytest.raises(SegmentCapacityError):
        Segment(segment_name)
    assert Segment(segment_name, capacity=123).stats()["capacity"] == 123


@pytest.mark.parametrize("bad", ["many", "1e5", "0", "-5", str(2**31 + 1)])
def test_bad_capacity(monkeypatch: pytest.MonkeyPatch, segment_name: str, bad: str) -> None:
    monkeypatch.setenv("FAST_LITELLM_SHM_CAPACITY", bad)
    with pytest.raises(ValueError, match="(?i)capacity must be") as caught:
        Segment(segment_name)
    assert bad in str(caught.value)


@pytest.mark.parametrize(("text", "mode"), [("0640", 0o640), ("660", 0o660), ("0o600", 0o600)])
def test_mode(monkeypatch: pytest.MonkeyPatch, segment_name: str, text: str, mode: int) -> None:
    monkeypatch.setenv("FAST_LITELLM_SHM_MODE", text)
    before = os.umask(0o077)
    try:
        segment = Segment(segment_name)
    finally:
        os.umask(before)
    assert stat.S_IMODE(os.stat(segment.path).st_mode) == mode


def test_mode_by_default(segment_name: str) -> None:
    assert stat.S_IMODE(os.stat(Segment(segment_name).path).st_mode) == 0o600


@pytest.mark.parametrize("bad", ["rw", "0400", "0999", "01777", "-600"])
def test_bad_mode(monkeypatch: pytest.MonkeyPatch, segment_name: str, bad: str) -> None:
    monkeypatch.setenv("FAST_LITELLM_SHM_MODE", bad)
    with pytest.raises(ValueError) as caught:
        Segment(segment_name)
    assert "FAST_LITELLM_SHM_MODE must be octal" in str(caught.value)
    assert repr(bad) in str(caught.value)


def test_a_mode_that_lets_all_users_write(
    monkeypatch: pytest.MonkeyPatch, segment_name: str
) -> None:
    monkeypatch.setenv("FAST_LITELLM_SHM_MODE", "0666")
    with pytest.raises(ValueError, match="FAST_LITELLM_SHM_MODE must not let all users write"):
        Segment(segment_name)


def test_bad_allow_other_owner(monkeypatch: pytest.MonkeyPatch, segment_name: str) -> None:
    monkeypatch.setenv("FAST_LITELLM_SHM_ALLOW_OTHER_OWNER", "yes")
    with pytest.raises(ValueError, match="ALLOW_OTHER_OWNER must be true or false, not 'yes'"):
        Segment(segment_name)


@pytest.mark.parametrize("names", ["plain", "hashed", "off"])
def test_names(monkeypatch: pytest.MonkeyPatch, segment_name: str, names: str) -> None:
    monkeypatch.setenv("FAST_LITELLM_SHM_NAMES", names)
    assert Segment(segment_name).stats()["names"] == names


def test_bad_names(monkeypatch: pytest.MonkeyPatch, segment_name: str) -> None:
    monkeypatch.setenv("FAST_LITELLM_SHM_NAMES", "secret")
    with pytest.raises(ValueError, match="'plain', 'hashed' or 'off', not 'secret'"):
        Segment(segment_name)
