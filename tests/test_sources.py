"""Sources: what files a source means and what they are called, what identifies them, and what is refused before work starts."""

from __future__ import annotations

import errno
import hashlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tasks.mixture_config import Dataset
from tasks.sources import DataError, SourceFile, check_file_name, check_files, find_one, list_files, public_location, source_memory
from tasks.sources.local_files import find_local, is_local


def corpus(directory: Path) -> Path:
    for name, text in {"b.txt": "second file\n", "a.txt": "first file\n", "sub/c.txt": "third file\n"}.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(text, encoding="utf-8")
    return directory


def dataset(*source: object, **changes: Any) -> Dataset:
    return Dataset(name="web", source=tuple(map(str, source)), **changes)


def names(given: Dataset) -> list[str]:
    return [file.name for file in list_files(given)]


def test_files_are_named_below_the_globs_fixed_part_and_ordered(tmp_path: Path) -> None:
    base = corpus(tmp_path / "x")
    (base / ".hidden.txt").write_text("x", encoding="utf-8")
    (base / ".git").mkdir()
    (base / ".git" / "d.txt").write_text("x", encoding="utf-8")
    assert names(dataset(base / "**" / "*.txt")) == ["a.txt", "b.txt", "sub/c.txt"]
    assert names(dataset(base / "**")) == ["a.txt", "b.txt", "sub/c.txt"]
    assert names(dataset(base / "*" / "*.txt")) == ["sub/c.txt"]
    assert names(dataset(base / "[ab].tx?")) == ["a.txt", "b.txt"]
    assert names(dataset(base / "b.txt")) == ["b.txt"]
    assert names(dataset(f"file://{base}/*.txt")) == names(dataset(f"file://localhost{base}/?.t%78t")) == ["a.txt", "b.txt"]
    assert names(dataset(base / "b.txt", base / "*.txt")) == ["000/b.txt", "001/a.txt", "001/b.txt"]


def test_local_files_are_identified_by_size_and_digest_not_by_place(tmp_path: Path) -> None:
    here, there = corpus(tmp_path / "here"), corpus(tmp_path / "there")
    first = list_files(dataset(here / "*.txt"))
    data = (here / "a.txt").read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    assert first[0].identity() == {"name": "a.txt", "bytes": len(data), "sha256": digest, "version": None}
    assert first[0].location == str(here / "a.txt")
    assert [file.identity() for file in list_files(dataset(there / "*.txt"))] == [file.identity() for file in first]


def test_a_published_digest_is_held_against_the_file(tmp_path: Path) -> None:
    base = corpus(tmp_path)
    digest = hashlib.sha256(b"first file\n").hexdigest()
    assert list_files(dataset(base / "a.txt", sha256={"a.txt": digest.upper()}))[0].sha256 == digest
    with pytest.raises(DataError, match=rf"dataset 'web': .*a\.txt has the sha256 {digest}, and dataset.sha256 says 0{{64}}"):
        list_files(dataset(base / "a.txt", sha256={"a.txt": "0" * 64}))
    with pytest.raises(DataError, match=r"sha256 names 'a.tx', which is no file of it \(did you mean 'a.txt'\?\)"):
        list_files(dataset(base / "*.txt", sha256={"a.tx": digest}))
    with pytest.raises(DataError, match=r"sha256\['a.txt'\]='12' is no sha256"):
        list_files(dataset(base / "*.txt", sha256={"a.txt": "12"}))


def test_sources_that_cannot_work_are_refused_with_a_remedy(tmp_path: Path) -> None:
    base = corpus(tmp_path / "x")
    (base / "empty").mkdir()
    (base / "empty" / "e.txt").touch()
    cases = {
        str(base / "*.json"): r"matches no file below .*/x; correct the pattern",
        str(tmp_path / "y" / "*.txt"): r"there is no directory .*/y; correct the path",
        str(base): r"is a directory; write a glob for its files, such as .*/x/\*\.txt",
        "file://elsewhere/x.txt": "names the host 'elsewhere'",
        "package:../secret": "must be a glob below the packaged texts",
        str(base / "*" / ".." / "*.txt"): "cannot be used below a directory of ours",
        str(base / "empty" / "*"): r"its 1 source file\(s\) are all empty, .*e\.txt",
        str(base / "**" / "*.txt"): r"e\.txt has no bytes; remove it, or set on_bad_document='skip'",
    }
    for source, words in cases.items():
        with pytest.raises(DataError, match=f"dataset 'web'.*{words}"):
            check_files(dataset(source), trained=True)
    os.mkfifo(base / "pipe.txt")
    with pytest.raises(DataError, match="is no regular file"):
        check_files(dataset(base / "pipe.txt"), trained=True)
    check_files(dataset(base / "*.txt"), trained=True)
    check_files(dataset(base / "**" / "*.txt", on_bad_document="skip"), trained=True)


