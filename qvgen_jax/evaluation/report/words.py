"""Numbers as the report writes them."""

import math
from collections.abc import Sequence


def missing(what: str) -> str:
    """The paragraph that stands for an input that is not there; `what` is HTML."""
    return f'<p class="missing">{what}</p>'


def whole(value: float) -> str:
    """12345 -> 12 345, with a thin space that does not break."""
    return f"{value:,.0f}".replace(",", "\u202f")


def megabytes(size: float) -> str:
    """Bytes in units of 10^6."""
    mb = size / 1e6
    return f"{whole(mb) if mb >= 1000 else f'{mb:.1f}' if mb >= 10 else f'{mb:.2f}'} MB"


def percent_range(interval: Sequence[float]) -> str:
    return f"{100 * interval[0]:.0f}–{100 * interval[1]:.0f} %"


def points(fraction: float) -> str:
    """A signed difference of shares in percentage points, with a true minus sign."""
    return signed(100 * fraction, 1)


def signed(value: float, digits: int) -> str:
    """+0.5, −0.5, and 0.0 without a sign; a dash for what was not measured."""
    if not math.isfinite(value):
        return "–"
    text = f"{value:+.{digits}f}".replace("-", "−")
    return text[1:] if set(text[1:]) <= set("0.") else text


def number(value: float | None, digits: int = 2) -> str:
    """With a true minus sign; a dash for what was not measured."""
    if value is None or not math.isfinite(value):
        return "–"
    return f"{value:.{digits}f}".replace("-", "−")


def significant(value: float | None) -> str:
    """Three digits that count, 0.0120 or 1.20·10⁻⁵; a dash for what was not measured."""
    if value is None or not math.isfinite(value):
        return "–"
    mantissa, _, exponent = f"{value:#.3g}".partition("e")
    mantissa = mantissa.rstrip(".").replace("-", "−")
    if not exponent:
        return mantissa
    return f"{mantissa}·{power_of_ten(int(exponent))}"


def power_of_ten(exponent: int) -> str:
    """-5 -> 10⁻⁵."""
    return "10" + str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
