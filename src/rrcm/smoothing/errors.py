"""The one exception of this subpackage."""


class SmoothingError(ValueError):
    """A mistake a user can mend, told in one line.

    It says what was wrong, where, and what would be right.
    """
