"""What the benchmarks share: both sides in fresh processes by turns, min/median/max of the rounds, the machine, table and JSON.

A side is a function in a child process (`SCRIPT --child SPEC`) that returns numbers by metric name. CPU-seconds are user + system
of that process, all its threads. Ratios are of medians, ours over the peer's.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

CHECKOUT = Path(__file__).resolve().parent.parent
OURS, PEER = "ours", "peer"


def run_process(command: Sequence[str], **variables: str) -> str:
    """Runs a command with the checkout importable, on the CPU alone, without network; its standard output.

    GNU OpenMP's threads spin while they wait, which multiplies torch's CPU-seconds where cores are shared; passive waiting
    does not. Raises RuntimeError with its last words where it fails.
    """
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PREFECT_", "XLA_"))}
    environment |= {"PYTHONPATH": str(CHECKOUT), "JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    environment |= {"OMP_WAIT_POLICY": "passive", "TF_CPP_MIN_LOG_LEVEL": "3", "TF_ENABLE_ONEDNN_OPTS": "0", **variables}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{(done.stdout + done.stderr)[-3000:]}")
    return done.stdout


def child(script: str, **spec: Any) -> dict[str, Any]:
    """Runs one side in a fresh process and returns what it measured."""
    spec["spawned"] = time.monotonic()
    return json.loads(run_process([sys.executable, script, "--child", json.dumps(spec)]).splitlines()[-1])


def units(work: str, first: str) -> dict[str, str]:
    """The metrics that every side has, with their units: of steady work, until the first result, and memory."""
    steady = {"cpu_s": f"CPU-seconds / {work}", "wall_s": f"seconds / {work}"}
    start = {"first_cpu_s": f"CPU-seconds to first {first}", "first_wall_s": f"seconds to first {first}"}
    return steady | start | {"peak_rss_mib": "peak RSS, MiB"}


def since_spawn(spec: dict[str, Any]) -> dict[str, float]:
    """CPU and wall seconds from the start of this process (interpreter and imports included) until now."""
    return {"first_cpu_s": time.process_time(), "first_wall_s": time.monotonic() - spec["spawned"]}


def peak_rss_mib() -> float:
    """The most resident memory this process has had. Not `ru_maxrss` on Linux, which a process inherits from its parent."""
    if (status := Path("/proc/self/status")).exists():
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM")) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 1024)


def process_tree(command: Sequence[str], **variables: str) -> dict[str, float]:
    """Runs a command; CPU and wall seconds of it and all it started, from start to end, and the most memory one of them had."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    run_process(command, **variables)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    memory = after.ru_maxrss / (2**20 if sys.platform == "darwin" else 1024)
    return {"cpu_s": cpu, "wall_s": time.monotonic() - began, "peak_rss_mib": memory}


def interleave(script: str, rounds: int, sides: Sequence[str] = (OURS, PEER), **spec: Any) -> dict[str, list[dict[str, Any]]]:
    """All sides in each round, backwards in every other one, so that a drift of the machine meets them alike."""
    measured: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
    for number in range(rounds):
        for side in sides if number % 2 == 0 else tuple(reversed(sides)):
            measured[side].append(child(script, side=side, **spec))
    return measured


def compare(measured: dict[str, list[dict[str, Any]]], units: dict[str, str]) -> dict[str, Any]:
    """For each metric its unit, min/median/max of each side, and the ratio of the medians, ours over the peer's."""
    metrics: dict[str, Any] = {}
    for name, unit in units.items():
        values = {side: [row[name] for row in rows] for side, rows in measured.items()}
        spread = {side: {"min": min(v), "median": statistics.median(v), "max": max(v)} for side, v in values.items()}
        metrics[name] = {"unit": unit, **spread, "ratio": spread[OURS]["median"] / spread[PEER]["median"]}
    return metrics


def bar(what: str, value: float, *, at_least: float | None = None, at_most: float | None = None) -> dict[str, Any]:
    """What a number is held against, and whether it holds; one bound is given."""
    bound = {"at_least": at_least} if at_least is not None else {"at_most": at_most}
    met = (at_least is None or value >= at_least) and (at_most is None or value <= at_most)
    return {"what": what, "value": value, **bound, "met": met}


def _print(name: str, result: dict[str, Any]) -> None:
    print(f"\n{name}: {result.get('skipped') or result['what']}")
    for case in result.get("cases", []):
        print(f"  {case['case']}, {case['rounds']} rounds" + "".join(f"; {key} {value}" for key, value in case["notes"].items()))
        print(f"    {'min / median / max':32}{OURS:>28}{PEER:>28}   ours/peer")
        for metric in case["metrics"].values():
            sides = "".join(f"{' / '.join(f'{v:.4g}' for v in metric[side].values()):>28}" for side in (OURS, PEER))
            print(f"    {metric['unit']:32}{sides}   {metric['ratio']:.3g}")
    for held in result.get("bars", []):
        bound = f"at least {held['at_least']:g}" if "at_least" in held else f"at most {held['at_most']:g}"
        print(f"  {'met' if held['met'] else 'MISSED'}: {held['what']}: {held['value']:.4g} ({bound})")


def main(benchmarks: dict[str, Callable[[int, bool], Any]], side: Callable[[Any], Any] | None = None) -> int:
    """The command line of one benchmark or all: functions of (rounds, quick); `side` is the child's. Returns the exit status."""
    parser = argparse.ArgumentParser(description="Measures us beside a peer in one run, by turns.")
    parser.add_argument("names", nargs="*", help=f"which: {', '.join(benchmarks)}; none means all")
    parser.add_argument("--quick", action="store_true", help="two short rounds, small cases only")
    parser.add_argument("--rounds", type=int, help="rounds (default 5, with --quick 2)")
    parser.add_argument("--json", type=Path, help="write everything there")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child and side:
        print(json.dumps(side(json.loads(arguments.child))))
        return 0
    if unknown := sorted(set(arguments.names) - set(benchmarks)):
        parser.error(f"no benchmark {', '.join(unknown)}; there are {', '.join(benchmarks)}")
    if arguments.rounds is not None and arguments.rounds < 1:
        parser.error(f"--rounds={arguments.rounds}: at least 1")
    rounds = arguments.rounds or (2 if arguments.quick else 5)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    machine = {"system": platform.system(), "arch": platform.machine(), "cores": cores, "python": platform.python_version()}
    report: dict[str, Any] = {"date": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC", "command": sys.argv, "machine": machine}
    report |= {"load_average": {"before": os.getloadavg()}, "versions": {}, "benchmarks": {}}
    print(f"{report['date']}; {', '.join(f'{key} {value}' for key, value in machine.items())}", flush=True)
    for name in arguments.names or benchmarks:
        result = report["benchmarks"][name] = benchmarks[name](rounds, arguments.quick)
        report["versions"] |= {package: version(package) for package in result["packages"] if find_spec(package)}
        _print(name, result)
    report["load_average"]["after"] = os.getloadavg()
    print("\n" + ", ".join(f"{name} {number}" for name, number in report["versions"].items()))
    print(*(f"load average {when}: {' '.join(f'{x:.2f}' for x in loads)}" for when, loads in report["load_average"].items()), sep="; ")
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0
