"""Serve a target, with its draft if `serve.draft` names one: `python -m pipelines.serve recipe.yaml serve.draft=DIR`."""

from __future__ import annotations

import sys

from serve_app.__main__ import main

if __name__ == "__main__":
    sys.exit(main())
