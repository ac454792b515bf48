"""One way of telling a user that a name is unknown."""

import difflib
from collections.abc import Iterable

from rrcm.errors import UserError


def unknown_name(what: str, name: str, known: Iterable[str]) -> UserError:
    """Return (not raise) the error for a name outside `known`, led by the nearest known one."""
    known = sorted(known)
    near = difflib.get_close_matches(name.lower(), known, n=1)
    guess = f"did you mean {near[0]!r}? " if near else ""
    return UserError(f"unknown {what} {name!r}: {guess}known: {', '.join(known)}")
