"""Text and tables of Markdown files that people or the Hub read: the report and the model cards."""

import re

SPECIAL = re.compile(r"([\\`*_{}\[\]<>|#~$])")


def escaped(text: object) -> str:
    """Text escaped for Markdown and HTML, on one line."""
    return SPECIAL.sub(r"\\\1", " ".join(str(text).split())).replace("&", "&amp;")


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table of escaped cells."""
    lines = [header, ["-"] * len(header), *[[escaped(cell) for cell in row] for row in rows]]
    return "\n".join(f"|{'|'.join(line)}|" for line in lines)
