"""Errors that the user can fix, and the wrapper of all entry points."""

import errno
import os
import re
import signal
import sys

UNWRITABLE = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENOTDIR, errno.EISDIR}
UNWRITABLE |= {errno.EEXIST, errno.ENAMETOOLONG}


class UserError(Exception):
    """An error that the user can fix. `run_main` prints it without a traceback and exits with code 1."""


def printable(text):
    """`text` with control, formatting and other unprintable characters escaped, except line breaks and tabs, so that a
    terminal shows them and does not obey them."""
    return "".join(
        c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape", "surrogatepass").decode() for c in text
    )


def listing(first, total):
    """The lines `first`, indented, one below the other, and how many of the `total` are left out."""
    more = [f"... and {total - len(first)} more"] if total > len(first) else []
    return "\n".join(f"  {line}" for line in [*first, *more])


def _safetensors_errors():
    return (sys.modules["safetensors"].SafetensorError,) if "safetensors" in sys.modules else ()


def _unwritable(error):
    """'FILE: REASON' for a failed write, also if torch or safetensors wrap the OSError; None for other errors."""
    cause = error if isinstance(error, OSError) else error.__context__
    hidden = re.search(r"\(os error (\d+)\)", str(error))
    number = cause.errno if isinstance(cause, OSError) else int(hidden[1]) if hidden else None
    if "No usable temporary directory" in str(error):
        return "TMPDIR: no folder for temporary files is writable"
    if number not in UNWRITABLE:
        return None
    return f"{getattr(cause, 'filename', None) or 'an output'}: {os.strerror(number)}"


def run_main(main):
    """Calls `main()` and exits: 0 (or its return value), 1 with a message on stderr for a UserError, 130 on Ctrl-C."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        code = main()
    except UserError as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        code = 1
    except (OSError, RuntimeError, *_safetensors_errors()) as error:
        problem = _unwritable(error)
        if problem is None:
            raise
        print(
            f"error: {printable(problem)}. Check its permissions, the free disk space and the free inodes.",
            file=sys.stderr,
        )
        code = 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    sys.exit(code)
