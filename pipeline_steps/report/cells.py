"""Table cells of optional numbers and signed differences."""

from pipeline_steps.report.controls import points
from pipeline_steps.report.tables import MISSING, number


def optional(value, digits=3, interval=None):
    """A number or None as a cell."""
    return MISSING if value is None else number(value, digits, interval)


def signed_value(value):
    """A value of any size as a cell, with three significant digits."""
    return MISSING if value is None else (f"{value:.3g}".replace("-", "−"), value)


def signed(value, digits, interval=None):
    """A difference as a cell."""

    def written(number):
        text = f"{number:+.{digits}f}"
        return text.replace("-", "−") if float(text) else text[1:]  # zero has no sign

    text = written(value)
    return (f"{text} [{written(interval[0])} to {written(interval[1])}]" if interval else text, value)


def difference(value, interval=None):
    """A difference of shares as a cell, in points."""
    text, number_of_points = points(value)
    if interval is None:
        return (text, number_of_points)
    return (f"{text} [{points(interval[0])[0]} to {points(interval[1])[0]}]", number_of_points)
