"""The one exception that a user should ever see without a traceback."""


class UserError(ValueError):
    """Bad input from outside: a config, a file, a prompt, a size.

    The message names the value, the expectation and the remedy. `main.py` prints it alone and
    exits with code 2; nothing has been lost.
    """
