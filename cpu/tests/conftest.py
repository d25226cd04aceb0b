"""Fixtures of the whole suite that the CPU backend's own tests use."""

from tests.conftest import golden  # noqa: F401
