"""Errors that a person can cause, each with a message that says what is wrong, where, and what to do.

Everything else that goes wrong is a defect of ours and keeps its traceback.
"""

import re

# With one slash too: a path that is made of a URL loses the other.
_LOGIN = re.compile(r"(\b[a-z][a-z0-9+.-]+:/{1,2})[^\s/]+@", re.IGNORECASE)


def hide_logins(text: str) -> str:
    """Return text with name and password of every URL (`https://name:password@host`) written as `***`."""
    return _LOGIN.sub(r"\1***@", text)


class HalfbyteError(Exception):
    """Base of all errors whose message is meant for the person running the program.

    Messages end up in terminals, logs and bug reports, so logins in the URLs of a message are hidden.
    """

    exit_code = 2
    """Of the process that it ends."""
    label = "error: "
    """What stands before the message."""

    def __str__(self) -> str:
        return hide_logins(super().__str__())


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
