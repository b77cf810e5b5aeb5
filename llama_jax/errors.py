"""The one exception that bad input raises."""


class UserError(ValueError):
    """Bad input from the person who runs the program.

    The message is one line which names the thing and the remedy. Experiments print it without a
    traceback and exit with status 2; library callers may catch it as a ValueError.
    """
