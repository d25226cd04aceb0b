"""The memory of training at 1200×1200."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from measuring.figures import Figure, Log
from measuring.photographs import make

SIZE, BATCH, STEPS, MOST_GB = 1200, 2, 4, 8.0
PART = f"""training at {SIZE}×{SIZE}, strides 3 3 2 2 2 2, ResNet-34, 81 classes, batch {BATCH}, {STEPS} steps and an evaluation of 16 images
  memory  the most that any process of the run had resident, as the kernel counted it (ru_maxrss)"""


def measure(log: Log, names: list[str]) -> list[Figure]:
    figures = []
    with tempfile.TemporaryDirectory(prefix="ssd-bench-") as scratch:
        folder = Path(scratch)
        make(folder, 16)
        annotations, images = folder / "annotations.json", folder / "images"
        data = {"data_dir": folder, "train_images": images.name, "val_images": images.name}
        data |= {"train_annotations": annotations.name, "val_annotations": annotations.name}
        model = ["--image_size", SIZE, SIZE, "--strides", 3, 3, 2, 2, 2, 2, "--batch_size", BATCH, "--eval_batch_size", BATCH, "--max_steps", STEPS]
        for name in names:
            log(f"{STEPS} steps by {name}")
            given = {**data, "runs_dir": folder / name, "name": name, "workers": 2, "report": "false"}
            flags = [text for key, value in given.items() for text in (f"--{key}", value)]
            command = [sys.executable, "-m", "base", "train", "--config", "CPUx1x1", "--device", "cpu", *map(str, [*flags, *model])]
            with open(folder / f"{name}.log", "w+") as said:
                process = subprocess.Popen(command, stdout=said, stderr=said)
                _, status, usage = os.wait4(process.pid, 0)  # of the launcher and all that it waited for
                process.returncode = os.waitstatus_to_exitcode(status)
                if process.returncode:
                    said.seek(0)
                    figures.append(Figure(f"{name}, memory", None, "GB", note=said.read().strip().splitlines()[-1]))
                else:
                    figures.append(Figure(f"{name}, memory", usage.ru_maxrss * 1024 / 1e9, "GB", most=MOST_GB))
    return figures
