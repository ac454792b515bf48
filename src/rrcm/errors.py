"""The one exception for mistakes a user can mend."""


class UserError(ValueError):
    """A mistake of the user's, told in one line: what was wrong, where, and what would be right.

    The command line prints the line and exits with 2; a library caller catches it as ValueError.
    """
