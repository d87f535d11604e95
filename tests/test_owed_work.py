"""Exports of checkpoints, the push of the last one and numbers for trackers: each owed in the ledger, made once, made up, told."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tasks import objects
from tasks.artifacts import Artifact
from tasks.checkpoint_exports import saved_steps
from tasks.config import EvalHarnessConfig, ExportConfig, RunConfig
from tasks.obligations import OBLIGATIONS, Ledger
from tasks.owed_work import BUCKET_SECONDS, FAILED_SECONDS, ObligationsLeft, OwedWork, Workers
from tasks.places import ObjectPath, Place, working_directory
from tasks.presets import preset
from tests.object_store import BUCKET, object_store, use_store


def run_config(every: int | None = None, *tasks: str, **changes: Any) -> RunConfig:
    """The preset, 240 steps with a checkpoint every 40."""
    base = preset("debug")
    train = base.train.model_copy(update={"max_checkpoints": None, "steps_per_hf_export": every})
    return base.model_copy(update={"train": train, "eval_harness": EvalHarnessConfig(tasks=tasks, steps=80), **changes})


class Hands:
    """Stands for what does the work: remembers what it was asked, and fails where it is told to."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.asked: list[tuple[Any, ...]] = []
        self.errors: dict[str, BaseException] = {}
        self.trackers_take = True

    def workers(self) -> Workers:
        return Workers(
            evaluate=lambda job: self._done("evaluate", job.model.name),
            export=lambda step, export: self._done("export", step, export.dtype),
            push=lambda repo_id: self._done("push", repo_id).path,
            track=self._track,
        )

    def _done(self, *asked: Any) -> Artifact:
        self.asked.append(asked)
        if (error := self.errors.get(asked[0])) is not None:
            raise error
        directory = self.place / "-".join(map(str, asked)).replace("/", "-")
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "results.json").write_text(json.dumps({"metrics": {"lm_eval/mine/acc": 0.5}}))
        return Artifact(kind="any", name="any", path=str(directory), fingerprint="0" * 64)

    def _track(self, rows: list[dict[str, Any]]) -> bool:
        self.asked.append(("track", *(row["step"] for row in rows)))
        return self.trackers_take


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return tmp_path / "checkpoints" / "debug-0123456789abcdef"


@pytest.fixture
def hands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hands:
    monkeypatch.setattr("tasks.eval_harness.brought_here", lambda artifact: artifact)
    monkeypatch.setattr("tasks.owed_work.brought_here", lambda artifact: artifact)
    return Hands(tmp_path / "made")


def reach(run: Path, *steps: int) -> None:
    for step in steps:
        (run / "checkpoints" / str(step)).mkdir(parents=True)


def owed_work(run: Place, config: RunConfig, hands: Hands, said: list[str] | None = None, **options: Any) -> OwedWork:
    tell = (said if said is not None else []).append
    return OwedWork(run, config, options.pop("export", config.export), hands.workers(), tell, **{"beside": True, **options})


def test_checkpoints_are_exported_as_they_are_reached_once_and_never_the_last(run: Path, hands: Hands) -> None:
    made = owed_work(run, run_config(80), hands)
    reach(run, 40)
    made.while_training()
    assert hands.asked == []
    reach(run, 80, 120)
    made.while_training()
    made.while_training()
    assert hands.asked == [("export", 80, "float32")]
    reach(run, 160, 200, 240)
    assert made.at_the_end() == []
    assert hands.asked == [("export", 80, "float32"), ("export", 160, "float32")]
    owed_work(run, run_config(80), hands).at_the_end()
    assert len(hands.asked) == 2


def test_unset_means_every_checkpoint_and_minus_one_the_last_alone(run: Path, hands: Hands) -> None:
    reach(run, 40, 120, 240)  # 80 was never saved: an earlier start had another cadence
    owed_work(run, run_config(-1), hands).at_the_end()
    assert hands.asked == []
    assert not (run / OBLIGATIONS).exists()
    owed_work(run, run_config(), hands).at_the_end()
    assert [asked[1] for asked in hands.asked] == [40, 120]


