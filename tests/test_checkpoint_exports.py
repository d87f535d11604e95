"""A run with exports of its checkpoints, evaluations of them, a push at the end and W&B: killed, refused, made up; also in a bucket."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from model.metrics import read_json_lines
from tasks import objects
from tasks.audit import verify_tree
from tasks.obligations import EVALS, Ledger
from tasks.places import ObjectPath
from tests.hub_repository import HubRepository
from tests.lm_eval_tasks import write_tasks
from tests.loopback_server import loopback
from tests.main_job import MainJob, checkpoint_directory
from tests.object_store import BUCKET, object_store, use_store
from tests.tracker_files import wandb_rows

pytestmark = pytest.mark.slow

WHOLE = {"config.json", "generation_config.json", "manifest.json", "model.safetensors", "README.md", "tokenizer.json"}
EXPORTED = ("--train.max-checkpoints", "None", "--train.steps-per-hf-export", "10")


def evaluated(place: Path) -> tuple[str, ...]:
    tasks = write_tasks(place / "tasks", [f"to be, or not to be, that is question {number}" for number in range(8)])
    return ("--eval-harness.tasks", "choose", "--eval-harness.steps", "15", "--eval-harness.task-dir", str(tasks))


@pytest.fixture
def hub() -> Iterator[HubRepository]:
    with loopback() as server:
        yield HubRepository(server)


def test_everything_that_a_run_owes_is_made_up_after_a_kill(tmp_path: Path, hub: HubRepository) -> None:
    root, home = tmp_path / "root", tmp_path / "home"
    flags = (*EXPORTED, *evaluated(tmp_path), "--export.hub-repo-id", "org/name", "--track", "wandb")
    offline = {"HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf"), "HF_ENDPOINT": hub.server.url, "HF_HUB_DISABLE_XET": "1"}

    refused = MainJob(root, home, *flags, **offline, HF_TOKEN="hf_other")
    assert refused.status() != 0
    assert "export.hub_repo_id='org/name' could not be pushed to at the end: the hub refused" in refused.output
    assert not (root / "checkpoints").exists(), "refused before anything is trained"

    job = MainJob(root, home, *flags, **offline, HF_TOKEN=HubRepository.TOKEN)
    job.until("hf-step-10 job")
    job.kill(tree=True)
    said = MainJob(root, home, *flags, **offline, HF_TOKEN=HubRepository.TOKEN).succeed()
    assert HubRepository.TOKEN not in said

    run = checkpoint_directory(root)
    assert {path.name for path in run.glob("hf*")} == {"hf", "hf-step-10", "hf-step-20"}
    for name in ("hf", "hf-step-10", "hf-step-20"):
        assert {path.name for path in (run / name).iterdir()} >= WHOLE
    weights = [(run / name / "model.safetensors").read_bytes() for name in ("hf-step-10", "hf-step-20", "hf")]
    assert len(set(weights)) == 3
    card = (run / "hf-step-10" / "README.md").read_text()
    assert "in the first 10 of 30 steps" in card
    (loss,) = [row["train/loss"] for row in read_json_lines(run / "metrics.jsonl") if row["step"] == 10]
    assert f"| training, the last logged step | {loss:.4f} | |" in card

    ledger = Ledger(run)
    assert ledger.due == []
    rows = [json.loads(line) for line in (run / EVALS).read_text().splitlines()]
    assert [row["step"] for row in rows] == [15, 30]
    assert hub.files["model.safetensors"] == weights[-1]
    assert len(hub.commits) == 1
    tracked = [row for row in wandb_rows(run) if "lm_eval/choose/acc" in row]
    assert [(row["step"], row["lm_eval/choose/acc"]) for row in tracked] == [(row["step"], row["lm_eval/choose/acc"]) for row in rows]
    assert max(row["_step"] for row in wandb_rows(run) if "train/loss" in row) < min(row["_step"] for row in tracked)

    again = MainJob(root, home, *flags, **offline)  # without a token: nothing is left to push
    assert "pushed:" not in again.succeed()
    assert verify_tree(root).ok
    MainJob(root, home, *EXPORTED, "--export.dtype", "bfloat16", **offline).succeed()
    assert (run / "hf-step-10" / "model.safetensors").stat().st_size < 0.6 * len(weights[0]), "other settings make them again"
    assert verify_tree(root).ok


def test_in_a_bucket_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with object_store() as url:
        use_store(monkeypatch, url)
        monkeypatch.setenv("PREFECT_LLAMA_CACHE", str(tmp_path / "cache"))
        place = f"gs://{BUCKET}/{tmp_path.name}"
        variables = {"STORAGE_EMULATOR_HOST": url, "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
        flags = (*EXPORTED, *evaluated(tmp_path))
        MainJob(tmp_path / "root", tmp_path / "home", *flags, place=place, **variables).succeed()
        (run,) = [found for found in objects.directories_in(ObjectPath.parse(place) / "checkpoints") if found.name.startswith("job-")]
        assert Ledger(run).due == []
        made = {name.split("/")[0] for name in objects.below(run) if name.startswith("hf")}
        assert made == {"hf", "hf-step-10", "hf-step-15", "hf-step-20"}, "a step that is evaluated is exported for it"
        for name in made:
            assert set(objects.below(run / name)) >= WHOLE
        card = objects.read(run / "hf-step-10" / "README.md")[0].decode()
        assert "in the first 10 of 30 steps" in card
        assert "| training, the last logged step | n" not in card
        rows = [json.loads(line) for line in objects.read(run / EVALS)[0].decode().splitlines()]
        assert [row["step"] for row in rows] == [15, 30]
        assert all(0 <= row["lm_eval/choose/acc"] <= 1 for row in rows)
