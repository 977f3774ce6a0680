"""How a driver ends: its exit code, and one line on standard error unless it is done."""

from __future__ import annotations

import sys
from collections.abc import Callable

from actors.cluster import FaultError, explain
from actors.stop_request import StoppedError
from unmask.errors import UserError

DONE, USER_ERROR, FAULT, INTERRUPTED = 0, 2, 3, 130
"""Done; the user can mend it; faults that retries did not mend; stopped by Ctrl-C or SIGTERM."""


def exit_code(work: Callable[[], None], *, stopped: str) -> int:
    """Do the work of a driver; the exit code that tells how it ended.

    Args:
        stopped: what to say of a run that was stopped.
    """
    try:
        work()
    except UserError as error:
        return fail(USER_ERROR, str(error))
    except (FaultError, OSError) as error:
        # An OSError is a disk or store that is full, read-only or gone: what is finished stays, and is resumed from.
        return fail(FAULT, str(error))
    except (KeyboardInterrupt, StoppedError):
        return fail(INTERRUPTED, stopped)
    except Exception as error:
        if not type(error).__module__.startswith("ray."):
            raise
        return fail(FAULT, str(explain(error)))
    return DONE


def fail(code: int, message: str) -> int:
    """Say in one line what was wrong; the code."""
    sys.stderr.write(f"error: {message}\n")
    return code
