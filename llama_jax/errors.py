"""The exceptions whose message is all that a user needs."""


class InputError(ValueError):
    """Something given to the program is wrong: its message is one sentence for the user.

    The message says what is wrong, where, and what to do. The command line prints it without a
    traceback and exits with code 2.
    """


class Fault(RuntimeError):
    """The machine has failed, not what it was given: a full disk, a permission, memory, a network.

    The message is one sentence that holds the system's own words. It never says that a file is
    damaged, and never advises to remove one. The command line prints it without a traceback and
    exits with code 1.
    """
