"""What ends a command before its end: wrong input, which the user can mend, and a request to stop."""


class InputError(ValueError):
    """Wrong input: the message is one line that says what was wrong and what to do. The command line exits with 2."""


class Terminated(KeyboardInterrupt):
    """SIGTERM: all that tidies up after Ctrl-C does so here too. The command line exits with 143."""
