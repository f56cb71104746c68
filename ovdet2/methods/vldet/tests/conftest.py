"""The settings of hypothesis that tests/ has."""

import tests.conftest  # noqa: F401
