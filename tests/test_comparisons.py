"""Test which tests are taken to compare values up to rounding."""

from __future__ import annotations

import pytest
from comparisons import compares_values
from tolerance import near


def helper() -> None:
    assert near(1.0) == 1.0


def recursive(depth: int) -> None:
    if depth:
        recursive(depth - 1)


def uses_a_tolerance() -> None:
    assert [near(1.0)] == [1.0]


def uses_a_comparison_of_a_library() -> None:
    assert pytest.approx(1.0) == 1.0


def uses_a_helper_in_a_nested_function() -> None:
    def nested() -> None:
        helper()

    nested()


def is_exact() -> None:
    recursive(2)
    assert sum([1.0]) == 1.0


def test_tests_that_compare_up_to_rounding_are_found():
    found = [uses_a_tolerance, uses_a_comparison_of_a_library, uses_a_helper_in_a_nested_function]
    assert [compares_values(function) for function in (*found, is_exact)] == [True, True, True, False]


def test_numeric_test_is_marked(request):
    assert near(1.0) == 1.0
    assert request.node.get_closest_marker("numbers")


def test_exact_test_is_not_marked(request):
    assert request.node.get_closest_marker("numbers") is None
