"""Errors that a person can cause, each with a message that says what is wrong, where, and what to do.

Everything else that goes wrong is a defect of ours and keeps its traceback.
"""


class HalfbyteError(Exception):
    """Base of all errors whose message is meant for the person running the program."""

    exit_code = 2
    """Of the process that it ends."""
    label = "error: "
    """What stands before the message."""


class ConfigError(HalfbyteError):
    """An option, or a combination of options, that cannot be honoured."""


class DataError(HalfbyteError):
    """Training or evaluation data that cannot be read, recognised or masked."""


class FormatError(HalfbyteError):
    """A model or adapter file that is damaged, unsafe or of an unknown layout."""


class OutputError(HalfbyteError):
    """Results that cannot be written."""


class PlanError(HalfbyteError):
    """A run that does not fit the memory it was given."""


class BackendError(HalfbyteError):
    """A device or kernel that was asked for and is not available."""
