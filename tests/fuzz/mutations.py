"""Damage done to valid files: to their bytes, and to the values of JSON and YAML inside them.

Everything draws from a `random.Random`, which hypothesis can give (and then shrink what it drew), and a loop too.
"""

from __future__ import annotations

import copy
import random
from typing import Any

NUMBERS = (0, -1, 1, 255, 256, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1, 10**30)
VALUES: tuple[Any, ...] = (
    *NUMBERS,
    None,
    True,
    False,
    "",
    "x",
    [],
    {},
    [[]],
    [{}],
    {"": None},
    0.5,
    -0.0,
    1e308,
    float("nan"),
    float("inf"),
    "\x00",
    "\ud800",
    "../../etc/passwd",
    "/etc/passwd",
    "\x1b[2J",
    "{{ 1 }}",
    "[",
    "{",
    "(a+)+$",
    "x" * 5000,
    [2**40, 2**40],
    [-1, 3],
    ["x", None],
    {"x": {"x": {"x": []}}},
)
SNIPPETS = (
    b"\x00",
    b"\xff" * 8,
    b"\x00" * 8,
    b"\xff\xfe",
    b"\xef\xbb\xbf",
    b'"',
    b"{",
    b"}",
    b"[" * 3000,
    b'{"a":' * 3000,
    b"\n",
    b",",
    b":",
    b"NaN",
    b"-Infinity",
    b"1e999",
    b"9" * 5000,
    b"9" * 20,
    b"\\ud800",
    b"&a [*a]",
    b"!!python/object/apply:os.system [ls]",
    b"? ",
    b"- ",
    b"A" * 10000,
)


def damage_bytes(rng: random.Random, content: bytes) -> bytes:
    """Return the content with one to four places flipped, cut, filled, doubled or overwritten."""
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        content = _damage_one_place(rng, content)
    return content


def damage_value(rng: random.Random, tree: Any) -> Any:
    """Return a JSON value of which one to three places are other values, removed, renamed or nested deep."""
    tree = copy.deepcopy(tree)
    for _ in range(rng.choice((1, 1, 2, 3))):
        tree = _damage_one_value(rng, tree)
    return tree


def _damage_one_place(rng: random.Random, content: bytes) -> bytes:
    # Half of the time in the first bytes, where lengths and headers are.
    reach = len(content) if rng.random() < 0.5 else min(len(content), 128)
    at = rng.randint(0, reach)
    kind = rng.randint(0, 5)
    if kind == 0 and at < len(content):
        return content[:at] + bytes([content[at] ^ (1 << rng.randint(0, 7))]) + content[at + 1 :]
    if kind == 1:
        return content[:at]
    if kind == 2:
        return content[:at] + rng.choice(SNIPPETS) + content[at:]
    if kind == 3:
        other = rng.randint(0, len(content))
        return content[:at] + content[other : other + rng.randint(1, 64)] + content[at:]
    if kind == 4:
        number = rng.choice(NUMBERS) & (2**64 - 1)
        width = rng.choice((1, 4, 8))
        return content[:at] + number.to_bytes(8, "little")[:width] + content[at + width :]
    return content[:at] + content[at + rng.randint(1, 64) :]


def _damage_one_value(rng: random.Random, tree: Any) -> Any:
    places = list(_places(tree))
    if not places:
        return rng.choice(VALUES)
    parent, key = rng.choice(places)
    kind = rng.randint(0, 5)
    if kind <= 2:
        parent[key] = copy.deepcopy(rng.choice(VALUES))
    elif kind == 3:
        del parent[key]
    elif kind == 4:
        other_parent, other_key = rng.choice(places)
        parent[key] = copy.deepcopy(other_parent[other_key])
    elif isinstance(parent, dict):
        parent[str(rng.choice(VALUES))] = parent.pop(key)
    else:
        parent.append(copy.deepcopy(parent[key]))
    return tree


def _places(tree: Any) -> Any:
    """Yield every container in a tree with each of its keys."""
    entries = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, inner in list(entries):
        yield tree, key
        yield from _places(inner)