def test_unreadable_files_and_directories_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = corpus(tmp_path)

    def refused(path: Path, *args: object, **options: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    with monkeypatch.context() as patch:  # root reads what the mode forbids
        patch.setattr(Path, "open", refused)
        for call in (list_files, lambda given: check_files(given, trained=True)):
            with pytest.raises(DataError, match=r"dataset 'web': .*a\.txt cannot be read \(Permission denied\); check its permissions"):
                call(dataset(base / "a.txt"))
    monkeypatch.setattr(Path, "iterdir", refused)
    with pytest.raises(DataError, match=r"dataset 'web': .* cannot be read \(Permission denied\)"):
        list_files(dataset(base / "*.txt"))


@pytest.mark.parametrize(
    "name", ["", "..", "../a", "a/../b", "/a", "a\\b", "a\nb", "con:x", "a./b", "a//b", ".a", "b/.a.txt", "x/manifest.json", "y" * 201]
)
def test_file_names_that_leave_their_directory_or_hide_in_it_are_refused(name: str) -> None:
    with pytest.raises(DataError, match="cannot be used below a directory of ours"):
        check_file_name(name)


def test_a_file_name_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    place = os.fsencode(tmp_path) + b"/a\xff.jsonl"
    try:
        with open(place, "wb") as file:  # a name in bytes
            file.write(b"{}")
    except OSError:
        pytest.skip("this file system has no such names")
    with pytest.raises(
        DataError, match=r"^dataset 'web': source file name 'a\\udcff\.jsonl' is not UTF-8; rename the file, or leave it out"
    ):
        list_files(dataset(tmp_path / "*"))


def test_links_that_leave_the_root_are_refused_unless_allowed(tmp_path: Path) -> None:
    base, outside = corpus(tmp_path / "x"), corpus(tmp_path / "outside")
    (base / "secret.txt").symlink_to(outside / "a.txt")
    with pytest.raises(
        DataError, match=r"dataset 'web': .*/x/secret\.txt is a link that leads out of .*/x, to .*/outside/a\.txt; leave it out"
    ):
        list_files(dataset(base / "*.txt"))
    with pytest.raises(DataError, match="set allow_links=true"):
        check_files(dataset(base / "secret.txt"), trained=True)
    assert names(dataset(base / "*.txt", allow_links=True)) == ["a.txt", "b.txt", "secret.txt"]
    (base / "secret.txt").unlink()
    (base / "more").symlink_to(outside, target_is_directory=True)
    for pattern in ("**/*.txt", "*/*.txt", "more/*.txt"):
        if pattern == "more/*.txt":
            # the directory that a person names is the root, wherever it is
            assert names(dataset(base / pattern)) == ["a.txt", "b.txt"]
            continue
        with pytest.raises(DataError, match="more is a link that leads out of"):
            list_files(dataset(base / pattern))
    assert "more/sub/c.txt" in names(dataset(base / "**" / "*.txt", allow_links=True))
    (base / "more").unlink()
    (base / "gone.txt").symlink_to(base / "nothing.txt")
    with pytest.raises(DataError, match=r"gone\.txt is a link to .*nothing\.txt, which is not there"):
        list_files(dataset(base / "*.txt"))


def test_links_inside_the_root_are_fine_and_loops_end(tmp_path: Path) -> None:
    base = corpus(tmp_path / "x")
    (base / "alias.txt").symlink_to(base / "a.txt")
    for number in range(8):
        (base / "sub" / f"loop{number}").symlink_to(base, target_is_directory=True)
    assert names(dataset(base / "**" / "*.txt")) == ["a.txt", "alias.txt", "b.txt", "sub/c.txt"]
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "back").symlink_to(tmp_path, target_is_directory=True)
    (base / "other").symlink_to(tmp_path / "other", target_is_directory=True)
    assert find_local(str(base / "**" / "*.txt"), allow_links=True).keys() == {"a.txt", "alias.txt", "b.txt", "sub/c.txt"}


@pytest.mark.parametrize(
    ("name", "refused"),
    [
        ("test.txt", "test"),
        ("test-00000-of-00001.txt", "test"),
        ("my_Validation_2.txt", "Validation"),
        ("deep/val/a.txt", "val"),
        ("x.valid.txt", "valid"),
        ("latest.txt", None),
        ("contest-values.txt", None),
        ("evaluation.txt", "evaluation"),
        ("held-out.txt", "held-out"),
        ("dev.txt", "dev"),
        ("dev-00000-of-00001.txt", "dev"),
        ("newstest.dev.txt", "dev"),
        ("testset.txt", "testset"),
        ("eval_data.txt", "eval_data"),
        ("validate.txt", "validate"),
        ("evals/a.txt", "evals"),
        ("dev/a.txt", "dev"),
        ("testdata/a.txt", "testdata"),
        ("validation-split/a.txt", "validation-split"),
        *((f"{name}.txt", None) for name in ("develop", "device", "dev_to_articles", "dev-tools", "attestation", "testament", "validated")),
        *((f"{name}/a.txt", None) for name in ("developers", "dev-docs", "evaluators", "contests", "retrieval", "valley")),
        ("train-00000-of-00001.txt", None),
        ("Tests.txt", "Tests"),
        ("held_out.txt", "held_out"),
    ],
)
def test_names_of_held_out_data_are_refused_for_training(tmp_path: Path, name: str, refused: str | None) -> None:
    path = tmp_path / "texts" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("text\n", encoding="utf-8")
    given = dataset(tmp_path / "texts" / "**" / "*.txt")
    check_files(given, trained=False)
    check_files(given.model_copy(update={"allow_test_in_train": True}), trained=True)
    if refused is None:
        check_files(given, trained=True)
        return
    with pytest.raises(DataError, match=rf"dataset 'web': {path} has {refused!r} in its name.*allow_test_in_train=true"):
        check_files(given, trained=True)


