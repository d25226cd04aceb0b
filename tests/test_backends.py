"""Backends that come from elsewhere: found by their folder, held to the contracts, explained when broken."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from base.backend import CONTRACTS, SLOTS, list_backends, load_backend
from base.backends import backend_folder
from base.errors import UserError
from tests.conftest import ROOT, SMALL, Started

HEAD = "from base.backend import Backend\n"
GOOD = """
from base.backend import Backend
from .parts import counted_loss

BACKEND = Backend(name="stranger", loss=counted_loss)
"""
PARTS = '''
import os

from base.backends.reference.loss import multibox_loss


def counted_loss(predictions, targets):
    """The reference's loss, leaving a mark that it was called."""
    if place := os.environ.get("MARKS"):
        with open(place, "a") as file:
            file.write("called\\n")
    return multibox_loss(predictions, targets)


def double(number):
    return 2 * number
'''


@pytest.fixture
def place(tmp_path):
    """place(name, **files) writes a backend folder into a directory for $SSD_BACKEND_PATH; place.path is that directory."""

    def write(name: str, **files: str) -> Path:
        folder = write.path / name
        folder.mkdir(parents=True, exist_ok=True)
        for file, text in files.items():
            (folder / f"{file}.py").write_text(text)
        return folder

    write.path = tmp_path / "backends"
    write.path.mkdir()
    return write


def python(script: str, path: Path, *arguments: str, **env: str) -> str:
    """What a script prints in a process of its own, with backends in ``path``."""
    environment = {**os.environ, "SSD_BACKEND_PATH": str(path), "OMP_NUM_THREADS": "1", **env}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), env.get("PYTHONPATH")]))
    done = subprocess.run([sys.executable, "-c", script, *arguments], env=environment, capture_output=True, text=True, cwd=path.parent)
    assert done.returncode == 0, done.stderr
    return done.stdout


# A stranger's backend that works


def test_a_strangers_backend_trains(place, tmp_path, demo_data):
    place("stranger", backend=GOOD, parts=PARTS)
    (place.path / "stranger" / "config").mkdir()
    (place.path / "stranger" / "config" / "CPUx1x1.yaml").write_text("# The stranger's own.\nextends: demo\nbatch_size: 8\n")
    env = {"SSD_BACKEND_PATH": str(place.path), "MARKS": str(tmp_path / "marks")}
    listed = Started(tmp_path, ["--list"], env).wait_done()
    assert re.search(r"^stranger\n  CPUx1x1 +The stranger's own\.$", listed.stdout, re.MULTILINE) and "\nreference\n" in f"\n{listed.stdout}"

    flags = ["--name", "stranger", "--config", "CPUx1x1", "--data_dir", str(demo_data), *SMALL, "--max_steps", "2", "--workers", "0"]
    flags += ["--target", "null", "--device", "cpu", "--runs_dir", str(tmp_path)]
    done = Started(tmp_path, [*flags, "--run_name", "own"], env).wait_done()
    assert done.returncode == 0, done.stderr
    assert "  loss          stranger\n" in done.stdout and "  matcher       reference\n" in done.stdout
    assert (tmp_path / "marks").read_text().count("called") == 2
    facts = json.loads((tmp_path / "own" / "environment.json").read_text())
    assert facts["components"] == {**dict.fromkeys(SLOTS, "reference"), "loss": "stranger"} and facts["backend"] == "stranger"


def test_backends_extend_one_another_and_parts_can_be_swapped(place):
    place("stranger", backend=GOOD, parts=PARTS)
    child = 'def match(boxes, labels, default_boxes): ...\nBACKEND = Backend(name="child", extends="stranger", device="cpu", matcher=match)'
    place("child", backend=HEAD + child)
    script = """
from base.backend import load_backend
child = load_backend("child", {"loader": "reference", "decoder": "child"})
print(dict(child.suppliers)); print(child.device, child.loss.__module__, child.matcher.__module__)
swapped = load_backend("reference", {"matcher": "child", "loss": "child"})
print(swapped.suppliers["matcher"], swapped.suppliers["loss"], swapped.suppliers["model"], swapped.name)
print(load_backend("stranger", {"loss": "reference"}).suppliers["loss"])
try:
    child.suppliers["loss"] = "other"
except TypeError:
    print("frozen")
"""
    lines = python(script, place.path).splitlines()
    assert lines[0] == str({**dict.fromkeys(SLOTS, "reference"), "loss": "stranger", "matcher": "child"})
    assert lines[1] == "cpu base.backends.stranger.parts base.backends.child.backend"
    assert lines[2:] == ["child stranger reference reference", "reference", "frozen"]


def test_the_supplier_is_the_folder_that_defines_a_component(place):
    """What a folder takes as it is from another is the other's; what it makes of it is its own."""
    place("stranger", backend=GOOD, parts=PARTS)
    parts = """
from functools import partial, wraps
from base.backends.reference.decoder import decode
from base.backends.reference.matcher import match
from base.backends.stranger.parts import counted_loss
wrapped = wraps(match)(lambda boxes, labels, default_boxes: match(boxes, labels, default_boxes))
BACKEND = Backend(name="child", loss=counted_loss, matcher=wrapped, decoder=partial(decode))
"""
    place("child", backend=HEAD + parts)
    script = """
from base.backend import load_backend
from conformance.verify import chosen
for backend in load_backend("child"), load_backend("reference", {"loss": "child"}):
    print({slot: folder for slot, folder in backend.suppliers.items() if folder != "reference"}, chosen(backend, None, False))
"""
    lines = python(script, place.path).splitlines()
    assert lines[0] == str({"matcher": "child", "loss": "stranger", "decoder": "child"}) + " ['matcher', 'loss', 'decoder', 'run']"
    assert lines[1] == "{'loss': 'stranger'} ['loss', 'run']"


def test_parts_of_a_backend_reach_a_spawned_process_and_no_other_backend_is_imported(place):
    place("stranger", backend=GOOD, parts=PARTS)
    place("broken", backend="raise SystemExit('imported')")
    script = """
import multiprocessing, pickle, sys
if __name__ == "__main__":
    from base.backend import list_backends, load_backend
    from base.backends.stranger.parts import double
    loss = load_backend("stranger").loss
    assert pickle.loads(pickle.dumps(loss)) is loss
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        print(pool.map(double, [1, 21]))
    print("broken" in list_backends(), "base.backends.broken.backend" in sys.modules, "base" in list_backends())
"""
    assert python(script, place.path) == "[2, 42]\nTrue False False\n"


def test_a_backend_folder_does_not_hide_an_installed_package_of_its_name(place, tmp_path):
    place("acme", backend=HEAD + 'import acme.data\nBACKEND = Backend(name="acme")\nDATA = acme.data.VERSION')
    wheel = tmp_path / "site" / "acme" / "data"
    wheel.mkdir(parents=True)
    (wheel.parent / "__init__.py").write_text("")
    (wheel / "__init__.py").write_text("VERSION = 'the installed one'")
    script = """
import acme.data
import base.backends.acme.backend as ours
from base.backend import load_backend
print(acme.data.VERSION, ours.DATA, load_backend("acme") is not None, ours.BACKEND.name, acme.data.__name__)
"""
    printed = python(script, place.path, PYTHONPATH=str(tmp_path / "site"))
    assert printed == "the installed one the installed one True acme acme.data\n"


# Broken ones: name → what backend.py holds, and what is said. NAME, HERE, THERE: the backend's name, folder and that one's; *: anything

OWN = HEAD + "BACKEND = Backend(name='NAME', "  # two lines
MUST = "the file must define BACKEND = Backend(name='NAME', …), as its folder is called, and has "
BROKEN = {
    "empty": ("", "HERE/backend.py:1: " + MUST + "none"),
    "mistyped": ("\nBACKEND = {'name': 'mistyped'}", "HERE/backend.py:2: " + MUST + "{'name': 'mistyped'}"),
    "misnamed": (HEAD + "BACKEND = Backend(\n  name='other')", "HERE/backend.py:3: " + MUST + "the name 'other'"),
    "unknown_slot": ("\n" + OWN + "los=print)", "HERE/backend.py:3: backend 'NAME' cannot be imported: *'los'; did you mean loss? there are: name,"),
    "unnamed": (HEAD + "BACKEND = Backend()", "HERE/backend.py:2: *missing 1 required keyword-only argument: 'name'; mend that line"),
    "not_callable": (OWN + "\nloss=3)", "HERE/backend.py:3: component 'loss' is 3, which cannot be called; state a function, or leave it out"),
    "device_type": (OWN + "device=0)", "HERE/backend.py:2: device=0 must be a name, in quotes"),
    "distributed_type": (OWN + "\n distributed = ['gloo'])", "HERE/backend.py:3: distributed=['gloo'] must be a name, in quotes"),
    "extends_type": (OWN + "\n\n extends=7)", "HERE/backend.py:4: extends=7 must be a name, in quotes"),
    "telemetry_type": (OWN + "\ntelemetry=7)", "HERE/backend.py:3: telemetry=7 cannot be called; state what makes a sensor"),
    "cards_type": (OWN + "cards=['Acme'])", "HERE/backend.py:2: cards=['Acme'] must be a name, in quotes"),
    "cards_pattern": (OWN + "\ncards='Acme (One')", "HERE/backend.py:3: cards='Acme (One' is no regular expression: missing ), unterminated"),
    "signature": (
        "def loss(predictions):\n    return 0\n" + OWN + "loss=loss)",
        "HERE/backend.py:1: component 'loss'(predictions) cannot be called as loss(predictions, targets), as base/contracts.py says: too many",
    ),
    "keyword_only": (
        "\ndef decode(predictions, default_boxes, *, score_threshold, iou_threshold, max_detections): ...\n" + OWN + "decoder=decode)",
        "HERE/backend.py:2: component 'decoder'*cannot be called as decoder(predictions, default_boxes, score_threshold=…",
    ),
    "asks_more": (
        "def match(boxes, labels, default_boxes, threshold): ...\n" + OWN + "matcher=match)",
        "HERE/backend.py:1: component 'matcher'*missing a required argument: 'threshold'",
    ),
    "missing_package": (
        "import os\nimport not_there.at_all",
        "HERE/backend.py:2: backend 'NAME' needs the package 'not_there', which is not installed: python3 prepare.py --name NAME installs what "
        "HERE/requirements.txt lists",
    ),
    "missing_module": ("from .nowhere import loss", "HERE/backend.py:1: there is no module base.backends.NAME.nowhere; mend that line"),
    "missing_in_base": ("\nfrom base.nowhere import loss", "HERE/backend.py:2: there is no module base.nowhere"),
    "missing_name": ("from base.errors import Nothing", "HERE/backend.py:1: backend 'NAME' cannot be imported: ImportError: "),
    "syntax": ("x = 1\ndef f(:\n    pass", "HERE/backend.py:2: backend 'NAME' cannot be imported: invalid syntax; mend that line"),
    "raises": ("import ctypes\n\nctypes.CDLL('libnot_there.so')", "HERE/backend.py:3: backend 'NAME' cannot be imported: OSError: libnot_there.so"),
    "key_error": ("import os\nos.environ['ABSENT']", "HERE/backend.py:2: backend 'NAME' cannot be imported: KeyError: 'ABSENT'"),
    "asserts": ("assert False", "HERE/backend.py:1: backend 'NAME' cannot be imported: AssertionError"),
    "exits": ("\nraise SystemExit('no driver')", "HERE/backend.py:2: backend 'NAME' cannot be imported: SystemExit: no driver; mend that line"),
    "says_itself": ("from base.errors import UserError\nraise UserError('install the driver')", "install the driver"),
    "alone": (OWN + "extends=None)", "HERE/backend.py:2: backend 'NAME' extends nothing and lacks train_loader, *; add them or extends='reference'"),
    "orphan": (OWN + "\nextends='referense')", "HERE/backend.py:3: no backend is called 'referense'; did you mean reference?"),
    "ring": (OWN + "extends='ring_too')", "THERE/ring_too/backend.py:2: backends extend each other in a ring: ring → ring_too → ring; let one"),
    "ring_too": (OWN + "extends='ring')", "THERE/ring/backend.py:2: backends extend each other in a ring: ring_too → ring → ring_too; let one"),
    "selfish": (OWN + "extends='selfish')", "HERE/backend.py:2: backends extend each other in a ring: selfish → selfish; let one of"),
}
TELL_ALL = """
import json, sys
from base.backend import load_backend
from base.errors import UserError
said = {}
for name in sys.argv[1:]:
    try:
        load_backend(name)
        said[name] = "loaded"
    except UserError as error:
        said[name] = str(error)
print(json.dumps(said))
"""


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """The folder of all broken backends, and what loading each says."""
    path = tmp_path_factory.mktemp("broken") / "backends"
    for name, (text, _) in BROKEN.items():
        (path / name).mkdir(parents=True)
        (path / name / "backend.py").write_text(text.replace("NAME", name))
    return path, json.loads(python(TELL_ALL, path, *BROKEN))


@pytest.mark.parametrize("name", BROKEN)
def test_broken_backends_are_explained(told, name):
    path, said = told
    wanted = BROKEN[name][1].replace("NAME", name).replace("THERE", str(path)).replace("HERE", str(path / name))
    assert re.match(".*".join(map(re.escape, wanted.split("*"))), said[name], re.DOTALL), said[name]
    assert len(said[name]) < 600 and "Traceback" not in said[name]


def test_a_broken_backend_ends_a_run_with_one_message(place, tmp_path, demo_data):
    place("absent", backend="import not_there")
    flags = ["--name", "absent", "--config", "demo", "--data_dir", str(demo_data)]
    done = Started(tmp_path, flags, {"SSD_BACKEND_PATH": str(place.path)}).wait_done()
    assert done.returncode == 2 and done.stderr.count("error:") == 1 and "Traceback" not in done.stderr
    assert "needs the package 'not_there', which is not installed: python3 prepare.py --name absent" in done.stderr


FIND = """
import sys
from base.backends import backend_folder, list_backends
from base.errors import UserError
try:
    print(backend_folder(sys.argv[1]))
except UserError as error:
    print(error)
assert "torch" not in sys.modules
"""


def test_two_folders_of_one_name_are_both_named(place, tmp_path):
    other = tmp_path / "others"
    for path in (place.path, other):
        (path / "twin").mkdir(parents=True)
        (path / "twin" / "backend.py").write_text(HEAD + "BACKEND = Backend(name='twin')")
    both = os.pathsep.join(map(str, (place.path, other)))
    said = python(FIND, place.path, "twin", SSD_BACKEND_PATH=both)
    assert said == f"two folders call themselves backend 'twin': {place.path / 'twin'} and {other / 'twin'}; rename one\n"
    again = os.pathsep.join(map(str, (place.path, "", place.path, ROOT)))  # the same place twice, or the project's, is one place
    assert python(FIND, place.path, "twin", SSD_BACKEND_PATH=again) == f"{place.path / 'twin'}\n"
    assert python(FIND, place.path, "reference", SSD_BACKEND_PATH=again) == f"{ROOT / 'reference'}\n"


def test_what_hides_a_backend_from_python_is_named(place, tmp_path):
    """Python takes a file, or a folder with an __init__.py, before a plain folder of the same name."""
    place("tests", backend=HEAD + "BACKEND = Backend(name='tests')")
    said = python(FIND, place.path, "tests")
    assert said.startswith(f"backend 'tests' in {place.path / 'tests'} is hidden by {ROOT / 'tests' / '__init__.py'}, which Python imports first")
    (place.path / "reference.py").touch()
    said = python(FIND, place.path, "reference")
    assert said.startswith(f"backend 'reference' in {ROOT / 'reference'} is hidden by {place.path / 'reference.py'}, which Python imports first")


def test_a_package_of_its_own_is_a_backend_too(place):
    place("packaged", backend=HEAD + "BACKEND = Backend(name='packaged')", __init__="")
    assert json.loads(python(TELL_ALL, place.path, "packaged")) == {"packaged": "loaded"}


@pytest.mark.parametrize("name", ["my-chip", "my.chip", "1chip", "_chip", "class", "chïp"])
def test_a_folder_that_cannot_be_imported_is_told_its_rule(place, name):
    place(name, backend=HEAD + f"BACKEND = Backend(name={name!r})")
    said = python(FIND, place.path, name, PYTHONIOENCODING="utf-8")
    assert said.startswith(f"{place.path / name} cannot be imported as {name!r}; rename the folder: letters, digits and _")


def test_a_backend_path_that_is_a_backend_is_told_its_parent(place):
    folder = place("inner", backend=HEAD + "BACKEND = Backend(name='inner')")
    said = python(FIND, place.path, "inner", SSD_BACKEND_PATH=str(folder))
    assert said == f"$SSD_BACKEND_PATH names {folder}, which is a backend itself; it takes the folder that holds it: {place.path}\n"


def test_extensions_that_are_not_built_are_told_their_command(place):
    place("unbuilt", backend="from . import _kernels", build="")
    place("unlinked", backend="import ctypes\nctypes.CDLL('/nowhere/libkernels.so')", build="")
    said = json.loads(python(TELL_ALL, place.path, "unbuilt", "unlinked"))
    assert "/backend.py:1: " in said["unbuilt"] and said["unbuilt"].endswith("; python3 prepare.py --name unbuilt builds its extensions")
    assert "/backend.py:2: " in said["unlinked"] and said["unlinked"].endswith("; python3 prepare.py --name unlinked builds its extensions")


def test_a_backend_path_that_is_no_folder_is_named(tmp_path):
    said = python(FIND, tmp_path, "reference", SSD_BACKEND_PATH=str(tmp_path / "typo"))
    assert f"$SSD_BACKEND_PATH names {tmp_path / 'typo'}, which is not a folder" in said


@pytest.mark.parametrize("name", ["../reference", "/etc", "", ".", "base", "reference/config", "referense"])
def test_names_that_are_no_backend(name):
    with pytest.raises(UserError, match="no backend is called"):
        load_backend(name)


# The project's own


def test_every_backend_here_fills_every_slot(backend):
    assert backend.suppliers.keys() == set(SLOTS) == CONTRACTS.keys()
    for slot, supplier in backend.suppliers.items():
        assert callable(getattr(backend, slot)) and supplier in list_backends()
        assert getattr(backend, slot) is getattr(load_backend(supplier), slot)


def test_backend_folders_are_no_packages_of_their_own():
    assert not [name for name in list_backends() if (backend_folder(name) / "__init__.py").exists()]


def lines_of(*patterns: str) -> dict[str, list[str]]:
    """Tracked and new files of base/ with their lines."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", *patterns], cwd=ROOT, capture_output=True, text=True, check=True
    )
    files = [name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]
    assert files
    return {name: (ROOT / name).read_text(encoding="utf-8").splitlines() for name in files}


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="needs the git checkout")
def test_base_names_no_vendor_and_stays_readable():
    vendor = re.compile(r"\.cuda\(|nvidia|iluvatar|corex|import +(triton|apex|pynvml)", re.IGNORECASE)
    hits = [f"{name}:{n}: {line}" for name, lines in lines_of("base").items() for n, line in enumerate(lines, 1) if vendor.search(line)]
    assert hits == []
    sources = lines_of("base/*.py")
    assert {name: len(lines) for name, lines in sources.items() if name.startswith("base/train") and len(lines) > 300} == {}
    assert sum(len(lines) for name, lines in sources.items() if not name.startswith("base/tools/")) <= 3000
