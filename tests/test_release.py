"""The card of an export, and its way to the hub."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import constants

from flows.command_line import run_command
from model.config import LlamaConfig
from model.durable import write_durably
from model.train_config import SimpleTrainConfig
from tasks.artifacts import commit
from tasks.config import ExportConfig, TrainingStep
from tasks.data_steps import RawFiles
from tasks.experiment_record import write_record
from tasks.hub_push import check_push, push_export
from tasks.model_card import CARD, LICENCE_PLACEHOLDER, model_card
from tasks.steps import Step
from tests.hub_repository import HubRepository
from tests.loopback_server import loopback
from tests.prefect_server import free_port
from tests.small_run import SmallRun

MODEL = LlamaConfig(seq_len=64, hidden_dim=32, intermediate_dim=64, num_layers=2, num_heads=2, num_kv_heads=1)
TRAIN = SimpleTrainConfig(train_batch_size=8, num_train_steps=12, learning_rate=2e-2)
NONE = Step(kind="mixtures", name="none", config=ExportConfig())
HF = {
    "config.json": json.dumps({"architectures": ["LlamaForCausalLM"], "vocab_size": 400}).encode(),
    "generation_config.json": b"{}",
    "model.safetensors": bytes(range(256)) * 40,
    "tokenizer.json": b"{}",
}


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    """The directory of a committed run with a committed export and its card."""
    small = SmallRun(tmp_path / "data")
    files = small.steps.downloads[0].config
    assert isinstance(files, RawFiles)
    told = files.model_copy(update={"licence": "CC-BY-4.0", "revision": "v3", "homepage": "https://huggingface.co/datasets/org/web"})
    raw = replace(small.steps.downloads[0], config=told)
    mixture = replace(small.steps.mixture, upstream=(small.steps.tokenizer, small.tokens, raw))
    training = Step(kind="checkpoints", name="mine", config=TrainingStep(model=MODEL, train=TRAIN), upstream=(mixture,))
    export = Step(kind="hf", name="mine", config=ExportConfig(), upstream=(training, mixture), subdirectory_of=training)
    directory = Path(str(training.directory(tmp_path / "root")))
    directory.mkdir(parents=True)
    final = {"train/loss": 3.5, "eval/loss": 3.25, "eval/bpb": 1.75, "eval/web/loss": 3.25, "eval/web/bpb": 1.75}
    stats = {"step": 12, "final": final, "components": {"web": {"tokens": 6144.0, "epochs": 2.5}}}
    commit(directory, training, files=[], stats=stats)
    write_record(directory, {"code": {"commit": "0123abcd", "dirty": True}})
    (directory / "hf").mkdir()
    for name, data in HF.items():
        (directory / "hf" / name).write_bytes(data)
    write_durably(directory / "hf" / CARD, model_card(training, ExportConfig(), stats, directory / "hf", 12).encode())
    commit(directory / "hf", export, stats={})
    return directory


def test_the_card_says_what_the_model_is_and_comes_from(exported: Path) -> None:
    card = (exported / "hf" / CARD).read_text(encoding="utf-8")
    assert card.startswith('---\nlicense: "unknown"\n')
    assert 'datasets: ["org/web"]' in card
    assert "| [web](https://huggingface.co/datasets/org/web) | CC-BY-4.0 | v3 | 6,144 | 2.5 |" in card
    assert "| held out, all | 3.2500 | 1.7500 |" in card
    assert card.count("| held out, ") == 2
    assert "Code: commit `0123abcd` with uncommitted changes." in card
    assert "AutoModelForCausalLM.from_pretrained" in card
    assert LICENCE_PLACEHOLDER in card
    told = json.loads(card.split("```json\n")[1].split("\n```")[0])
    assert told == {"model": MODEL.identity(), "train": TRAIN.identity(), "export": ExportConfig().identity()}
    assert str(exported.parent) not in card


def test_the_card_of_a_run_that_goes_on_counts_its_own_steps(exported: Path) -> None:
    config = TrainingStep(model=MODEL, train=TRAIN, initial_weights="0" * 64)
    training = Step(kind="checkpoints", name="mine", config=config, upstream=(NONE,))
    stats = {"origin": {"step": 4, "row": 0, "tokens": 2048}}
    card = model_card(training, ExportConfig(), stats, exported / "hf", 12)
    assert "trained from the weights of another one on 4.1k tokens in 8 steps, after step 4 of that one, with" in card
    assert "on 1.02k tokens in the first 2 of 8 steps, after step 4" in model_card(training, ExportConfig(), stats, exported / "hf", 6)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubRepository]:
    monkeypatch.setenv("HF_TOKEN", HubRepository.TOKEN)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # LFS is what the stand-in speaks
    with loopback() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr("huggingface_hub.hf_api.ENDPOINT", server.url, raising=False)
        yield HubRepository(server)


def test_an_export_is_pushed_whole_and_as_it_is(exported: Path, hub: HubRepository, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["push", str(exported), "--repo", "org/name"]) == 0
    files = {path.name: path.read_bytes() for path in (exported / "hf").iterdir() if path.name != "manifest.json"}
    assert hub.files == files
    assert hub.files.keys() == {*HF, CARD}
    assert "private" in hub.created[0].values()
    assert hub.commits == [f"Export of {exported.name}"]
    said = capsys.readouterr()
    assert f"pushed: {hub.server.url}/org/name/commit/abc" in said.out
    assert "choose one in README.md" in said.out
    assert HubRepository.TOKEN not in said.out + said.err


def test_a_push_is_tried_out_before_the_run_that_ends_with_it(hub: HubRepository, monkeypatch: pytest.MonkeyPatch) -> None:
    check_push("org/name")
    assert hub.created == [], "nothing is made yet"
    monkeypatch.setenv("HF_TOKEN", "hf_unknown")
    with pytest.raises(ValueError, match=r"the hub refused 'org/name'"):
        check_push("org/name")
    monkeypatch.setattr("huggingface_hub.hf_api.constants.ENDPOINT", f"http://127.0.0.1:{free_port()}")
    with pytest.raises(ValueError, match=r"the hub cannot be reached .*: try again when this machine is online"):
        check_push("org/name")
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(ValueError, match="HF_TOKEN is not set"):
        check_push("org/name")


def test_a_branch_is_made_where_one_is_asked_for(exported: Path, hub: HubRepository) -> None:
    push_export(str(exported / "hf"), "org/name", revision="step-12", public=True)
    assert hub.branches == ["step-12"]
    assert "public" in hub.created[0].values()


def test_what_cannot_be_pushed_is_refused_with_the_remedy(exported: Path, hub: HubRepository, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"--repo='a/b/c'"):
        push_export(str(exported), "a/b/c")
    monkeypatch.setenv("HF_TOKEN", "hf_read_only")
    with pytest.raises(ValueError, match=r"refused 'org/name' .*write access") as refused:
        push_export(str(exported), "org/name")
    assert "hf_read_only" not in str(refused.value)
    (exported / "hf" / CARD).write_text("other")
    with pytest.raises(ValueError, match=r"damaged \(README.md"):
        push_export(str(exported), "org/name")
    (exported / "hf" / "config.json").unlink()
    with pytest.raises(ValueError, match="has no export"):
        push_export(str(exported), "org/name")
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(ValueError, match="HF_TOKEN is not set"):
        push_export(str(exported), "org/name")
    assert hub.files == {}
