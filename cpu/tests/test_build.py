"""The native sources as the compiler sees them."""

import subprocess
import sysconfig

import pybind11
import pytest
from base.backends.cpu import build


@pytest.mark.parametrize("name", sorted(build.sources()))
def test_there_is_nothing_to_warn_of(name):
    includes = [f"-I{path}" for path in (pybind11.get_include(), sysconfig.get_path("include"))]
    flags = [*build.FLAGS, *build.LIBRARIES.get(name, []), "-O1", "-fsyntax-only", "-Werror"]
    command = ["g++", *flags, *includes, str(build.sources()[name])]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
