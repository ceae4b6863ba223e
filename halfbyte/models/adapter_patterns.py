r"""Regular expressions that come with an adapter: refused where they are none, or could take forever.

A person who downloads an adapter runs its patterns. Python's matcher tries every way of dividing the text between
repeats, which is exponential in two cases, both easy to see in the pattern: a repeat of a group that itself repeats,
`(a+)+`, or that has alternatives, `(a|a)*`. A row of repeats, `.*.*.*`, is a polynomial of that degree. Patterns
that name layers need none of this: `model\.layers\.\d+\.(self_attn|mlp)\.(q|up)_proj`, `.*\.(0|1)\.(.*_proj)`.
"""

from __future__ import annotations

import re

from halfbyte.errors import FormatError

MAX_CHARACTERS = 2000
MAX_OPEN_REPEATS = 6
# An escaped character, a class of characters, the head of a group, its end, a repeat, or anything else.
_PART = re.compile(
    r"\\.|(?P<cls>\[\^?\]?(?:\\.|[^\]\\])*\])|(?P<open>\((?:\?(?:[:=!>]|<[=!]|P<\w+>|[a-zA-Z-]+:))?)|(?P<close>\))"
    r"|(?P<repeat>[*+]|\{\d*,?\d*\})|(?P<bar>\|)|.",
    re.DOTALL,
)


def check_pattern(pattern: str, *, where: str) -> None:
    """Raise a FormatError, beginning with `where`, for a pattern that is not to be run."""
    if len(pattern) > MAX_CHARACTERS:
        raise FormatError(f"{where} is a pattern of {len(pattern)} characters; at most {MAX_CHARACTERS} are read")
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise FormatError(f"{where} is {pattern!r}, no regular expression: {error}") from error
    if _may_take_forever(pattern):
        raise FormatError(
            f"{where} is {pattern!r}, which could take forever to match: it repeats what repeats or has alternatives, "
            f"or has more than {MAX_OPEN_REPEATS} repeats. Write the names of the layers instead"
        )


def _may_take_forever(pattern: str) -> bool:
    # For each open group, whether repeating it would be dangerous; the outermost is never repeated.
    dangerous, num_repeats, closed = [False], 0, False
    for part in _PART.finditer(pattern):
        kind = part.lastgroup
        if kind == "repeat" and part[0] not in ("{1}", "{0,1}"):
            if closed:
                return True
            num_repeats += 1
            dangerous[-1] = True
        elif kind == "bar":
            dangerous[-1] = True
        elif kind == "open":
            dangerous.append(False)
        closed = False
        if kind == "close" and len(dangerous) > 1:
            closed = dangerous.pop()
            dangerous[-1] = dangerous[-1] or closed
    return num_repeats > MAX_OPEN_REPEATS
