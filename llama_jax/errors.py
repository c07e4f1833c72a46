"""The one exception for what a user can mend."""


class InputError(ValueError):
    """Something given to the program is wrong: its message is one sentence for the user.

    The message says what is wrong, where, and what to do. The command line prints it without a
    traceback and exits with code 2.
    """
