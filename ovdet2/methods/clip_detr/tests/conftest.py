"""The settings of hypothesis that tests/ has, and quick processes."""

from tests.conftest import quick_launch  # noqa: F401
