"""`make fuzz MINUTES=30`: programs over stock PEFT and over bound models, on every core, until the time is over."""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import os
import sys
import time
import traceback
import warnings
from collections import Counter
from multiprocessing.connection import Connection, wait
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "support")]
os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def work(until: float, number: int, to_parent: Connection) -> None:
    """Search in a process of its own, and report each case before and after it runs."""
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    import torch
    from search import search

    torch.set_num_threads(1)
    try:
        for case, failure in search(until, number, lambda case: to_parent.send(("starts", repr(case)))):
            to_parent.send(("ran", case.family, None if failure is None else str(failure)))
    except Exception:  # of the search itself
        to_parent.send(("broke", traceback.format_exc()))


def main() -> int:
    """Print the simplest failing cases, to be pasted, and figures; the exit status says whether all is well."""
    parser = argparse.ArgumentParser(prog="make fuzz", description=__doc__)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--seed", type=int, default=None, help="the same seed draws the same cases")
    options = parser.parse_args()
    number = int(time.time()) if options.seed is None else options.seed
    until, context = time.time() + options.minutes * 60, multiprocessing.get_context("spawn")
    ends: dict[Connection, str] = {}
    for index in range(options.processes):
        ours, theirs = context.Pipe(duplex=False)
        context.Process(target=work, args=(until, number + index * 10**6, theirs), daemon=True).start()
        theirs.close()
        ends[ours] = ""
    ran, failures = listen(ends)
    print(f"\n{ran.total()} cases in {options.minutes:g} minutes, seed {number}; failures of another kind: {failures}")
    print(", ".join(f"{family} {count}" for family, count in sorted(ran.items())))
    return 1 if failures or not ran else 0


def listen(ends: dict[Connection, str]) -> tuple[Counter[str], int]:
    """Print failures as they come, until every process has ended; returns cases by family and a count of failures."""
    ran: Counter[str] = Counter()
    failures = 0
    while ends:
        for end in wait(list(ends)):
            assert isinstance(end, Connection)
            try:
                kind, *said = end.recv()
            except EOFError:
                unfinished = ends.pop(end)
                failures += bool(unfinished)
                print(f"{unfinished},\n    # the process died\n" if unfinished else "", end="", flush=True)
                continue
            if kind == "starts":
                ends[end] = said[0]
                continue
            ends[end] = ""
            if kind == "ran":
                ran[said[0]] += 1
            if said[-1] is not None:
                failures += 1
                print(said[-1], flush=True)
    return ran, failures


if __name__ == "__main__":
    sys.exit(main())