@pytest.mark.parametrize("pattern", ["*.txt", "part-0.txt"])
def test_a_directory_of_held_out_data_is_refused_too_but_none_further_up(tmp_path: Path, pattern: str) -> None:
    held_out = ("validation", "evals", "dev", "held-out", "testdata", "validation-split", "test_set")
    for directory in (*held_out, "test/corpus", "test/dev-docs", "my-test-project"):
        path = tmp_path / directory / "part-0.txt"
        path.parent.mkdir(parents=True)
        path.write_text("text\n", encoding="utf-8")
    for directory in held_out:
        with pytest.raises(DataError, match=rf"has '{directory}' in its name"):
            check_files(dataset(tmp_path / directory / pattern), trained=True)
    for directory in ("test/corpus", "test/dev-docs", "my-test-project"):
        check_files(dataset(tmp_path / directory / pattern), trained=True)
    # the directory of the glob, however deep the file
    with pytest.raises(DataError, match=r"has 'test' in its name"):
        check_files(dataset(tmp_path / "test" / "**" / pattern), trained=True)


def test_digests_of_large_files_are_remembered_until_the_file_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(source_memory, "MEMO_BYTES", 1)
    monkeypatch.setattr(source_memory, "_SETTLED_SECONDS", -1)
    read: list[Path] = []
    real = source_memory.sha256_of
    monkeypatch.setattr(source_memory, "sha256_of", lambda path: read.append(path) or real(path))
    path = corpus(tmp_path) / "a.txt"
    given = dataset(path)
    first = list_files(given)
    assert list_files(given) == first
    assert len(read) == 1
    status = path.stat()
    path.write_text("other text\n", encoding="utf-8")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert list_files(given) != first
    (tmp_path / "cache" / "prefect-llama" / "source-digests.json").write_text("{", encoding="utf-8")
    assert list_files(given)[0].sha256 == real(path)


def test_what_is_local_and_what_can_be_written_down() -> None:
    assert [is_local(source) for source in ("a/b", "/a", "package:x/*", "file:///a", "local:///a", "a:b")] == [True] * 6
    assert [is_local(source) for source in ("gs://b/x", "hf://datasets/a/b", "https://h/x", "zip://x::gs://b")] == [False] * 4
    cases = {
        "https://me:secret@host:8/a/b.txt?X-Amz-Signature=secret#secret": "https://host:8/a/b.txt",
        "sftp://me:secret@host/a/what?.txt": "sftp://host/a/what?.txt",
        "s3://bucket/a/date=2020-0?/part=1": "s3://bucket/a/date=2020-0?/part=1",
        "abfs://x/a.txt?sig=secret": "abfs://x/a.txt",
        "hf://datasets/org/web@main/a.txt": "hf://datasets/org/web@main/a.txt",
        "/a/b?.txt": "/a/b?.txt",
        "https://me:secret@[no-host/a.txt?sig=secret": "https://[no-host/a.txt",
    }
    assert {location: public_location(location) for location in cases} == cases


def test_one_file_by_path_has_the_digest_it_has_to_have(tmp_path: Path) -> None:
    base = corpus(tmp_path)
    assert find_one(str(base / "a.txt"), sha256="0" * 64) == SourceFile(
        name="a.txt", bytes=11, sha256="0" * 64, location=str(base / "a.txt")
    )
    with pytest.raises(DataError, match="names 2 files where one is wanted"):
        find_one(str(base / "*.txt"))


def test_local_sources_import_nothing_for_remote_ones() -> None:
    code = (
        "import sys; from tasks.mixture_config import Dataset; from tasks.sources import list_files; "
        "list_files(Dataset(name='x', source='package:shakespeare/plays/*.txt')); "
        "print([name for name in ('fsspec', 'httpx', 'huggingface_hub', 'prefect') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parent.parent)
    assert done.stdout.strip() == "[]"


def test_names_of_the_environment_stand_for_what_must_not_be_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus(tmp_path)
    given = dataset(f"{tmp_path}/${{PART_OF_IT}}*.txt")
    monkeypatch.setenv("PART_OF_IT", "a")
    assert [file.name for file in list_files(given)] == ["a.txt"]
    monkeypatch.delenv("PART_OF_IT")
    with pytest.raises(DataError, match="names the environment variable PART_OF_IT, which is not set: set it"):
        list_files(given)
