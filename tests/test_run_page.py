"""The page of a run: what it shows of a finished run, of an unfinished one and of what went wrong, and that it needs no other machine."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from flows.command_line import run_command
from model.config import LlamaConfig
from model.durable import write_json
from model.jumps import SKIPPED_DATA, skip_data
from model.train_config import SimpleTrainConfig
from tasks import objects
from tasks.artifacts import commit
from tasks.config import EvalHarnessConfig, TrainingStep
from tasks.json_files import write_json as write_place
from tasks.obligations import Evaluation, Ledger
from tasks.places import ObjectPath, working_directory
from tasks.run_page import PAGE, page_values, seconds_in_steps, write_run_page
from tasks.steps import Step
from tasks.trainer_child import JOB_FILE
from tests.object_store import BUCKET, object_store, use_store

LOADING = frozenset(("src", "href", "srcset", "action", "data", "poster", "background", "formaction", "xlink:href"))


class Page(HTMLParser):
    """The tags of a page, what they load, and its text outside of scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.tags: list[str] = []
        self.policy = ""
        self.text = ""
        self._inside = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._inside = tag
        self.tags.append(tag)
        self.loads += [value or "" for name, value in attrs if name in LOADING]
        if dict(attrs).get("http-equiv") == "Content-Security-Policy":
            self.policy = dict(attrs).get("content") or ""

    def handle_data(self, data: str) -> None:
        if self._inside not in ("script", "style"):
            self.text += data


MODEL = LlamaConfig(seq_len=10, hidden_dim=32, intermediate_dim=64, num_layers=2, num_heads=2, num_kv_heads=1)
TRAIN = SimpleTrainConfig(train_batch_size=20, num_train_steps=20, learning_rate=2e-2)
STEP = Step(kind="checkpoints", name="mine", config=TrainingStep(model=MODEL, train=TRAIN))


def stats(final: dict[str, Any]) -> dict[str, Any]:
    return {"step": 20, "final": final, "components": {"plays": {"tokens": 4000.0, "epochs": 1.25}}}


def made_run(root: Path, *, steps: int = 20, finished: bool = True) -> Path:
    run = root / "checkpoints" / "mine-0123456789abcdef"
    run.mkdir(parents=True)
    write_json(run / JOB_FILE, {"name": "mine", "model": {}, "train": {"num_train_steps": 20}})
    rows: list[dict[str, Any]] = [
        {
            "step": step,
            "train/loss": 5 - step / 10,
            "grad/norm/total": 1.0,
            "throughput/duration": 2.0,
            "throughput/tokens_per_second": 100.0,
            "throughput/total_tokens": 200.0 * step,
            "throughput/mfu": 0.4,
            "goodput": 0.9,
            "optim/skipped_step": float(step == 10),
        }
        for step in range(5, steps + 1, 5)
    ]
    rows[-1] |= {"eval/loss": 3.25, "eval/bpb": 1.5, "eval/plays/loss": 3.25, "eval/plays/bpb": 1.5}
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (run / "samples.jsonl").write_text(json.dumps({"step": steps, "prompt": "To be", "text": "To be <script>alert(1)</script>"}) + "\n")
    if finished:
        commit(run, STEP, files=["metrics.jsonl", "samples.jsonl"], stats=stats(rows[-1]))
    record = {
        "description": "does it learn?",
        "plan": {"tokens": 4000, "seconds": 80.0, "dollars": 1000.0},
        "config": {"name": "mine", "train": {"learning_rate": 0.003}},
        "code": {"commit": "abc123", "dirty": True},
        "steps": [{"step": "checkpoints/mine", "fingerprint": "0123456789abcdef" * 4}],
        "links": {"artifacts": str(run)},
        "launches": [{"at": "2026-01-01T00:00:00Z", "flow_run": {}}, {"at": "2026-01-02T00:00:00Z", "flow_run": {"name": "second"}}],
    }
    (root / "experiments").mkdir()
    write_json(root / "experiments" / "mine-0123456789abcdef.json", record)
    return run


