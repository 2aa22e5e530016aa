"""What can go wrong in a way that the person at the keyboard can mend."""


class InputError(ValueError):
    """A mistake in what was asked for: a file, a flag, a checkpoint.

    The message is one line: the thing, what is wrong with it, what would be right. The command line prints
    it without a traceback and leaves with status 2.
    """


class Interrupted(Exception):
    """Work was stopped on request and can be taken up again; the message says how."""
