"""The host's side of this backend is the CPU backend's native code: this builds that, with the same arguments and exit codes.

Before that it looks whether this machine's cards can be used at all: only CoreX's build of torch does so, and PyPI has none.
"""

import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

HERE = Path(__file__).resolve().parent
DEVICES = Path("/dev")


def torch_fault(devices: Path = DEVICES, packages: Path = HERE / "packages") -> str:
    """Why this environment's torch cannot use the cards; nothing if it can or will, or if there are none."""
    sdk = Path(os.environ.get("COREX_HOME", "/usr/local/corex"))
    if not sdk.exists() and not list(devices.glob("iluvatar*")):
        return ""
    try:
        version = metadata.version("torch")
    except metadata.PackageNotFoundError:
        version = "none"
    if "corex" in version or list(packages.glob("torch-*corex*.whl")):
        return ""
    return (
        f"this machine has CoreX, and its cards need CoreX's torch, such as 2.7.1+corex.4.4.0; this environment has {version}:\n"
        f"  source {HERE}/config/environment_variables.sh, if the SDK brings it, or put the SDK's wheels into {packages}, then run this again"
    )


if __name__ == "__main__":
    if problem := torch_fault():
        sys.exit(print(problem, file=sys.stderr) or 2)
    sys.exit(subprocess.call([sys.executable, str(HERE.parent / "cpu" / "build.py"), *sys.argv[1:]]))
