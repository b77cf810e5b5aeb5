"""The fixture of engines, for all files here."""

from tests.engine.asking import engine  # noqa: F401
