"""The one error of the command line: something about the input is wrong and the user can mend it."""


class InputError(ValueError):
    """Wrong input: the message is one line that says what was wrong and what to do. The command line exits with 2."""
