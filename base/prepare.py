"""``python3 prepare.py`` from within this folder, where earlier versions of the benchmark had it: the one in the project's root."""

import os
import sys
from pathlib import Path

if __name__ == "__main__":
    os.execv(sys.executable, [sys.executable, str(Path(__file__).resolve().parents[1] / "prepare.py"), *sys.argv[1:]])
