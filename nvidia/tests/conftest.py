"""Tests of kernels need a GPU, or Triton's interpreter in a process of its own, which test_kernels.py starts.

pytest imports a test by the name that its path has from the project's root, and its folders with it: this one becomes a module
``nvidia`` that hides the wheels' package of that name. Once the wheels' is imported, pytest leaves it alone.
"""

import importlib
import importlib.util
import os
import sys
from pathlib import Path

import torch

from tests.conftest import demo_data, train  # noqa: F401

collect_ignore = [] if torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1" else ["interpreted"]

HERE = str(Path(__file__).resolve().parents[1])

if HERE in map(str, getattr(sys.modules.get("nvidia"), "__path__", [])):
    hidden = sys.modules.pop("nvidia")
    found = importlib.util.find_spec("nvidia")
    if found is None or found.origin is None:  # no wheels: nothing is hidden
        sys.modules["nvidia"] = hidden
    else:
        importlib.import_module("nvidia")
