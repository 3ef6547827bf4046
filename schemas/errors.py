"""The one exception a user is meant to read."""


class UserError(Exception):
    """A mistake the user can mend: one sentence with what is wrong, where, and what to do.

    The command line prints the sentence alone and exits with status 2.
    """
