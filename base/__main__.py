"""``python -m base TOOL …``: one entry for every command of the project."""

import importlib
import sys

from base.errors import UserError

TOOLS = {
    "train": ("base.tools.launch", "train and evaluate a detector (what run_training.sh calls)"),
    "config": ("base.tools.config", "print a resolved configuration and where each value comes from"),
    "evaluate": ("base.tools.evaluate", "the 12 COCO figures of a checkpoint, and AP a class"),
    "predict": ("base.tools.predict", "pictures with what a checkpoint detects in them"),
    "export": ("base.tools.export", "write a checkpoint as ONNX, as a torch.export program or in MLPerf's layout, and check it"),
    "bench": ("measuring.bench", "measure the parts of the benchmark on this machine, beside each other, the reference and the machine's own rates"),
    "report": ("report.tool", "what a run did, or several runs beside each other, as one page"),
    "scale": ("planning.scale", "predict images/s and the time of epochs on more devices, from a run on one"),
    "trials": ("submission.trials", "repeated runs in a table, with median, spread and MLPerf's Olympic mean (what --trials closes with)"),
    "submission": ("submission.package", "finished runs as a folder of results in MLPerf's layout, held to MLPerf's checkers"),
    "verify": ("conformance.verify", "hold every component of a backend to the reference"),
    "new-backend": ("base.tools.new_backend", "write the folder of a new backend, which trains the demo as it stands"),
    "demo-data": ("data_sets.demo_data", "draw the embedded demo data set"),
    "data": ("data_sets.look", "what a data set holds, what is broken in it and how default boxes fit it, with a page to look at"),
    "index": ("data_sets.pack", "pack a data set's annotations and report what was dropped or mended"),
}


def usage() -> str:
    width = max(map(len, TOOLS))
    return "usage: python -m base TOOL …\n\n" + "\n".join(f"  {name:{width}}  {text}" for name, (_, text) in TOOLS.items())


def main(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return 0 if arguments else 2
    name, *rest = arguments
    if name not in TOOLS:
        print(f"error: no tool is called {name!r}\n\n{usage()}", file=sys.stderr)
        return 2
    try:
        tool = importlib.import_module(TOOLS[name][0])
    except ModuleNotFoundError as error:
        print(f"error: {sys.executable} has no {error.name}: source .venv/bin/activate, or first python3 prepare.py", file=sys.stderr)
        return 2
    try:
        return tool.main(rest) or 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.code
    except BrokenPipeError:
        return 141


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
