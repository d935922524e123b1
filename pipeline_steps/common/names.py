"""Names that come from data (sources and tasks) end in tables, figures and terminals.

The sources stage refuses names that any of these would interpret. No name becomes a file name: files are named by keys
(`schemas.slug`).
"""

import unicodedata

from pipeline_steps.common.errors import UserError, printable

NEW = "_new"  # ending of the names of tasks whose answers are names that are held out of training
MAX_LENGTH = 100  # characters of a name
MARKUP = '<>|`*$\\[]{}~^"#'  # HTML, Markdown, mathtext and shell patterns


def check_name(kind: str, name: str, where: str) -> None:
    """UserError, which begins with `where`, for a name that is empty, too long or has characters with a meaning
    elsewhere: control and formatting characters, line breaks, and MARKUP. kind: what it names, for the message."""
    if not name.strip() or name != name.strip():
        raise UserError(f"{where}: the {kind} {printable(name)!r} is blank or begins or ends with a space. Rename it.")
    if len(name) > MAX_LENGTH:
        raise UserError(
            f"{where}: the {kind} {printable(name[:40])!r}... has {len(name):,} characters, at most {MAX_LENGTH} are "
            "possible. Shorten it."
        )
    wrong = sorted({c for c in name if c in MARKUP or unicodedata.category(c)[0] == "C" or c in "\u2028\u2029"})
    if wrong:
        listing = ", ".join(repr(printable(c))[1:-1] for c in wrong)
        raise UserError(
            f"{where}: the {kind} {printable(name)!r} contains {listing}. Use letters, digits, spaces and other "
            f"punctuation: control characters and {' '.join(MARKUP)} have a meaning in files, tables or figures."
        )


def without_math(text: str) -> str:
    """Text for matplotlib, which would typeset what is between two dollar signs."""
    return text.replace("$", r"\$")
