"""What names of SeqIO and TFDS stand for, found out before a run starts; TensorFlow is only imported in a child process.

    python -m tasks.seqio_bridge.seqio_names MIXTURE [MODULE]

prints `{"event": "rates", "rates": {task: share}}`, or `{"event": "error", "message": ...}`.
"""

from __future__ import annotations

import math
import os
import re
import sys
from pathlib import Path

from model.child import die_with_parent, emit
from tasks.children import ChildFailed, run_child
from tasks.sources import DataError

_TFDS_NAME = re.compile(r"(?P<dataset>(?:[\w-]+:)?[a-z]\w*)(?:/(?P<config>[\w.+=,@-]+))?(?::(?P<version>[\w.*]+))?")
_VERSION = re.compile(r"\d+\.\d+\.\d+")
# Read by TensorFlow when it is imported: no banner, the same float results everywhere, and never an accelerator.
TENSORFLOW_ENVIRONMENT = {"TF_CPP_MIN_LOG_LEVEL": "3", "TF_ENABLE_ONEDNN_OPTS": "0", "CUDA_VISIBLE_DEVICES": "", "TPU_SKIP_MDS_QUERY": "1"}


def resolve_mixture(mixture_name: str, module: str | None) -> dict[str, float]:
    """The tasks of a mixture in SeqIO's registry and their shares, which add up to 1; mixtures within it are resolved too.

    Tasks with the rate 0 are left out.
    module: imported first, so that the mixture is in the registry. Rates that are functions are evaluated by SeqIO.
    Takes the seconds that importing TensorFlow in a child process takes.
    Raises DataError, with the nearest names, where there is no such mixture, or a task of it cannot be trained on.
    """
    rates: dict[str, float] = {}
    arguments = [mixture_name] if module is None else [mixture_name, module]
    try:
        run_child("tasks.seqio_bridge.seqio_names", arguments, lambda event: rates.update(event.get("rates", {})))
    except ChildFailed as failed:
        raise DataError(str(failed)) from None
    return rates


def check_tfds_name(name: str, data_dir: str | None = None) -> None:
    """Raises DataError unless `name` is a TFDS name, `dataset/config:version`, whose version is exact.

    The error names the versions that are prepared in `data_dir` (unset: TFDS_DATA_DIR, or TFDS's own default), if there are any.
    """
    match = _TFDS_NAME.fullmatch(name)
    if match is None:
        raise DataError(
            f"tfds://{name}: a TFDS name is dataset:version or dataset/config:version, such as tfds://wikipedia/20230601.en:1.0.0"
        )
    version = match["version"]
    if version is not None and _VERSION.fullmatch(version):
        return
    place = Path(data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets").expanduser()
    place = place.joinpath(*filter(None, (match["dataset"], match["config"])))
    found = sorted(path.name for path in place.glob("*.*.*") if _VERSION.fullmatch(path.name)) if place.is_dir() else []
    known = f"{place} has {', '.join(found)}" if found else "its page at tensorflow.org/datasets lists them"
    unpinned = name if version is None else name.removesuffix(f":{version}")
    what = "no version" if version is None else f"the version {version!r}, which is not an exact one"
    raise DataError(f"tfds://{name} has {what}, so what is trained on could change; write tfds://{unpinned}:x.y.z ({known})")


def main(arguments: list[str]) -> int:
    """Prints the shares of the mixture `arguments[0]` after importing the module `arguments[1]`. Exit status 0, 1 after an error."""
    die_with_parent()
    os.environ.update(TENSORFLOW_ENVIRONMENT)
    name, *module = arguments
    try:
        emit("rates", rates=registry_rates(name, module[0] if module else None))
    except DataError as error:
        emit("error", message=str(error))
        return 1
    return 0


def registry_rates(name: str, module: str | None) -> dict[str, float]:
    """`resolve_mixture` in this process, which imports TensorFlow. Raises DataError."""
    from tasks.seqio_bridge.seqio_registry import registered_mixture, registered_task

    mixture = registered_mixture(name, module)
    rates: dict[str, float] = {}
    for task in mixture.tasks:
        try:
            rates[task.name] = float(mixture.get_rate(task))
        except Exception as error:  # a rate may be any function of a task
            raise DataError(f"seqio_mixture={name!r}: the rate of task {task.name!r} fails ({type(error).__name__}: {error})") from None
        if rates[task.name] > 0:
            registered_task(task.name, None)
    total = sum(rates.values())
    if not math.isfinite(total) or total <= 0 or min(rates.values()) < 0:
        raise DataError(f"seqio_mixture={name!r} has the rates {rates}: they must be 0 or more, and some above 0; correct the mixture")
    return {task: rate / total for task, rate in rates.items() if rate}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
