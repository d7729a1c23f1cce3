"""The errors that a user can cause and mend. A command prints their text as one line, without a
traceback; anything else that escapes is a bug of ours and keeps its traceback."""


class InputError(ValueError):
    """What was given cannot work: the message says what was given, what is wrong, what to do."""


class RunError(RuntimeError):
    """A run could not go on (diverged, disk full, interrupted): the message says where it stands
    and how to continue."""


class Collapsed(RunError):
    """A run was ended, in good order, because its nets have failed; a command's status is 3."""
