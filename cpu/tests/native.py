"""Which build of the native modules the tests take: that beside the backend or, if $SSD_TEST_NATIVE names a folder, the one there.

Import this before anything of the backend.
"""

import importlib.util
import os
from pathlib import Path

import base.backends.cpu as package

if folder := os.environ.get("SSD_TEST_NATIVE"):
    package.__path__ = [folder, *package.__path__]
    found = importlib.util.find_spec("base.backends.cpu._images")
    if found is None or Path(found.origin).parent != Path(folder):
        raise ImportError(f"$SSD_TEST_NATIVE is {folder}, and there are no native modules; python cpu/build.py --sanitize builds some")
