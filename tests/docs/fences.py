"""Code blocks of the pages in docs/, and what their first lines say about them.

```bash                             commands, run one after the other
```python                           run; a page's blocks share their names
```csv file: tickets.csv            written to that file, for the blocks below it
```yaml file: run.yaml              the same, and read as a run's options
```bash not run: needs Ollama       read only: commands of ours by their parsers, Python and YAML by theirs
```text                             what something prints
"""

from __future__ import annotations

import dataclasses
import re
import shlex
from pathlib import Path

FENCE = re.compile(r"^```(?P<language>\w+)(?: (?P<key>file|not run): (?P<value>.+))?$")
LANGUAGES = {"bash", "python", "yaml", "csv", "text"}
INLINE = re.compile(r"`(halfbyte [a-z][^`]*)`")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fence:
    """One code block."""

    where: str
    """Page and line, for messages."""
    language: str
    file: str | None
    """The file that it is written to."""
    not_run: str | None
    """Why it is only read."""
    text: str


def read_fences(page: Path) -> list[Fence]:
    """Return the blocks of a page in order.

    Raises:
        ValueError: A first line is not of the forms above, or a block has no end.
    """
    fences, lines = [], page.read_text(encoding="utf-8").splitlines()
    numbers = iter(range(len(lines)))
    for start in numbers:
        if not lines[start].startswith("```"):
            continue
        where = f"{page.name}:{start + 1}"
        match = FENCE.match(lines[start])
        if match is None or match["language"] not in LANGUAGES:
            raise ValueError(f"{where}: {lines[start]!r} is no first line of a block, see tests/docs/fences.py")
        body = []
        for number in numbers:
            if lines[number] == "```":
                break
            body.append(lines[number])
        else:
            raise ValueError(f"{where}: the block has no end")
        named = {match["key"]: match["value"]}
        text = "\n".join(body) + "\n"
        fences.append(
            Fence(
                where=where,
                language=match["language"],
                file=named.get("file"),
                not_run=named.get("not run"),
                text=text,
            )
        )
    return fences


def commands_of(text: str) -> list[list[str]]:
    """Return the commands of a bash block as words: a line each, or several that end in a backslash."""
    joined = text.replace("\\\n", " ")
    split = (shlex.split(line, comments=True) for line in joined.splitlines())
    return [words for words in split if words]


def inline_commands(page: Path) -> list[list[str]]:
    """Return the commands of ours that stand within sentences and tables."""
    outside = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    return [shlex.split(" ".join(match.split())) for match in INLINE.findall(outside)]
