"""The error that means: the input is at fault, and this one line says how to mend it."""


class UserError(ValueError):
    """Bad input from a user (a file, an option, a model). One line: what, where, what to do. Exit code 2 in the CLI."""
