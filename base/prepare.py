"""``python3 prepare.py`` from within this folder, where earlier versions had it: the one in the project's root."""

import os
import sys

if __name__ == "__main__":
    os.execv(sys.executable, [sys.executable, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "prepare.py"), *sys.argv[1:]])