def test_a_page_shows_the_run_and_what_went_wrong(tmp_path: Path) -> None:
    run = made_run(tmp_path)
    skip_data(run, 10, 64, "loss nan")
    (run / "checkpoints" / "damaged-15-123").mkdir(parents=True)
    ledger = Ledger(run)
    harness = EvalHarnessConfig(tasks=("piqa",))
    ledger.owe(Evaluation(step=step, harness=harness) for step in (10, 20))
    ledger.keep(ledger.due[0].model_copy(update={"metrics": {"lm_eval/piqa/acc": 0.625}}))
    ledger.keep(ledger.due[0].model_copy(update={"error": "no such task"}))
    values = page_values(run)
    assert ("time in steps", "1 min 20 s", "40 s") in values["comparison"]
    assert ("dollars, at list price", "1,000", "500") in values["comparison"]
    assert ("tokens", "4k", "4k") in values["comparison"]
    assert ("tokens a second", "50", "100") in values["comparison"]
    assert values["components"] == [("plays", "4k", "1.25")]
    assert values["held_out"] == [("all", "3.2500", "1.5000"), ("plays", "3.2500", "1.5000")]
    assert values["evaluations"] == [(10, "lm_eval/piqa/acc", "0.625")]
    assert values["incidents"] == [
        ("started again", "2026-01-02T00:00:00Z", "second"),
        ("rolled back", "step 10", "64 rows of data left out: loss nan"),
        ("checkpoint damaged", "step 15", "set aside as damaged-15-123"),
        ("step skipped", "step 10", "loss 4.0, gradient norm 1.0"),
        ("evaluation owed", "step 20", "no such task"),
    ]
    page = Page(Path(str(write_run_page(run))).read_text(encoding="utf-8"))
    for shown in (
        "finished, train loss 3.0000",
        "does it learn?",
        "abc123, with changes",
        '"learning_rate": 0.003',
        "set aside as damaged-15-123",
    ):
        assert shown in page.text
    assert len(values["figures"]) == 4


def test_a_page_opens_offline(tmp_path: Path) -> None:
    text = Path(str(write_run_page(made_run(tmp_path)))).read_text(encoding="utf-8")
    page = Page(text)
    assert page.loads == [], "everything is in the page"
    assert not {"link", "iframe", "object", "embed", "base"} & set(page.tags)
    assert page.policy.startswith("default-src 'none'"), "a browser asks nobody for anything"
    assert "http" not in page.policy
    assert "https://" not in page.text
    assert "http://" not in page.text
    assert text.count("Plotly.newPlot(") >= 4
    assert "<script>alert(1)</script>" not in text, "what a model says is text"


def test_a_run_that_still_goes_has_a_page_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = made_run(tmp_path, steps=10, finished=False)
    assert run_command(["report", str(run)]) == 0
    assert capsys.readouterr().out.strip() == str(run / PAGE)
    assert "at step 10 of 20" in Page((run / PAGE).read_text(encoding="utf-8")).text
    (run / "metrics.jsonl").unlink()
    (run / "samples.jsonl").unlink()
    (tmp_path / "experiments" / "mine-0123456789abcdef.json").unlink()
    write_run_page(run)
    assert "no step was logged yet" in (run / PAGE).read_text(encoding="utf-8")


def test_a_finished_run_in_a_bucket_has_its_page_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_LLAMA_CACHE", str(tmp_path / "cache"))
    with object_store() as url:
        use_store(monkeypatch, url)
        root = ObjectPath(BUCKET, "page")
        place = STEP.directory(root)
        here = working_directory(place)
        here.mkdir(parents=True)
        (here / "metrics.jsonl").write_text(json.dumps({"step": 20, "train/loss": 3.0}) + "\n")
        commit(place, STEP, files=["metrics.jsonl"], stats=stats({"train/loss": 3.0}))
        skipped = {"skipped": [{"step": 10, "rows": 64, "why": "a spike", "asked_for": True}]}
        write_place(place / SKIPPED_DATA, skipped)
        write_place(place / "checkpoints/damaged-15-1/hashes.json", {})
        monkeypatch.setenv("PREFECT_LLAMA_CACHE", str(tmp_path / "another"))
        assert run_command(["report", str(place)]) == 0
        page = Page(objects.read(ObjectPath.parse(f"{place}/{PAGE}"))[0].decode())
    assert "finished, train loss 3.0000" in page.text
    assert "64 rows of data left out: a spike" in page.text
    assert "set aside as damaged-15-1" in page.text


def test_where_there_is_no_run_there_is_no_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["report", str(tmp_path)]) == 2
    assert "holds no run: give the directory of one" in capsys.readouterr().err


def test_steps_between_two_logged_ones_count_and_others_do_not() -> None:
    rows = [{"step": 1, "throughput/duration": 4.0}, {"step": 10, "throughput/duration": 1.0}, {"step": 10, "eval/loss": 3.0}]
    assert seconds_in_steps(rows) == 4.0 + 9.0
    assert seconds_in_steps([]) == 0.0
    assert seconds_in_steps(rows[1:], begin=8) == 2.0


def test_a_run_that_goes_on_has_its_own_steps_and_tokens_on_its_page(tmp_path: Path) -> None:
    run = made_run(tmp_path)
    for path in run.parent.parent.rglob("*.json"):
        if "plan" in (content := json.loads(path.read_text())):
            content["plan"] |= {"tokens": 1000, "origin": {"step": 15, "row": 0, "tokens": 3000}}
            path.write_text(json.dumps(content))
    comparison = page_values(run)["comparison"]
    assert comparison[:3] == [("goes on after step", "15", "15"), ("steps", "5", "5"), ("tokens", "1k", "1k")]
