"""Write docs/options.md: every option of run.yaml, from the config's own docs.

    python -m tools.options_page

The help of the commands and the JSON schema are made from the same list, so the page says what they say.
"""

from __future__ import annotations

from pathlib import Path

from halfbyte.config.describe import Option, list_options, sections

PAGE = Path(__file__).parent.parent / "docs" / "options.md"
INTRODUCTION = """# Options

Made by `python -m tools.options_page` from the docs in `halfbyte/config`; do not edit it by hand.

An option is written in three ways, and means the same in each:

- on the command line, `--lora.rank=32`; `halfbyte COMMAND --help` lists the options of a command;
- in a YAML file, under its section, which `halfbyte train run.yaml` reads ([the schema](../schema/run.schema.json)
  completes and checks it in an editor);
- in Python, `LoraSection(rank=32)`.

A value on the command line wins over the file, the file over the default. A name that does not exist is an error that
names the nearest one. `none` means that there is no value.
"""


def render_page() -> str:
    """Return the page."""
    parts = [INTRODUCTION]
    for name in (*sections(), ""):
        title = sections()[name].__doc__ if name else "The run"
        heading = f"## {name}: {title[0].lower()}{title[1:]}" if name else "## The run itself"
        parts.append(f"\n{heading}\n\n| option | values | default | what it does |\n|---|---|---|---|\n")
        parts += [_row(option) for option in list_options() if option.section == name]
    return "".join(parts)


def _row(option: Option) -> str:
    also = f" Also called {', '.join(f'`{alias}`' for alias in option.aliases)}." if option.aliases else ""
    cells = (f"`{option.full_name}`", option.allowed, f"`{option.default_text}`", f"{option.doc}{also}")
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |\n"


if __name__ == "__main__":
    PAGE.write_text(render_page(), encoding="utf-8")
