"""From the start of the training process to its first step: without compiled programs, and as a resume that finds them.

    python benchmarks/resume.py [ROUNDS]

CPU-seconds of the process and seconds by the wall, medians; the model is the debug preset's. A cold start has nothing; the
resume continues the stopped run from its checkpoint, so it also verifies, restores and makes up what was missed. The bar is 0.4.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parent.parent
sys.path[0] = str(CHECKOUT)
BAR = 0.4


def seconds_to_first_step(job: Path) -> tuple[float, float]:
    """CPU and wall seconds until the process says that a step is done; it is then stopped and saves."""
    variables = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    variables |= {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(CHECKOUT)}
    began = time.monotonic()
    command = [sys.executable, "-m", "model.training_process", str(job)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=variables) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if json.loads(line)["event"] == "progress":
                break
        wall = time.monotonic() - began
        fields = Path(f"/proc/{process.pid}/stat").read_text().rsplit(")", 1)[1].split()
        process.terminate()
        process.stdout.read()
    return sum(int(field) for field in fields[11:13]) / os.sysconf("SC_CLK_TCK"), wall


def main() -> int:
    """Prints both medians and their ratio; 1 where the bar is missed."""
    from model.presets import MODELS
    from tests.training_processes import make_mixture, write_job

    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    cold: list[tuple[float, float]] = []
    warm: list[tuple[float, float]] = []
    with tempfile.TemporaryDirectory() as temporary:
        mixture = make_mixture(Path(temporary))
        for number in range(rounds):
            directory = Path(temporary) / f"run-{number}"
            job = write_job(directory, mixture, num_train_steps=100_000, steps_per_export=100_000, train_batch_size=8, sample_prompts=())
            content = json.loads(job.read_text())
            job.write_text(json.dumps({**content, "model": MODELS["debug"].model_dump(mode="json")}))
            cold.append(seconds_to_first_step(job))
            warm.append(seconds_to_first_step(job))
    print(f"{'to the first step':<20}{'cold':>8}{'resume':>8}{'ratio':>8}")
    ratios: list[float] = []
    for index, name in enumerate(("CPU-seconds", "seconds")):
        first, second = (statistics.median(pair[index] for pair in pairs) for pairs in (cold, warm))
        ratios.append(second / first)
        print(f"{name:<20}{first:>8.2f}{second:>8.2f}{ratios[-1]:>8.3f}")
    return int(max(ratios) > BAR)


if __name__ == "__main__":
    sys.exit(main())
