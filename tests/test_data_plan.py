"""Plans of the data: counted exactly where tokens are there, estimated before, refused only for what is certain."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from model.batches import BatchLoader
from model.config import LlamaConfig
from model.train_config import SimpleTrainConfig
from tasks import data_plan, disk_space, planning
from tasks.artifacts import Artifact, commit
from tasks.config import RunConfig
from tasks.data_estimates import bytes_per_token, text_bytes
from tasks.data_plan import PlannedComponent, PlannedData, planned_data
from tasks.data_steps import DataSteps, RawFiles, mixture_steps
from tasks.datasets import ByteTokenizer, Mixture, Reading, SentencePieceTraining
from tasks.download import download_body
from tasks.mixture import mix_body
from tasks.plan_text import component_rows, plan_lines
from tasks.planning import plan_run
from tasks.steps import Step
from tasks.tokenization import tokenize_body
from tasks.vocabulary import train_vocabulary_body

DRAW = random.Random(5)
WORDS = ["".join(DRAW.choices("abcdefghij", k=1 + number % 9)) for number in range(300)]


def texts(count: int, words: int) -> list[str]:
    draw = random.Random(count)
    return [" ".join(draw.choices(WORDS, k=words)) for _ in range(count)]


class Run:
    """A run of 8 rows of 64 bytes a step over text files, a document a line: `big` of 60 kB, `mid` of 6, `tiny` of 50 bytes."""

    def __init__(self, root: Path, weights: dict[str, float], steps: int, dataset: dict[str, Any] | None = None, **mixture: Any) -> None:
        self.root = root
        root.mkdir(exist_ok=True)
        for name, lines in {"big": texts(200, 50), "mid": texts(20, 50), "tiny": ["to be or not to be, that is the question"]}.items():
            if not (root / f"{name}.txt").exists():
                (root / f"{name}.txt").write_text("".join(f"{line}\n" for line in lines))
        fields = {"document": "line", **(dataset or {})}
        self.config = RunConfig(
            name="run",
            model=LlamaConfig(seq_len=64, hidden_dim=16, intermediate_dim=16, num_heads=1, num_kv_heads=1, num_layers=1),
            train=SimpleTrainConfig(train_batch_size=8, num_train_steps=steps, learning_rate=1e-3),
            data=Mixture.model_validate(
                {
                    "name": "m",
                    "datasets": tuple({"name": name, "source": str(root / f"{name}.txt"), **fields} for name in weights),
                    "weights": weights,
                    "tokenizer": ByteTokenizer(),
                    **mixture,
                }
            ),
        )
        self.steps: DataSteps = mixture_steps(self.config.data)

    def plan(self) -> PlannedData:
        return planned_data(self.config, self.steps, self.root)

    def make(self, step: Step, body: Any, *inputs: Artifact) -> Artifact:
        directory = step.directory(self.root)
        directory.mkdir(parents=True, exist_ok=True)
        return commit(directory, step, stats=body(step, directory, inputs))

    def tokenize(self) -> list[Artifact]:
        """The inputs of the mixture step."""
        raws = [self.make(step, download_body) for step in self.steps.downloads]
        tokenizer = self.make(self.steps.tokenizer, train_vocabulary_body)
        tokens = [self.make(step, tokenize_body, raw, tokenizer) for step, raw in zip(self.steps.tokens, raws, strict=True)]
        return [tokenizer, *tokens, *raws]


def by_name(plan: PlannedData) -> dict[str, PlannedComponent]:
    return {component.name: component for component in plan.components}


def test_bytes_are_counted_as_bytes_and_enough_data_is_neither_refused_nor_warned_about(tmp_path: Path) -> None:
    run = Run(tmp_path, {"big": 1.0}, 100, max_epochs={"big": 1.0})
    size = (tmp_path / "big.txt").stat().st_size
    assert size > 100 * 8 * 64 + 128
    plan = run.plan()
    assert plan.warnings == ()
    assert by_name(plan)["big"].available == (size // 64 - 1) * 64
    assert not by_name(plan)["big"].measured


def test_what_is_estimated_warns_and_what_is_counted_refuses(tmp_path: Path) -> None:
    run = Run(tmp_path, {"big": 1.0}, 1000, max_epochs={"big": 1.0})
    (warning,) = run.plan().warnings
    assert "train.num_train_steps=1000 needs 8,000 rows, and with mixture.max_epochs the data would end after about" in warning
    assert "estimated from the size of the files" in warning
    run.tokenize()
    with pytest.raises(
        ValueError, match=r"needs 8,000 rows, and with mixture.max_epochs the data ends after \d{3}: .* to 1\d\d$"
    ) as raised:
        run.plan()
    steps = int(str(raised.value).rsplit(maxsplit=1)[1])
    assert Run(tmp_path, {"big": 1.0}, steps, max_epochs={"big": 1.0}).plan().components[0].measured
    with pytest.raises(ValueError, match="the data ends after"):
        Run(tmp_path, {"big": 1.0}, steps + 1, max_epochs={"big": 1.0}).plan()


def test_what_is_held_out_is_not_available(tmp_path: Path) -> None:
    whole = by_name(Run(tmp_path, {"big": 1.0}, 10).plan())["big"].available
    assert whole is not None
    held = by_name(Run(tmp_path, {"big": 1.0}, 10, dataset={"holdout": 0.9}).plan())["big"].available
    assert held == pytest.approx(whole / 10, abs=128)
    tail = by_name(Run(tmp_path, {"big": 1.0}, 10, holdout_tail={"big": 20_000}).plan())["big"].available
    assert tail == pytest.approx(whole - 20_000, abs=128)


def test_where_nothing_is_left_it_is_said_and_refused_once_counted(tmp_path: Path) -> None:
    run = Run(tmp_path, {"big": 1.0, "mid": 1.0}, 10, holdout_tail={"mid": 100_000})
    (warning,) = run.plan().warnings
    assert warning.startswith("dataset 'mid' has about ")
    assert "holdout_tail=100000 would leave none to train on; lower it" in warning
    run.tokenize()
    with pytest.raises(ValueError, match=r"dataset 'mid' has \d+ training tokens, and a tail of 100000 leaves none; lower holdout_tail"):
        run.plan()
    run = Run(tmp_path / "short", {"big": 1.0, "tiny": 1.0}, 10)
    plan = run.plan()
    assert "dataset 'tiny' has about 41 training tokens" in plan.warnings[0]
    assert "less than one row of seq_len + 1 = 65, and would be refused" in plan.warnings[0]
    assert by_name(plan)["tiny"].available == 41
    run.tokenize()
    with pytest.raises(ValueError, match="dataset 'tiny' has 42 training tokens, fewer than one row of seq_len"):
        run.plan()


MIXTURES: list[tuple[dict[str, float], dict[str, Any]]] = [
    ({"big": 0.7, "mid": 0.3}, {}),
    ({"big": 0.5, "mid": 0.5}, {"packing": "best_fit"}),
    ({"big": 0.5, "mid": 0.5}, {"max_epochs": {"mid": 1.5}}),
    ({"big": 0.5, "mid": 0.5}, {"holdout_tail": {"mid": 2000}, "max_epochs": {"mid": 2.0}, "packing": "best_fit"}),
    ({"big": 1.0, "mid": 0.0}, {"later_weights": ({"step": 20, "weights": {"mid": 1.0}},)}),
    ({"big": 0.5, "mid": 0.5}, {"simulated_epoching": {"experiment_tokens": 1000, "target_tokens": 20_000}}),
]


@pytest.mark.parametrize(("weights", "mixture"), MIXTURES)
def test_with_the_tokens_there_the_plan_is_the_loaders_before_there_is_a_mixture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weights: dict[str, float], mixture: dict[str, Any]
) -> None:
    monkeypatch.setattr("tasks.mixture.seqio_rates", lambda step, directory, inputs: step.config.stages[0]["shares"])
    run = Run(tmp_path, weights, 30, dataset={"holdout": 0.1}, **mixture)
    inputs = run.tokenize()
    before = run.plan()
    made = run.make(run.steps.mixture, mix_body, *inputs)
    loader = BatchLoader(made, seq_len=64, global_batch_size=8, seed=run.config.train.loader_seed)
    planned = loader.planned(30)
    assert {component.name: (component.tokens, component.epochs) for component in before.components} == {
        name: (part["tokens"], part["epochs"]) for name, part in planned.items()
    }
    after = by_name(run.plan())
    for component in before.components:
        assert component.measured
        assert component.available == pytest.approx(after[component.name].available)


def test_what_takes_long_to_pack_and_what_depends_on_an_estimate_is_about(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(tmp_path, {"big": 1.0}, 10, packing="best_fit")
    run.tokenize()
    assert run.plan().components[0].measured
    monkeypatch.setattr(data_plan, "_PACKED_DOCUMENTS", 100)
    assert not run.plan().components[0].measured
    both = Run(tmp_path, {"big": 0.5, "mid": 0.5}, 10)
    assert {name: component.measured for name, component in by_name(both.plan()).items()} == {"big": True, "mid": False}
    limited = Run(tmp_path, {"big": 0.5, "mid": 0.5}, 10, max_epochs={"mid": 1.0})
    assert not by_name(limited.plan())["big"].measured


def raw(paths: Sequence[Path], location: bool = True, **fields: Any) -> RawFiles:
    files = tuple({"name": path.name, "bytes": path.stat().st_size, "location": str(path) if location else "gs://b/x"} for path in paths)
    return RawFiles.model_validate({"files": files, **fields})


def test_parquet_is_as_large_as_its_footers_say_and_compressed_text_as_its_kind_usually_is(tmp_path: Path) -> None:
    draw = random.Random(6)
    lines = ["".join(draw.choices("ab", k=2000)) for _ in range(300)]
    table = pa.table({"text": lines, "other": ["x" * 5000 + str(number) for number in range(300)]})
    for name in ("a.parquet", "b.parquet"):
        pq.write_table(table, tmp_path / name, compression="zstd", use_dictionary=False)
    files = [tmp_path / "a.parquet", tmp_path / "b.parquet"]
    size = sum(path.stat().st_size for path in files)
    assert size < 400_000
    assert text_bytes(raw(files), Reading()) == pytest.approx(2 * 300 * 2000, rel=0.01)
    assert text_bytes(raw(files, location=False), Reading()) == pytest.approx(1.6 * size)
    assert text_bytes(raw(files), Reading(text_key="other")) == pytest.approx(2 * 300 * 5003, rel=0.01)
    (tmp_path / "b.parquet").write_bytes(b"PAR1 this is none PAR1")
    assert text_bytes(raw([tmp_path / "b.parquet"]), Reading()) == pytest.approx(1.6 * 22)
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(b'{"text": "x"}\n' * 1000))
    (tmp_path / "d.jsonl").write_text(json.dumps({"text": "x" * 10_000}))
    packed, plain = (path.stat().st_size for path in (tmp_path / "c.jsonl.gz", tmp_path / "d.jsonl"))
    both = [tmp_path / "c.jsonl.gz", tmp_path / "d.jsonl"]
    assert text_bytes(raw(both), Reading()) == pytest.approx(2.5 * packed + plain)
    unknown = RawFiles.model_validate({"files": ({"name": "x.jsonl.zst"}, {"name": "y.jsonl.zst"}), "source_bytes": 1000})
    assert text_bytes(unknown, Reading()) == 2500
    assert text_bytes(unknown.model_copy(update={"source_bytes": None}), Reading()) is None
    assert (bytes_per_token(ByteTokenizer()), bytes_per_token(SentencePieceTraining())) == (1.0, 4.0)


def test_a_seqio_task_whose_data_can_change_unseen_is_named(tmp_path: Path) -> None:
    def warnings(**dataset: Any) -> tuple[str, ...]:
        run = Run(tmp_path, {"big": 1.0}, 10)
        theirs = {"name": "theirs", "seqio_task": "t", **dataset}
        mixture = Mixture.model_validate({**dict(run.config.data), "datasets": (theirs,), "weights": {"theirs": 1.0}})
        config = run.config.model_copy(update={"data": mixture})
        return planned_data(config, mixture_steps(mixture), tmp_path).warnings

    (warning,) = warnings(seqio_module="tests.seqio_tokenizers")
    assert "dataset 'theirs': when the data that the SeqIO task reads changes, that is not seen" in warning
    assert "dataset.revision" in warning
    assert warnings(seqio_module="tests.seqio_tokenizers", revision="2024-05-01") == ()
    (warning,) = warnings(seqio_module="no_such_module", revision="1")
    assert "seqio_module is found nowhere on the import path" in warning


def test_a_plan_shows_its_warnings_and_a_disk_is_refused_for_what_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(tmp_path / "run", {"big": 1.0}, 1000, max_epochs={"big": 1.0})
    plan = plan_run(run.config, tmp_path / "run" / "root")
    assert [line for line in plan_lines(plan) if line.startswith("warning: ")] == [f"warning: {warning}" for warning in plan.warnings]
    assert len(plan.warnings) == 1
    assert component_rows(plan)[0][3].startswith("about 1 of ")
    known = plan.checkpoint_bytes + plan.fetch_bytes

    def with_free(free: int) -> planning.Plan:
        monkeypatch.setattr(disk_space.shutil, "disk_usage", lambda place: type("Usage", (), {"free": free})())
        return plan_run(run.config, tmp_path / "run" / "root")

    assert len(with_free(known + 3 * plan.fetch_bytes).warnings) == 1
    assert f"this run needs about {known + 2 * plan.fetch_bytes:,}: " in with_free(known + 10).warnings[1]
    with pytest.raises(ValueError, match=r"bytes free, this run needs about .* free some space, choose another --root"):
        with_free(known - 1)
