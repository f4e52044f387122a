"""The one exception that a user is meant to read."""


class UserError(Exception):
    """Bad input. Its message is one line that says what is wrong, where, and how to mend it.

    Command lines print it to stderr and exit with status 2.
    """
