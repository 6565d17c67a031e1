"""Numbers as text: the unit changes where the digits would."""

from __future__ import annotations

import pytest

from compress_tool.units import bytes_text, clock_text, params_text, percent_text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1000, "1.0 kB"),
        (20_760_136, "20.8 MB"),
        (999_949_999, "999.9 MB"),
        (999_950_000, "1.0 GB"),
        (93_400_000_000_000_000, "93400.0 TB"),
    ],
)
def test_bytes_text(value: int, text: str) -> None:
    assert bytes_text(value) == text


@pytest.mark.parametrize(
    ("value", "text"), [(12, "12"), (10_368_128, "10.4 M"), (46_702_792_704, "46.7 B")]
)
def test_params_text(value: int, text: str) -> None:
    assert params_text(value) == text


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0:00"), (75.2, "1:15"), (3675, "1:01:15")])
def test_clock_text(seconds: float, text: str) -> None:
    assert clock_text(seconds) == text


@pytest.mark.parametrize(("change", "text"), [(-0.4021, "−40.2 %"), (0.05, "+5.0 %")])
def test_percent_text(change: float, text: str) -> None:
    assert percent_text(change) == text
