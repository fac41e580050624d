"""Every member of `Backend` says whether it is required, and the portable base class agrees."""

from __future__ import annotations

import pytest

from ci.reference import backend_members
from portalm.backend import API_VERSION, Backend
from portalm_backends.portable.backend import TorchBackend

MEMBERS = {member["name"]: member for member in backend_members()}
REQUIRED = {name for name, member in MEMBERS.items() if member["default"] == "required"}


def test_all_members_are_listed() -> None:
    public = {name for name in {*vars(Backend), *Backend.__annotations__} if name[0] != "_"}

    assert MEMBERS.keys() == public


@pytest.mark.parametrize("name", MEMBERS)
def test_a_member_says_whether_it_is_required(name: str) -> None:
    assert MEMBERS[name]["default"], (
        f"{name}: end its docstring with 'Required.' or 'Optional: ...'"
    )
    assert MEMBERS[name]["text"]


def test_required_members_are_those_that_the_base_class_leaves_out() -> None:
    checked = {"_kv_alloc": "kv_alloc"}  # the base class checks, then calls the one with _
    missing = {checked.get(name, name) for name in TorchBackend.__abstractmethods__}

    assert REQUIRED - {"name", "capabilities"} == missing


@pytest.mark.parametrize("name", sorted(MEMBERS.keys() - REQUIRED))
def test_the_base_class_has_every_optional_member(name: str) -> None:
    assert hasattr(TorchBackend, name)


def test_the_base_class_has_the_current_version() -> None:
    assert TorchBackend.api_version == API_VERSION
