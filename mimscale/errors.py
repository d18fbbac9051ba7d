"""The exceptions that a user is meant to read. Both carry one line."""


class UserError(ValueError):
    """Bad input from outside. The message is one line: the value, the rule, the fix. The command line exits with 2."""


class Stopped(RuntimeError):
    """A run that ended itself on purpose, for a reason that starting it again would not remove. Exit code 4."""

    code = 4
