"""Which build of the native modules the tests take: that beside the backend or, if $SSD_TEST_NATIVE names a folder, the one there.

Import this before anything of the backend.
"""

import os

import base.backends.cpu as package

if folder := os.environ.get("SSD_TEST_NATIVE"):
    package.__path__ = [folder, *package.__path__]
