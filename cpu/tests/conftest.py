"""Fixtures of the whole suite that the CPU backend's own tests use."""

from base.backends.cpu.tests import native  # noqa: F401  the first of all

from tests.conftest import golden  # noqa: F401
