"""Assertions of the shared suite explain themselves like those of any test module."""

import pytest

pytest.register_assert_rewrite("tests.contract.suite")
