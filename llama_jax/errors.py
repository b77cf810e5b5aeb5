"""The one exception that bad input raises, and the one of a run that was asked to stop."""


class UserError(ValueError):
    """Bad input from the person who runs the program.

    The message is one line which names the thing and the remedy. Experiments print it without a
    traceback and exit with status 2; library callers may catch it as a ValueError.
    """


class DivergedError(UserError):
    """A run whose loss or gradient was not finite for too many steps in a row."""


class Stopped(BaseException):  # noqa: N818  not an error: the run did as it was told
    """The run was asked to stop by a signal, and nothing that it trained is lost.

    Like KeyboardInterrupt it may be raised anywhere, and no `except Exception` holds it up.
    """

    def __init__(self, message: str, *, exit_code: int):
        super().__init__(message)
        self.exit_code = exit_code
