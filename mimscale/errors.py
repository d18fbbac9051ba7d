"""The one exception that a user is meant to read."""


class UserError(ValueError):
    """Bad input from outside. The message is one line: the value, the rule, the fix. The command line exits with 2."""
