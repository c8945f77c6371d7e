"""The docstrings of nbbn as reStructuredText.

They are plain text with a few forms: paragraphs, indented formulas, `code`, doctests, and the sections Args, Returns,
Raises and Source, whose text may begin on the same line. Everything else is escaped, so no docstring can break a page.
"""

import inspect
import re
from collections.abc import Iterator
from typing import Any

SECTION = re.compile(r"(Args|Returns|Raises|Source):(?: +(.*))?$")
LABELS = {"Args": "Arguments"}
INDENT = " " * 4


def setup(app: Any) -> dict[str, bool]:
    app.connect("autodoc-process-docstring", convert)
    return {"parallel_read_safe": True}


def convert(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    lines[:] = rst(lines, parameters(obj))


def parameters(obj: Any) -> list[str]:
    try:
        return list(inspect.signature(obj).parameters)
    except (TypeError, ValueError):  # not callable, or written in C
        return []


def rst(lines: list[str], names: list[str]) -> list[str]:
    found: list[str] = []
    rest = list(lines)
    while rest:
        section = SECTION.match(rest[0])
        if section is None:
            count = next((i for i, line in enumerate(rest) if SECTION.match(line)), len(rest))
            found += text(rest[:count])
        else:
            count = next((i for i, line in enumerate(rest[1:], 1) if line and not line.startswith(" ")), len(rest))
            body = inspect.cleandoc("\n".join(rest[1:count])).splitlines()
            first = [section[2]] if section[2] else []
            inner = entries(first + body, names) if section[1] == "Args" else text(first + body)
            found += ["", f":{LABELS.get(section[1], section[1])}:", *indented(inner), ""]
        del rest[:count]
    return found


def entries(lines: list[str], names: list[str]) -> list[str]:
    """The arguments, one definition for each `name: text`, `name, name: text` or `name to name: text`.

    What is said of the others is a paragraph behind them.
    """
    name = rf"\*{{0,2}}(?:{'|'.join(map(re.escape, names))})" if names else r"\w+"
    start = re.compile(rf"(?:^|(?<=\. ))({name}(?:(?:,| to) {name})*): ")
    term, body = "", []
    found: list[str] = []

    def close() -> None:
        definition = text(body)
        found.extend(["", term, *indented(definition[1:])] if term else definition)

    for line in lines:
        before, *pairs = start.split(line)
        if line.startswith(("Others", "The others")):
            close()
            term, body = "", []
        body.append(before)
        for names_there, rest in zip(pairs[::2], pairs[1::2], strict=True):
            close()
            term, body = re.sub(r"(?<!\S)(?!to )[\w*]+", r"``\g<0>``", names_there), [rest]
    close()
    return found


def text(lines: list[str]) -> list[str]:
    """Paragraphs, each after an empty line; an indented one is shown as it is, and so is a doctest."""
    found: list[str] = []
    for block in blocks(lines):
        if block[0].startswith(">>>"):
            found += ["", *block]
        elif block[0].startswith(" "):
            found += ["", "::", "", *block]
        else:
            found += ["", escaped(" ".join(line.strip() for line in block))]
    return found


def blocks(lines: list[str]) -> Iterator[list[str]]:
    block: list[str] = []
    for line in [*lines, ""]:
        if line.strip():
            block.append(line)
        elif block:
            yield block
            block = []


def escaped(paragraph: str) -> str:
    parts = re.split("`([^`]+)`", paragraph)
    parts[::2] = [re.sub(r"([\\*|_`:<>-])", r"\\\1", part) for part in parts[::2]]
    parts[1::2] = [f"``{part}``" for part in parts[1::2]]
    return "".join(parts)


def indented(lines: list[str]) -> list[str]:
    return [INDENT + line if line else line for line in lines]
