"""`python -m serve_app.swap DIRECTORY`: make a published draft live in the service that runs on this cluster.

Who may join the cluster may do this; it has no HTTP route. The cluster is found as by `ray status` (`RAY_ADDRESS`).
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

from actors.cluster import FaultError, connect
from unmask.errors import UserError


def main(argv: list[str] | None = None) -> int:
    """Run the command line; answers the exit code: 0 live, 2 the user can mend it, 3 refused or not taken in time."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    parser = argparse.ArgumentParser(prog="python -m serve_app.swap", description=__doc__, allow_abbrev=False)
    parser.add_argument("draft", type=Path, help="published draft directory, on storage that the draft replicas share")
    parser.add_argument("--timeout-s", type=float, default=120.0)
    arguments = parser.parse_args(argv)
    try:
        swap(arguments.draft, arguments.timeout_s)
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    except FaultError as error:
        sys.stderr.write(f"error: {error}\n")
        return 3
    sys.stdout.write(f"'{arguments.draft}' is live\n")
    return 0


def swap(draft: Path, timeout_s: float) -> None:
    """See `ServeHandle.swap_draft`. Raises UserError also where no service runs."""
    connect(num_cpus=0)
    from ray import serve
    from ray.serve.exceptions import RayServeException

    from serve_app.handle import ServeHandle
    from serve_app.settings import APPLICATION

    try:
        ingress = serve.get_app_handle(APPLICATION)
    except RayServeException:
        raise UserError("no service runs on this cluster; start one with `unmask serve`") from None
    ServeHandle(url="", ingress=ingress).swap_draft(draft, timeout_s)


if __name__ == "__main__":
    sys.exit(main())
