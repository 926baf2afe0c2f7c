"""Functions that several test files call; fixtures are in conftest.py."""

import pkgutil

import pytest

# So that an assertion that fails in here shows its values, as one in a test does.
pytest.register_assert_rewrite(*(f"{__name__}.{module.name}" for module in pkgutil.iter_modules(__path__)))
