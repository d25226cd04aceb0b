"""Damaged files and absurd arguments for the native modules: each must end in a result or in an exception of Python's.

``python -m base.backends.cpu.tests.fuzz --seed 0 --count 400 --rounds 3`` makes 400 inputs, which are always the same, and
runs all of them three times, in another order each time; in the first round each in a thread of its own, whose working memory
is new, so that a sanitizer knows where it ends. It fails if an input takes too long, gives something else in another
round (what came before it must not matter), writes beside its place in the batch, or if the process grows from round to round.
The last line says what happened; before each input its number is printed, and ``--only NUMBER`` runs that one alone.
"""

import argparse
import collections
import faulthandler
import hashlib
import json
import os
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from base.backends.cpu.tests import native  # noqa: F401

# isort: split
from base.backends.cpu import _images
from base.backends.cpu.tests.fuzz_inputs import made

SECONDS = 5  # of the processor, that an input may take; with sanitizers it takes longer
HANGS = 60  # seconds after which an input is taken to run for ever, as a busy machine may stand still for a while
GROWTH = 16  # MB between the second round and the last


def outcome(run) -> tuple[str, str]:
    """What happened in a word, and all of it in short."""
    try:
        result = run()
    except AssertionError:
        raise
    except Exception as error:  # noqa: BLE001
        return type(error).__name__, type(error).__name__  # of several threads' errors any may be the first
    status = result[0] if isinstance(result, tuple) and isinstance(result[0], int) else 1
    return "read" if status > 0 else "left", hashlib.sha256(repr(result).encode()).hexdigest()


def in_a_thread(work):
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(work).result()


def resident() -> float:
    """MB of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--only", type=int, help="a single input")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of the processor, that an input may take")
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")  # NumPy's, of odd numbers
    faulthandler.enable()
    which = np.arange(options.count) if options.only is None else np.array([options.only])
    first, happened, memory = {}, collections.Counter(), []
    for turn in range(options.rounds):
        for number in np.random.default_rng([options.seed, turn]).permutation(which).tolist():
            kind, run = made(options.seed, number)
            print(f"round {turn}, input {number}: {kind}", flush=True)
            faulthandler.dump_traceback_later(HANGS + options.seconds, exit=True)
            began = time.process_time()
            word, found = outcome(run) if turn else in_a_thread(lambda run=run: outcome(run))
            faulthandler.cancel_dump_traceback_later()
            if (took := time.process_time() - began) > options.seconds:
                print(f"input {number} of seed {options.seed} took {took:.1f} s")
                return 1
            if options.only is not None:
                print(word, found)
            happened[f"{kind}: {word}"] += turn == 0
            if first.setdefault(number, found) != found:
                print(f"input {number} of seed {options.seed} gave {found} after it had given {first[number]}")
                return 1
        memory.append(round(resident(), 1))
    report = {"native": str(Path(_images.__file__).parent), "happened": dict(sorted(happened.items())), "memory": memory}
    print(json.dumps(report))
    if len(memory) > 2 and memory[-1] - memory[1] > GROWTH:
        print(f"grew from {memory[1]} to {memory[-1]} MB")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
