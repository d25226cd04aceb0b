"""The host's side of this backend is the CPU backend's native code: this builds that, with the same arguments and exit codes."""

import subprocess
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.exit(subprocess.call([sys.executable, str(Path(__file__).resolve().parents[1] / "cpu" / "build.py"), *sys.argv[1:]]))
