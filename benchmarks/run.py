"""All benchmarks, or those named: `python benchmarks/run.py [input_path] [train_step] [--quick] [--rounds N] [--json FILE]`."""

from __future__ import annotations

import sys

import encoders
import input_path
import observation
import tokenization
import train_step
from measure import main

if __name__ == "__main__":
    benchmarks = {"tokenization": tokenization.run, "encoders": encoders.run, "input_path": input_path.run, "train_step": train_step.run}
    benchmarks["observation"] = observation.run
    sys.exit(main(benchmarks))
