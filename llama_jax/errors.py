"""Errors that are told in one sentence: a bad input, and a system that can't write."""


class InputError(ValueError):
    """Something given to the program is wrong: its message is one sentence for the user.

    The message says what is wrong, where, and what to do. The command line prints it without a
    traceback and exits with code 2.
    """


class WriteError(OSError):
    """The system can't write a file or a folder: its message is one sentence for the user.

    That is a fault, not a bad input: the message holds the system's own text. The command line
    prints it without a traceback and exits with code 1.
    """
