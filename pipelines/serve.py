"""Serve a target, with a draft if there is one, or a diffusion LM, or both:

python -m pipelines.serve recipe.yaml serve.draft=DIRECTORY
python -m pipelines.serve recipe.yaml serve.diffusion=DIRECTORY serve.decoder='{name: dparallel, threshold: 0.45}'
python -m pipelines.serve recipe.yaml serve.diffusion=DIRECTORY serve.diffusion_name=blocks
"""

from __future__ import annotations

import sys

from serve_app.__main__ import main

if __name__ == "__main__":
    sys.exit(main())
