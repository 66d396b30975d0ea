"""The one exception that means "the input is wrong, here is what to do"."""


class InputError(ValueError):
    """Bad input from a person: a file, a setting, a run directory.

    Its message is one line that says what was found, where, and what to do. The experiments print
    it and exit with code 2; in Python it is an ordinary `ValueError`.
    """
