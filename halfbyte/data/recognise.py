"""Which layout a row has, with the columns that the user named; and the errors that say how to get there."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

from halfbyte.data.examples import Row
from halfbyte.data.formats import FORMATS, ChatFormat, Format
from halfbyte.data.messages import ROLES
from halfbyte.errors import DataError

_SHOWN_COLUMNS, _SHOWN_CHARACTERS = 40, 80
_PAIR_TARGETS = ("prompt", "completion", "input", "text", "system", "tools")
_CHAT_TARGETS = ("messages", "role", "content", "user", "assistant", "tool")
_ASKING = ("prompt", "question", "query", "instruction", "request", "customer", "user", "ticket", "input", "text")
_ANSWERING = (
    "completion",
    "answer",
    "response",
    "reply",
    "output",
    "agent",
    "assistant",
    "solution",
    "target",
    "label",
)


@dataclasses.dataclass(frozen=True)
class Recogniser:
    """Tells the layout of rows, with the user's names of formats and columns.

    Args:
        format_name: A format asked for by name, or None to recognise it.
        columns: What a role in the format is called in this data: {"prompt": "customer_query"}.
    """

    format_name: str | None
    columns: Mapping[str, str]

    def __post_init__(self) -> None:
        known = (*_PAIR_TARGETS, *_CHAT_TARGETS)
        for target in self.columns:
            if target not in known:
                raise DataError(
                    f"columns: {target!r} is no part of a format.{_nearest(target, known)} {_one_of(known)}"
                )
        if self.format_name is not None:
            object.__setattr__(self, "format_name", _known_name(self.format_name))

    def rename(self, row: Row) -> dict[str, Any]:
        """Return the row's fields under the names that formats use.

        Raises:
            DataError: A column that the user named is not in the row.
        """
        fields = {str(name).strip().lower(): value for name, value in row.fields.items()}
        renamed = dict(fields)
        for target, source in self._renamed_columns().items():
            if source.strip().lower() not in fields:
                raise DataError(
                    f"{row.origin}: there is no column {source!r} (named for {target}).{_nearest(source, row.fields)} "
                    f"The columns are: {_columns(row)}"
                )
            renamed[target] = fields[source.strip().lower()]
        return renamed

    def recognise(self, row: Row) -> Format:
        """Return the format of the first row.

        Raises:
            DataError: No format fits, or not the one asked for.
        """
        fields = self.rename(row)
        candidates = [self._with_names(candidate) for candidate in FORMATS]
        if self.format_name is not None:
            wanted = next(candidate for candidate in candidates if candidate.name == self.format_name)
            if wanted.matches(fields):
                return wanted
            raise DataError(
                f"{row.origin}: the format {wanted.name} needs the columns {wanted.summary}; the columns are: "
                f"{_columns(row)}.{_fix(fields)}"
            )
        mapped = set(self._renamed_columns())
        for candidate in candidates:
            if candidate.name != "plain" and candidate.matches(fields) and mapped <= candidate.used_columns(fields):
                return candidate
        raise DataError(_unrecognised(row, fields))

    def check(self, row: Row, fields: dict[str, Any], first: Format) -> None:
        """Check that a further row has the layout of the first.

        Raises:
            DataError: It has not.
        """
        if first.matches(fields):
            return
        others = (other for other in map(self._with_names, FORMATS) if other.name != "plain" and other.matches(fields))
        other = next(others, None)
        looks = f" It looks like {other.name}." if other is not None else ""
        raise DataError(
            f"{row.origin}: does not fit the format of the first row, {first.name} ({first.summary}); its columns are: "
            f"{_columns(row)}.{looks} Keep different formats in different files, or mend "
            "this row."
        )

    def unused_columns(self, row: Row, first: Format) -> list[str]:
        """Return the columns that play no part, for the report."""
        used = first.used_columns(self.rename(row)) | {name.strip().lower() for name in self.columns.values()}
        return [str(name) for name in row.fields if str(name).strip().lower() not in used]

    def _renamed_columns(self) -> dict[str, str]:
        if any(target in _CHAT_TARGETS for target in self.columns):
            return {target: name for target, name in self.columns.items() if target in ("messages", "tools")}
        return dict(self.columns)

    def _with_names(self, candidate: Format) -> Format:
        """Return a chat format that knows the user's names of turns' keys and speakers."""
        if not isinstance(candidate, ChatFormat) or not any(target in _CHAT_TARGETS for target in self.columns):
            return candidate
        layout = candidate.layout
        speakers = {
            name.strip().lower(): role
            for role in ROLES
            for name in self.columns.get(role, "").split("|")
            if name.strip()
        }
        layout = dataclasses.replace(
            layout,
            role_key=self.columns.get("role", layout.role_key),
            content_key=self.columns.get("content", layout.content_key),
            role_names={**layout.role_names, **speakers},
        )
        list_columns = ("messages",) if "messages" in self.columns else candidate.list_columns
        return dataclasses.replace(candidate, layout=layout, list_columns=list_columns)


def _known_name(name: str) -> str:
    names = [known.name for known in FORMATS]
    plain_name = name.strip().lower().replace("/", "_").replace("-", "_").replace(" ", "_")
    if plain_name not in names:
        raise DataError(f"format {name!r} is not known.{_nearest(plain_name, names)} {_one_of(names)}")
    return plain_name


def _unrecognised(row: Row, fields: Mapping[str, Any]) -> str:
    formats = "\n".join(f"  {known.name:<22}{known.summary}" for known in FORMATS)
    return f"{row.origin}: the columns fit no known format: {_columns(row)}.{_fix(fields)}\nKnown formats:\n{formats}"


def _fix(fields: Mapping[str, Any]) -> str:
    """Return the option that most likely helps."""
    for name, value in fields.items():
        if isinstance(value, list) and value and isinstance(value[0], Mapping) and value[0]:
            keys = list(value[0])
            role, content = keys[0], keys[1] if len(keys) > 1 else keys[0]
            return (
                f" If {name:.80} holds the turns of a conversation: "
                f"--data.columns=messages={name:.80},role={role:.80},content={content:.80}"
            )
    names = list(fields)
    prompt = _first_like(names, _ASKING)
    completion = _first_like([name for name in names if name != prompt], _ANSWERING)
    if prompt is None and completion is None:
        prompt, completion = "COLUMN", "COLUMN"
    return (
        f" Say which column is what: --data.columns=prompt={prompt or 'COLUMN':.80},"
        f"completion={completion or 'COLUMN':.80} "
        "(a question and its answer) or --data.columns=text=COLUMN (all of it learned)."
    )


def _columns(row: Row) -> str:
    names = [
        name if len(name) <= _SHOWN_CHARACTERS else name[:_SHOWN_CHARACTERS] + "..." for name in map(str, row.fields)
    ]
    more = f" and {len(names) - _SHOWN_COLUMNS} more" if len(names) > _SHOWN_COLUMNS else ""
    return (", ".join(names[:_SHOWN_COLUMNS]) or "none") + more


def _first_like(names: list[str], words: tuple[str, ...]) -> str | None:
    return next((name for word in words for name in names if word in name), None)


def _nearest(name: str, known: Any) -> str:
    close = get_close_matches(name.lower(), [str(other) for other in known], n=1)
    return f" Did you mean {close[0]!r}?" if close else ""


def _one_of(names: Any) -> str:
    return f"Known: {', '.join(names)}"
