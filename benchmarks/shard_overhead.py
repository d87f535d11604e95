"""What a shard costs beside its text: 1,000 files of one line each, tokenized as mapped tasks on threads, seconds by the wall.

    python benchmarks/shard_overhead.py [SHARDS]

Everything counts from handing over the shards to the last result: Prefect's orchestration, opening and encoding a line, four files
with their syncs. There is no peer; the bar is 10 ms a shard.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

CHECKOUT = Path(__file__).resolve().parent.parent
sys.path[0] = str(CHECKOUT)
WORKERS = (1, 2)


def measure(directory: Path, shards: int) -> dict[int, float]:
    """Milliseconds a shard by the number of threads."""
    from prefect import flow, task

    from tasks import tokenization
    from tasks.tokenize_config import TokenizeConfig
    from tests.small_run import SmallRun

    made = SmallRun(directory / "root", {f"{number:05d}.txt": [f"document number {number}"] for number in range(shards)}, holdout=0.0)
    found: dict[int, float] = {}
    mapped: Any = tokenization._map

    @task(persist_result=False)
    def body(workers: int) -> None:
        def timed(name: str, spec: Any, jobs: Any, execution: Any) -> None:
            began = time.perf_counter()
            mapped(name, spec, jobs, TokenizeConfig(workers=workers))
            found[workers] = 1000 * (time.perf_counter() - began) / shards

        tokenization._map = timed
        store = directory / f"store-{workers}"
        store.mkdir()
        tokenization.tokenize_body(made.tokens, store, made.inputs)

    @flow
    def run() -> None:
        for workers in WORKERS:
            body.submit(workers).result()

    run()
    return found


def main() -> None:
    """Measures once in a home of its own and prints a line for each number of threads."""
    shards = int(sys.argv[1]) if len(sys.argv) > 1 else 1000
    with tempfile.TemporaryDirectory() as temporary:
        os.environ["PREFECT_HOME"] = str(Path(temporary) / "prefect")
        import flows.prefect_settings  # noqa: F401  (before Prefect reads its settings)
        from flows.temporary_server import use_temporary_server

        use_temporary_server()
        for workers, milliseconds in measure(Path(temporary), shards).items():
            print(f"{shards} shards, {workers} thread(s): {milliseconds:.2f} ms a shard; load average {os.getloadavg()[0]:.2f}")


if __name__ == "__main__":
    main()
