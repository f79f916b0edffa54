"""The exceptions that a user should see without a traceback."""


class UserError(ValueError):
    """Bad input from outside: a config, a file, a prompt, a size.

    The message names the value, the expectation and the remedy. `main.py` prints it alone and
    exits with code 2; nothing has been lost.
    """


class LostProcess(RuntimeError):
    """Another process of the run is gone or never came; starting all of them again mends it.

    `main.py` prints the message alone and exits with code 75, on which launchers try again.
    """


class Preempted(RuntimeError):
    """The run was told to stop and has saved its state; starting it again continues it.

    `main.py` prints the message alone and exits with code 75, on which launchers try again.
    """
