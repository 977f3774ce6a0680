"""Serve a target, and its draft if there is one: `python -m pipelines.serve recipe.yaml serve.draft=DIRECTORY`."""

from __future__ import annotations

import sys

from serve_app.__main__ import main

if __name__ == "__main__":
    sys.exit(main())
