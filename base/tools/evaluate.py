"""``python -m base evaluate --checkpoint C --data_dir D``: the 12 COCO figures of a checkpoint, and AP a class."""

import argparse

from base.contracts import FIGURES
from base.tools.detector import evaluated, flags_of_a_detector, flags_of_data, on_data, open_checkpoint


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m base evaluate", description=__doc__)
    flags_of_a_detector(parser)
    flags_of_data(parser, "")
    flags = parser.parse_args(arguments)
    found = on_data(open_checkpoint(flags.checkpoint, flags.name, flags.device, workers=flags.workers), flags)
    _, evaluator = evaluated(found)
    twelve, curves = evaluator.compute(), evaluator.curves()
    print("\n".join(f"{name:>6}  {twelve[name]:.4f}" for name in FIGURES))
    width = max(map(len, found.names))
    print(f"\n{'class':{width}}      AP    AP50")
    for name, curve in zip(found.names, curves.transpose(2, 0, 1), strict=True):
        known = (curve > -1).any()
        print(f"{name:{width}}  " + (f"{curve.mean():.4f}  {curve[0].mean():.4f}" if known else "no box in the ground truth"))
    return 0
