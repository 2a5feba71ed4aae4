"""Imported before transformers, which some tests import first: see torchvision_compat.py."""

import videoanchor_triton  # noqa: F401
