"""Errors that a user can correct, and the wrapper that every entry point runs in."""

import errno
import os
import re
import signal
import sys

UNWRITABLE = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENOTDIR, errno.EISDIR}
UNWRITABLE |= {errno.EEXIST, errno.ENAMETOOLONG}


class UserError(Exception):
    """Something that the user can correct: shown as one paragraph without a traceback, exit code 1."""


def _safetensors_errors():
    return (sys.modules["safetensors"].SafetensorError,) if "safetensors" in sys.modules else ()


def _unwritable(error):
    """'FILE: REASON' if the disk refused what was written, also where torch or safetensors hide it, else None."""
    cause = error if isinstance(error, OSError) else error.__context__
    hidden = re.search(r"\(os error (\d+)\)", str(error))
    number = cause.errno if isinstance(cause, OSError) else int(hidden[1]) if hidden else None
    if number not in UNWRITABLE:
        return None
    return f"{getattr(cause, 'filename', None) or 'an output'}: {os.strerror(number)}"


def run_main(main):
    """Calls `main()` and exits: 0, or 1 with one paragraph on stderr for a UserError, or 130 when interrupted."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        code = main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        code = 1
    except (OSError, RuntimeError, *_safetensors_errors()) as error:
        problem = _unwritable(error)
        if problem is None:
            raise
        print(f"error: {problem}. Check that it can be written and that the disk is not full.", file=sys.stderr)
        code = 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    sys.exit(code)
