"""Two versions of loraloom against each other, each case of one right after that of the other.

    git worktree add ../before REVISION
    .venv/bin/python -m benchmarks.versions ../before . -- step --cases lora,mixlora --rounds 7

What follows `--` is a module of benchmarks/ (step, layer, decode, serve) with its options. Both
versions run in this Python's environment, each in a process of its own, and take turns within every
timed round, so that a machine whose speed moves within minutes hits them alike; which of them is
first changes from round to round. All of it is done twice, with processes started in the other
order, as the one that is started later is often slower by a tenth. The table has the medians of
both, the median over rounds of the second one's time ÷ the first one's (of both orders, their
geometric mean), and the least and the largest of those ratios; below it, the same of each case ÷
the first case.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
from importlib import import_module
from pathlib import Path
from statistics import geometric_mean, median
from typing import Any

Times = dict[str, list[float]]
"""Seconds of each case, a value for every timed round."""


def main() -> None:
    if len(sys.argv) < 5 or sys.argv[3] != "--":
        raise SystemExit(__doc__)
    checkouts, words = [Path(sys.argv[1]), Path(sys.argv[2])], sys.argv[4:]
    first, second = compare(checkouts, words)
    again = compare(checkouts[::-1], words)[::-1]
    for times, more in zip((first, second), again, strict=True):
        for case, seconds in more.items():
            times[case] += seconds
    print("| | first, s | second, s | second ÷ first | least to largest |")
    print("|---|---|---|---|---|")
    for case in first:
        print_ratios(case, first[case], second[case])
    baseline, *others = first
    for case in others:
        of_first, of_second = (
            [one / base for one, base in zip(times[case], times[baseline], strict=True)]
            for times in (first, second)
        )
        print_ratios(f"{case} ÷ {baseline}", of_first, of_second)


def print_ratios(name: str, first: list[float], second: list[float]) -> None:
    ratios = [after / before for before, after in zip(first, second, strict=True)]
    rounds = len(ratios) // 2
    ratio = geometric_mean([median(ratios[:rounds]), median(ratios[rounds:])])
    cells = [f"{median(first):.3f}", f"{median(second):.3f}", f"{ratio:.3f}"]
    print(f"| {name} | {' | '.join(cells)} | {min(ratios):.3f} to {max(ratios):.3f} |")


def compare(checkouts: list[Path], words: list[str]) -> list[Times]:
    """Run a benchmark of both checkouts by turns."""
    with tempfile.TemporaryDirectory() as directory:
        ends = socket.socketpair()
        children, results = [], []
        for place, (checkout, end) in enumerate(zip(checkouts, ends, strict=True)):
            results.append(Path(directory, f"{place}.json"))
            own = [f"{place}", f"{end.fileno()}", str(results[-1])]
            children.append(
                subprocess.Popen(
                    [sys.executable, "-c", f"{CHILD}", *own, *words],
                    env=os.environ | {"PYTHONPATH": str(checkout.resolve() / "src")},
                    cwd=checkout,
                    stdout=subprocess.DEVNULL,
                    pass_fds=[end.fileno()],
                )
            )
        for end in ends:
            end.close()  # so that one that fails ends the other
        codes = [child.wait() for child in children]
        if any(codes):
            raise SystemExit("a version failed")
        return [json.loads(path.read_text()) for path in results]


def take_part(place: int, peer: socket.socket, words: list[str]) -> Times:
    """Run a benchmark, timing each case when it is this process's turn."""
    from benchmarks import cases

    benchmark = import_module(f"benchmarks.{words[0]}")
    timed: Any = cases._timed
    times: Times = {}

    def by_turns(run: Any) -> float:
        caller = sys._getframe(1).f_locals
        case, turn = caller["name"], caller["turn"]
        if turn == 0 and case == next(iter(caller["cases"])):  # all that is measured has been made
            peer.sendall(b"r")
            _await(peer)
        comes_first = turn % 2 == place
        if not comes_first:
            _await(peer)
        elapsed = timed(run)
        peer.sendall(b"t")
        if comes_first:
            _await(peer)
        if turn >= caller["warmup"]:
            times.setdefault(case, []).append(elapsed)
        return elapsed

    cases._timed = by_turns
    benchmark.main(words[1:])
    return times


def _await(peer: socket.socket) -> None:
    if not peer.recv(1):
        raise SystemExit("the other version has ended")


CHILD = f"""
import json, runpy, socket, sys
from pathlib import Path
place, end, result, *words = sys.argv[1:]
take_part = runpy.run_path({__file__!r})["take_part"]
times = take_part(int(place), socket.socket(fileno=int(end)), words)
Path(result).write_text(json.dumps(times))
"""

if __name__ == "__main__":
    main()
