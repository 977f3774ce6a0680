"""Unmask: distil and decode diffusion language models and DFlash drafts.

The library half of the project. It needs torch, transformers and safetensors only; Ray, vLLM and the
web framework live in `actors`, `engines`, `pipelines` and `serve_app`, which import this package and
are never imported by it.
"""

__version__ = "0.1.0"
