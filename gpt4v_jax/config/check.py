"""What is checked of values a user gave, and the error that says what is wrong with them."""

import difflib
import math


class InputError(Exception):
    """Something the user gave is wrong. The message names the thing, its value and what to do; exit status 2."""


def nearest(name: str, known) -> str:
    """-> " (did you mean 'x'?)" for the known name nearest to `name`, or ""."""
    close = difflib.get_close_matches(name, [str(k) for k in known], n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""


def one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise InputError(f"{name}={value!r} is none of {', '.join(known)}{nearest(value, known)}")


def at_least(low: int, **values: float) -> None:
    for name, value in values.items():
        if not low <= value < math.inf:  # not a number is neither
            raise InputError(f"{name}={value} must be {low} or more{'' if value < low else ', and finite'}")


def shares(**values: float) -> None:
    """Each must lie in [0, 1)."""
    for name, value in values.items():
        if not 0 <= value < 1:
            raise InputError(f"{name}={value} must be 0 or more and less than 1")