def test_what_a_killed_start_owed_is_made_up_although_the_next_asks_for_nothing(run: Path, hands: Hands) -> None:
    reach(run, 40, 80)
    hands.errors["export"] = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        owed_work(run, run_config(40), hands).while_training()
    assert [one.step for one in Ledger(run).due] == [40, 80]
    hands.errors.clear()
    hands.asked.clear()
    owed_work(run, run_config(-1), hands).at_the_end()
    assert [asked[1] for asked in hands.asked] == [40, 80]
    assert Ledger(run).due == []


def test_a_failed_export_stops_nothing_and_is_tried_again_by_the_next_start(run: Path, hands: Hands) -> None:
    reach(run, 40, 240)
    said: list[str] = []
    hands.errors["export"] = ValueError("the disk is full")
    made = owed_work(run, run_config(40), hands, said)
    made.while_training()
    made.while_training()
    assert said == ["the export of step 40 failed: the disk is full"]
    with pytest.raises(ObligationsLeft, match=r"debug is trained, but this failed: the export of step 40: the disk is full\. The same"):
        made.at_the_end()
    hands.errors.clear()
    owed_work(run, run_config(40), hands).at_the_end()
    assert Ledger(run).due == []
    reach(run, 80)
    (run / "checkpoints" / "80").rmdir()
    owed_work(run, run_config(40), hands).at_the_end()  # it was never seen: not owed


def test_exports_in_another_format_are_made_again(run: Path, hands: Hands) -> None:
    reach(run, 80, 240)
    for dtype in ("float32", "bfloat16", "bfloat16"):
        owed_work(run, run_config(80, export=ExportConfig(dtype=dtype)), hands).at_the_end()
    assert hands.asked == [("export", 80, "float32"), ("export", 80, "bfloat16")]


def test_the_last_export_is_pushed_at_the_end_once_and_a_failed_push_is_owed(run: Path, hands: Hands) -> None:
    config = run_config(-1, export=ExportConfig(hub_repo_id="org/name"))
    reach(run, 240)
    owed_work(run, config, hands).while_training()
    assert hands.asked == []
    hands.errors["push"] = ValueError("the hub cannot be reached")
    with pytest.raises(ObligationsLeft, match=r"the push of its export to org/name: the hub cannot be reached\. The same command"):
        owed_work(run, config, hands).at_the_end()
    hands.errors.clear()
    owed_work(run, run_config(-1), hands).while_training()
    assert len(hands.asked) == 1, "an owed push waits for the end"
    owed_work(run, run_config(-1), hands).at_the_end()
    owed_work(run, config, hands).at_the_end()
    assert hands.asked == [("push", "org/name")] * 2
    owed_work(run, run_config(-1, export=ExportConfig(hub_repo_id="org/name", dtype="bfloat16")), hands).at_the_end()
    owed_work(run, run_config(-1, export=ExportConfig(hub_repo_id="org/other")), hands).at_the_end()
    assert hands.asked[2:] == [("push", "org/name"), ("push", "org/other")]


def test_a_repository_is_named_with_its_owner() -> None:
    with pytest.raises(ValueError, match=r"export.hub_repo_id='name' is no repository of the hub: write ORG/NAME"):
        ExportConfig(hub_repo_id="name")


def test_nothing_is_pushed_where_the_export_takes_no_part(run: Path, hands: Hands) -> None:
    reach(run, 240)
    owed_work(run, run_config(-1, export=ExportConfig(hub_repo_id="org/name")), hands, exports_last=False).at_the_end()
    assert hands.asked == []


