"""`verify` reads every byte and names each bad file; `adopt` registers data that is already there."""

from pathlib import Path

import pytest

from model.config_base import Config
from tasks.artifacts import ArtifactError, check, commit, open_artifact, read_manifest
from tasks.audit import Adopted, adopt, verify_tree
from tasks.steps import Step


class Reading(Config):
    source: str = "plays"


def committed(step: Step, root: Path) -> Path:
    directory = step.directory(root)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "data.txt").write_text("data")
    commit(directory, step, stats={})
    return directory


def test_a_root_is_verified_with_artifacts_inside_artifacts_and_unfinished_ones(tmp_path: Path):
    training = Step("checkpoints", "tiny", Reading())
    export = Step("hf", "tiny", Reading(), upstream=(training,), subdirectory_of=training)
    good, inside = committed(training, tmp_path), committed(export, tmp_path)
    flipped = committed(Step("raw", "plays", Reading()), tmp_path)
    (flipped / "data.txt").write_text("dAta")
    unfinished = Step("tokens", "plays", Reading()).directory(tmp_path)
    unfinished.mkdir(parents=True)
    report = verify_tree(tmp_path)
    assert {artifact.directory: bool(artifact.damages) for artifact in report.artifacts} == {good: False, inside: False, flipped: True}
    assert report.unfinished == (unfinished,)
    assert not report.ok
    assert f"DAMAGED {flipped}: data.txt has other contents" in str(report)
    assert f"ok {good}: 1 files, 4 bytes" in str(report)


@pytest.mark.parametrize("level", [0, 1, 2])
def test_an_artifact_a_kind_and_a_root_can_be_verified(tmp_path: Path, level: int):
    directory = committed(Step("raw", "plays", Reading()), tmp_path)
    report = verify_tree([directory, *directory.parents][level])
    assert report.ok
    assert report.artifacts[0].size == 4


def test_verify_does_not_rest_on_what_was_hashed_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    directory = committed(Step("raw", "plays", Reading()), tmp_path)
    monkeypatch.setattr("tasks.manifests.digest_once", lambda path: pytest.fail("taken from memory"))
    assert verify_tree(directory).ok


def test_torn_manifest_empty_root_and_no_directory(tmp_path: Path):
    directory = committed(Step("raw", "plays", Reading()), tmp_path)
    (directory / "manifest.json").write_text("{")
    assert "manifest.json is not JSON" in str(verify_tree(tmp_path))
    (tmp_path / "empty").mkdir()
    assert not verify_tree(tmp_path / "empty").ok
    with pytest.raises(ArtifactError, match="there is no directory"):
        verify_tree(tmp_path / "absent")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Data made elsewhere."""
    (tmp_path / "mine" / "part").mkdir(parents=True)
    (tmp_path / "mine" / "a.txt").write_text("alpha")
    (tmp_path / "mine" / "part" / "b.txt").write_text("beta")
    return tmp_path / "mine"


def test_adopted_data_stays_where_it_is_and_is_an_artifact(data: Path, tmp_path: Path):
    artifact = adopt(data, tmp_path / "root", "raw", "mine", {"source": "a colleague"})
    assert Path(artifact.path).parent == tmp_path / "root" / "raw"
    assert Path(artifact.path).resolve() == data.resolve()
    assert open_artifact(artifact.path, artifact.fingerprint) == artifact
    manifest = read_manifest(data)
    assert manifest is not None
    assert manifest.stats["provenance"] == {"source": "a colleague"}
    step = Step("raw", "mine", Adopted(content=manifest.stats["content"]))
    assert step.is_committed(tmp_path / "root", hashes=True)
    assert verify_tree(tmp_path / "root").ok


def test_data_can_be_adopted_as_the_result_of_a_step(data: Path, tmp_path: Path):
    step = Step("raw", "plays", Reading())
    assert adopt(data, tmp_path / "root", "raw", "plays", {}, step=step).fingerprint == step.fingerprint
    assert check(step.directory(tmp_path / "root"), step.fingerprint, hashes=True) == []
    (data / "manifest.json").unlink()
    with pytest.raises(ArtifactError, match="the step given is raw/plays"):
        adopt(data, tmp_path / "root", "raw", "other", {}, step=step)


def test_adopting_in_its_own_place_makes_no_link(tmp_path: Path):
    step = Step("raw", "plays", Reading())
    directory = step.directory(tmp_path)
    directory.mkdir(parents=True)
    (directory / "a.txt").write_text("alpha")
    adopt(directory, tmp_path, "raw", "plays", {}, step=step)
    assert not directory.is_symlink()
    assert step.is_committed(tmp_path)


def test_an_interrupted_adoption_can_be_repeated(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with monkeypatch.context() as patch:
        patch.setattr("tasks.audit.commit", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            adopt(data, tmp_path / "root", "raw", "mine", {})
    artifact = adopt(data, tmp_path / "root", "raw", "mine", {})
    assert open_artifact(artifact.path, artifact.fingerprint)


def test_what_cannot_be_adopted_is_refused(data: Path, tmp_path: Path):
    with pytest.raises(ArtifactError, match="not a directory"):
        adopt(data / "a.txt", tmp_path, "raw", "mine", {})
    (tmp_path / "empty").mkdir()
    with pytest.raises(ArtifactError, match="no file in it"):
        adopt(tmp_path / "empty", tmp_path, "raw", "mine", {})
    with pytest.raises(ValueError, match="a step's name"):
        adopt(data, tmp_path, "raw", "../mine", {})
    (data / "link").symlink_to("a.txt")
    with pytest.raises(ArtifactError, match="link or a special file"):
        adopt(data, tmp_path, "raw", "mine", {})
    (data / "link").unlink()
    artifact = adopt(data, tmp_path, "raw", "mine", {})
    with pytest.raises(ArtifactError, match=r"already has a manifest\.json \(raw/mine"):
        adopt(data, tmp_path, "raw", "mine", {})
    (data / "manifest.json").unlink()
    Path(artifact.path).unlink()
    Path(artifact.path).mkdir()
    with pytest.raises(ArtifactError, match="already exists"):
        adopt(data, tmp_path, "raw", "mine", {})
