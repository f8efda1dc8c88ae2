from __future__ import annotations

import pytest

from hymba_tune.formatting import duration, format_bytes, share


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (89, "89 s"), (90, "2 min"), (600, "10 min"), (5400, "1.5 h"), (9000, "2.5 h")]
)
def test_durations_are_in_the_unit_that_keeps_them_short(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0.0 MB"),
        (13 * 2**19, "6.5 MB"),
        (2**27, "0.12 GB"),
        (2**29, "0.50 GB"),
        (2**30, "1.0 GB"),
        (139.5 * 2**30, "139.5 GB"),
    ],
)
def test_bytes_are_in_binary_units_with_two_digits_below_one_gigabyte(count: float, text: str) -> None:
    assert format_bytes(count) == text


@pytest.mark.parametrize(
    ("part", "whole", "text"),
    [
        (0, 7, "0 %"),
        (1, 1000, "< 1 %"),
        (3, 8, "38 %"),
        (999, 1000, "> 99 %"),
        (5, 5, "100 %"),
        (0, 0, "0 %"),
    ],
)
def test_shares_are_never_rounded_to_nothing_or_to_all(part: float, whole: float, text: str) -> None:
    assert share(part, whole) == text