def test_trackers_get_the_numbers_after_the_training_until_they_have_them(run: Path, hands: Hands) -> None:
    config = run_config(-1, "mine", track=("wandb",))
    reach(run, 80, 160, 240)
    hands.trackers_take = False
    made = owed_work(run, config, hands)
    made.while_training()
    assert [asked[0] for asked in hands.asked] == ["evaluate"] * 3
    made.at_the_end()
    assert hands.asked[3:] == [("track", 80, 160, 240)]
    hands.trackers_take = True
    owed_work(run, config, hands).at_the_end()
    owed_work(run, config, hands).at_the_end()
    assert hands.asked[3:] == [("track", 80, 160, 240)] * 2


def test_a_place_that_does_not_answer_stops_no_training(run: Path, hands: Hands, monkeypatch: pytest.MonkeyPatch) -> None:
    reach(run, 40)
    said: list[str] = []
    answers = saved_steps

    def refused(*asked: Any) -> list[int]:
        raise OSError("no answer")

    now = 100.0
    monkeypatch.setattr("tasks.owed_work.time.monotonic", lambda: now)
    monkeypatch.setattr("tasks.owed_work.saved_steps", refused)
    made = owed_work(run, run_config(40), hands, said)
    made.while_training()
    made.while_training()
    assert said == ["what debug owes waits: no answer"]
    with pytest.raises(OSError, match="no answer"):
        made.at_the_end()
    monkeypatch.setattr("tasks.owed_work.saved_steps", answers)
    now += FAILED_SECONDS
    made.while_training()
    assert hands.asked == [("export", 40, "float32")]


def test_a_ledger_of_an_earlier_version_is_read(run: Path, hands: Hands) -> None:
    run.mkdir(parents=True)
    harness = EvalHarnessConfig(tasks=("mine",), steps=80).model_dump(mode="json")
    old = [{"step": 80, "harness": harness, "metrics": {"lm_eval/mine/acc": 0.25}, "error": None}]
    (run / OBLIGATIONS).write_text(json.dumps({"schema": 1, "obligations": old}))
    assert owed_work(run, run_config(-1), hands).at_the_end() == [{"step": 80, "lm_eval/mine/acc": 0.25}]
    assert hands.asked == []


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ObjectPath]:
    monkeypatch.setenv("PREFECT_LLAMA_CACHE", str(tmp_path / "cache"))
    with object_store() as url:
        use_store(monkeypatch, url)
        yield ObjectPath(BUCKET, "team/checkpoints/debug-0123456789abcdef")


def test_in_a_bucket_checkpoints_count_when_they_are_whole_and_are_evaluated_by_their_export(
    bucket: ObjectPath, hands: Hands, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr("tasks.owed_work.time.monotonic", lambda: now)
    monkeypatch.setattr("tasks.owed_work.model_here", lambda run: Path(run) / "hf")

    def write(step: int, *names: str) -> None:
        for name in names:
            objects.write(bucket / f"checkpoints/{step}/{name}", b"{}", generation=None)

    copies = {step: working_directory(bucket / f"hf-step-{step}") for step in (80, 160)}
    for copy in copies.values():
        copy.mkdir(parents=True)
    made = owed_work(bucket, run_config(160, "mine"), hands)
    write(80, "state/d/0")
    made.while_training()
    assert hands.asked == []
    write(80, "commit_success.txt")
    made.while_training()
    assert hands.asked == [], "it is not asked about every second"
    now += BUCKET_SECONDS
    made.while_training()
    assert hands.asked == [("export", 80, "float32"), ("evaluate", "export-80-float32")]
    assert [step for step, copy in copies.items() if copy.exists()] == [160], "what is done with takes no disk here"
    for step in (120, 160, 240):
        write(step, "state/d/0", "commit_success.txt")
    now += BUCKET_SECONDS
    made.while_training()
    done = [("export", 160, "float32"), ("export", 160, "float32"), ("evaluate", "export-160-float32")]
    assert hands.asked[2:] == done, "the second finds what the first made"
    assert [row["step"] for row in made.at_the_end()] == [80, 160, 240]
    assert hands.asked[5:] == [("evaluate", "hf")]
    assert objects.read(bucket / OBLIGATIONS)[0].startswith(b"{")
