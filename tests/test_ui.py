"""Prefect's UI in a real browser: the run form, a run under way, what it leaves. `make screenshots` keeps the pictures in docs/images."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from playwright.sync_api import Page, sync_playwright

from tests.prefect_server import Prefect, prefect_server
from tests.tpu_pool import work_pools

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
MODEL = {"seq_len": 128, "hidden_dim": 32, "intermediate_dim": 64, "num_heads": 2, "num_kv_heads": 1, "num_layers": 2}
PARAMETERS = {"num_train_steps": 1000, "train_batch_size": 4, "model": MODEL}
PATIENCE = 120_000  # milliseconds for what the UI has to show: a hang, not a slow machine

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine (Debian: apt install chromium)"),
]


@pytest.fixture(scope="module")
def prefect(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prefect]:
    home = tmp_path_factory.mktemp("prefect")
    with prefect_server(home, *work_pools(home)) as prefect:
        prefect.start("worker", "start", "--pool", "local")
        yield prefect


@pytest.fixture(scope="module")
def page() -> Iterator[Page]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1200, "height": 760}, color_scheme="light")
        page.set_default_timeout(PATIENCE)
        yield page
        browser.close()


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = Path(os.environ.get("PREFECT_LLAMA_SCREENSHOTS") or tmp_path_factory.mktemp("pictures"))
    place.mkdir(parents=True, exist_ok=True)
    return place


def answer(prefect: Prefect, path: str) -> Any:
    return httpx.get(f"{prefect.api}{path}", timeout=30).raise_for_status().json()


def artifacts(prefect: Prefect) -> dict[str, Any]:
    """The newest of each key."""
    return {artifact["key"]: artifact for artifact in reversed(prefect.post("/artifacts/filter", sort="CREATED_DESC")) if artifact["key"]}


def wait_for_progress(prefect: Prefect, run: str) -> None:
    """Until training is under way: some percent, not all."""
    deadline = time.monotonic() + 300
    while True:
        state = answer(prefect, f"/flow_runs/{run}")["state"]
        progress = artifacts(prefect).get("train-progress")
        if progress is not None and float(progress["data"]) >= 5:
            assert float(progress["data"]) < 100, "it was over before anybody looked: make it longer"
            return
        assert state["type"] not in ("FAILED", "CRASHED", "COMPLETED"), (prefect.home / "worker.log").read_text()[-3000:]
        assert time.monotonic() < deadline, state
        time.sleep(0.5)


def wait_for_drawing(page: Page) -> None:
    """Until the graph of the run is drawn: an empty one is a picture of one colour, which takes a few kilobytes."""
    deadline = time.monotonic() + PATIENCE / 1000
    while len(page.locator("canvas").first.screenshot()) < 10_000:
        assert time.monotonic() < deadline, "the graph of the run stayed empty"
        time.sleep(0.5)


def test_form_progress_and_artifacts(prefect: Prefect, page: Page, pictures: Path) -> None:
    ui = prefect.api.removesuffix("/api")
    deployment = answer(prefect, "/deployments/name/train-llama/train-llama")["id"]

    page.goto(f"{ui}/deployments/deployment/{deployment}/run")
    page.get_by_text("The run to start from; everything below changes it.").wait_for()
    for field in ("num_train_steps", "learning_rate", "model", "train", "data", "pool", "root"):
        assert page.get_by_text(f"{field} (Optional)", exact=True).count() == 1
    page.screenshot(path=pictures / "run-form.png")

    run = prefect.post(f"/deployments/{deployment}/create_flow_run", parameters=PARAMETERS)["id"]
    wait_for_progress(prefect, run)
    page.goto(f"{ui}/runs/flow-run/{run}")
    page.get_by_text("Running", exact=True).first.wait_for()
    page.get_by_text("mixtures shakespeare").first.wait_for()
    wait_for_drawing(page)
    page.screenshot(path=pictures / "run.png")
    page.goto(f"{ui}/artifacts/artifact/{artifacts(prefect)['train-progress']['id']}")
    page.get_by_text("train-progress").first.wait_for()
    page.get_by_text("Training debug").first.wait_for()
    page.screenshot(path=pictures / "progress.png")

    assert prefect.wait_for_last_run(1)["state"]["type"] == "COMPLETED", (prefect.home / "worker.log").read_text()[-3000:]
    made = artifacts(prefect)
    page.goto(f"{ui}/artifacts")
    for key in ("plan", "train-progress", "train-metrics", "loss-curve", "samples", "checkpoint", "run-summary"):
        page.get_by_text(key, exact=True).first.wait_for()
    for key, text in (("plan", "first run of this step"), ("run-summary", "unigram entropy")):
        page.goto(f"{ui}/artifacts/artifact/{made[key]['id']}")
        page.get_by_text(text).first.wait_for()
        page.screenshot(path=pictures / f"{key}.png")
    page.goto(f"{ui}/artifacts/artifact/{made['loss-curve']['id']}")
    page.wait_for_function("[...document.images].some(image => image.src.startsWith('data:image/png') && image.naturalWidth > 300)")
    page.screenshot(path=pictures / "loss-curve.png")


def test_the_form_and_the_table_of_a_sweep(prefect: Prefect, page: Page, pictures: Path) -> None:
    ui = prefect.api.removesuffix("/api")
    deployment = answer(prefect, "/deployments/name/sweep-llama/sweep-llama")["id"]
    page.goto(f"{ui}/deployments/deployment/{deployment}/run")
    for field in ("grid", "random", "max_concurrent", "budget", "pool"):
        page.get_by_text(f"{field} (Optional)", exact=True).first.wait_for()
    page.screenshot(path=pictures / "sweep-form.png")

    grid = ["train.learning_rate=1e-3,3e-3", "train.weight_decay=0.1,0.01"]
    prefect.post(f"/deployments/{deployment}/create_flow_run", parameters={"num_train_steps": 12, "train_batch_size": 4, "grid": grid})
    assert prefect.wait_for_last_run(1, "sweep-llama")["state"]["type"] == "COMPLETED", (prefect.home / "worker.log").read_text()[-3000:]
    made = artifacts(prefect)
    page.goto(f"{ui}/artifacts/artifact/{made['sweep-debug']['id']}")
    page.get_by_text("Arms of debug: 4 of 4 arms finished").first.wait_for()
    page.get_by_text("debug-learning_rate-0.001-weight_decay-0.01").first.wait_for()
    page.screenshot(path=pictures / "sweep-table.png")
    page.goto(f"{ui}/artifacts/artifact/{made['sweep-debug-summary']['id']}")
    page.get_by_text("4 of 4 arms finished").first.wait_for()
