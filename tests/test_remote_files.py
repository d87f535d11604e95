"""Remote sources: what the Hub, HTTP servers and fsspec list, how it is pinned, and what is said where they do not answer."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from tasks.mixture_config import Dataset
from tasks.sources import DataError, SourceFile, check_files, list_files, remote_files
from tests.loopback_server import Fault, Hub, Loopback, loopback
from tests.transfer_probe import quick_requests

COMMIT = Hub.COMMIT


@pytest.fixture(autouse=True)
def quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quick_requests(tmp_path, monkeypatch, attempts=3)


@pytest.fixture
def server() -> Iterator[Loopback]:
    with loopback() as running:
        yield running


@pytest.fixture
def hub(server: Loopback, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with loopback() as storage:
        made = Hub(server, storage)
        made.put("README.md", b"# web\n")
        made.put(".gitattributes", b"*\n")
        for number in range(3):
            made.put(f"data/train-{number}.jsonl", b'{"text": "%d"}\n' % number, large=number > 0)
        made.put("data/test-0.jsonl", b'{"text": "t"}\n')
        yield made


def dataset(*source: str, **changes: Any) -> Dataset:
    return Dataset(name="web", source=source, **changes)


def forget_recent() -> None:
    remote_files._recent.clear()


def test_a_hub_dataset_is_listed_at_its_commit(hub: Hub) -> None:
    for revision in (COMMIT, "v1", "main"):
        files = list_files(dataset(f"hf://datasets/org/web@{revision}/data/train-*.jsonl"))
        assert [file.name for file in files] == ["train-0.jsonl", "train-1.jsonl", "train-2.jsonl"]
        small, large = hub.files["data/train-0.jsonl"], hub.files["data/train-1.jsonl"]
        blob = hashlib.sha1(b"blob %d\0" % len(small) + small).hexdigest()
        assert files[0].identity() == {"name": "train-0.jsonl", "bytes": len(small), "sha256": None, "version": f"git-blob:{blob}"}
        digest = hashlib.sha256(large).hexdigest()
        assert files[1].identity() == {"name": "train-1.jsonl", "bytes": len(large), "sha256": digest, "version": None}
        assert files[0].location == f"{hub.server.url}/datasets/org/web/resolve/{COMMIT}/data/train-0.jsonl"
    assert [file.name for file in list_files(dataset(f"hf://datasets/org/web@{COMMIT}/**"))] == [
        "README.md", "data/test-0.jsonl", "data/train-0.jsonl", "data/train-1.jsonl", "data/train-2.jsonl",
    ]  # fmt: skip
    assert not hub.asked("resolve")


def test_one_file_of_a_hub_dataset_or_model(hub: Hub) -> None:
    (file,) = list_files(dataset(f"hf://datasets/org/web@{COMMIT}/data/train-1.jsonl"))
    assert (file.name, file.sha256) == ("train-1.jsonl", hashlib.sha256(hub.files["data/train-1.jsonl"]).hexdigest())
    (file,) = list_files(dataset(f"hf://org/llama@{COMMIT}/README.md"))
    assert file.location == f"{hub.server.url}/org/llama/resolve/{COMMIT}/README.md"
    with pytest.raises(DataError, match="matches no file"):
        list_files(dataset(f"hf://datasets/org/web@{COMMIT}/data/none.jsonl"))


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("hf://datasets/org/web/data/*.jsonl", rf"has no revision, .* is at hf://datasets/org/web@{COMMIT}/data/\*\.jsonl"),
        ("hf://datasets/org/web@v9/data/*.jsonl", "/datasets/org/web has no revision 'v9'; give a commit"),
        (f"hf://datasets/org/other@{COMMIT}/*", "/datasets/org/other does not exist, or is private"),
        (f"hf://datasets/org/web@{COMMIT}", r"names no file; add a path or a glob, such as .*/\*\*/\*\.parquet"),
        (f"hf://datasets/org/web@{COMMIT}/none/*", "has no such path"),
        (f"hf://datasets/org/web@{COMMIT}/*.csv", "matches no file"),
        (f"hf://datasets/org/web@{COMMIT}/a**b", "is no glob"),
        ("hf://datasets/web", "cannot be read"),
        ("hf://spaces/org/web@main/x", "is a space"),
    ],
)
def test_what_is_wrong_with_a_hub_source_is_said(hub: Hub, source: str, words: str) -> None:
    with pytest.raises(DataError, match=f"dataset 'web': .*{words}"):
        list_files(dataset(source))


def test_a_gated_dataset_asks_for_its_licence_and_opens_with_a_token(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.gated = True
    source = f"hf://datasets/org/web@{COMMIT}/README.md"
    with pytest.raises(DataError, match=r"/datasets/org/web is gated: accept its licence on that page, and log in"):
        list_files(dataset(source))
    assert len(hub.server.requests) == 1
    monkeypatch.setenv("HF_TOKEN", Hub.TOKEN)
    assert Hub.TOKEN not in list_files(dataset(source))[0].model_dump_json()


def test_a_pinned_listing_is_not_asked_for_again(hub: Hub, caplog: pytest.LogCaptureFixture) -> None:
    pinned, branch = dataset(f"hf://datasets/org/web@{COMMIT}/data/train-*"), dataset("hf://datasets/org/web@main/data/train-*")
    first, second = list_files(pinned), list_files(branch)
    asked = len(hub.server.requests)
    assert list_files(branch) == second
    assert len(hub.server.requests) == asked
    forget_recent()
    assert list_files(pinned) == first
    assert len(hub.server.requests) == asked
    hub.server.close()
    forget_recent()
    assert list_files(pinned) == first
    with caplog.at_level(logging.WARNING):
        assert list_files(branch) == second
    assert "going on with what it listed last" in caplog.text
    with pytest.raises(DataError, match=r"cannot be listed .*in 3 tries.*check the network"):
        list_files(dataset("hf://datasets/org/web@main/data/test-*"))


def test_an_offline_hub_is_told_at_once(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    source = dataset("hf://datasets/org/web@main/data/train-*")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=r"cannot be listed \(HF_HUB_OFFLINE is set: unset it"):
        list_files(source)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    first = list_files(source)
    forget_recent()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert list_files(source) == first


def test_test_data_is_refused_by_its_whole_path_in_the_repository(hub: Hub) -> None:
    hub.put("validation/a.jsonl", b"x\n")
    for source in ("data/*.jsonl", "data/test-0.jsonl", "validation/*.jsonl"):
        with pytest.raises(DataError, match="in its name, so it looks like data to evaluate on"):
            check_files(dataset(f"hf://datasets/org/web@{COMMIT}/{source}"), trained=True)
    check_files(dataset(f"hf://datasets/org/web@{COMMIT}/data/*.jsonl"), trained=False)
    check_files(dataset(f"hf://datasets/org/web@{COMMIT}/data/train-*.jsonl"), trained=True)


def test_hostile_names_on_a_hub_are_refused(hub: Hub) -> None:
    hub.put("data/../../escape.jsonl", b"x\n")
    with pytest.raises(DataError, match=r"dataset 'web': source file name '\.\./\.\./escape\.jsonl' cannot be used"):
        list_files(dataset(f"hf://datasets/org/web@{COMMIT}/data/**"))
    with pytest.raises(DataError, match=r"names a directory above; write the path itself"):
        list_files(dataset(f"hf://datasets/org/web@{COMMIT}/data/../../escape.jsonl"))


def test_an_http_file_is_described_by_its_headers(server: Loopback) -> None:
    data = b"text\n" * 10
    url = server.put("/a/b%20c.txt".replace("%20", " "), data, etag='"one"').replace(" ", "%20")
    (file,) = list_files(dataset(url))
    assert file.identity() == {"name": "b c.txt", "bytes": 50, "sha256": None, "version": 'etag:"one"'}
    assert [asked.method for asked in server.requests] == ["HEAD"]
    url = server.put("/d.txt", data, etag=None, modified="Tue, 01 Sep 2026 10:00:00 GMT", head=False)
    (file,) = list_files(dataset(url))
    assert (file.bytes, file.version) == (50, "modified:Tue, 01 Sep 2026 10:00:00 GMT")
    assert server.requests[-1].headers["range"] == "bytes=0-0"
    digest = hashlib.sha256(data).hexdigest()
    (file,) = list_files(dataset(url, sha256={"d.txt": digest}))
    assert (file.sha256, file.version) == (digest, None)
    url = server.put("/e.txt", data, etag=None)
    with pytest.raises(
        DataError, match=r"neither ETag nor date.*sha256=\{'e\.txt': \.\.\.\}, or name the state of the data in dataset\.revision"
    ):
        list_files(dataset(url))
    assert list_files(dataset(url, revision="2026-01"))[0].bytes == 50


def test_http_sources_that_cannot_work_are_refused(server: Loopback) -> None:
    with pytest.raises(DataError, match=r"dataset 'web': .*/none\.txt answered 404 Not Found: there is no such file"):
        list_files(dataset(f"{server.url}/none.txt"))
    for url in (f"{server.url}/", f"{server.url}/*.txt"):
        with pytest.raises(DataError, match="HTTP lists no directories; give the URL of each file"):
            list_files(dataset(url))
    with pytest.raises(DataError, match="cannot be used below a directory of ours"):
        list_files(dataset(server.put("/..\\..\\x", b"x").replace("\\", "%5C")))
    with pytest.raises(DataError, match="looks like data to evaluate on"):
        check_files(dataset(server.put("/val/x.txt", b"x")), trained=True)
    with pytest.raises(DataError, match=r"are all empty, http"):
        check_files(dataset(server.put("/empty.txt", b"")), trained=True)


def test_a_listing_is_retried_and_a_secret_in_a_url_is_never_written_down(
    server: Loopback, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PASSWORD", "secret")
    server.put("/a.txt", b"text\n", head=False)
    server.faults["/a.txt"] = [Fault(status=503), Fault(status=429, headers={"Retry-After": "0"})]
    url = f"{server.url}/a.txt?X-Amz-Signature=secret".replace("http://", "http://me:secret@")
    given = url.replace("secret", "${PASSWORD}")
    (file,) = list_files(dataset(given))
    assert (file.name, file.location, file.bytes) == ("a.txt", url, 5)
    assert len(server.gets("/a.txt")) == 3
    written = [path.read_text(encoding="utf-8") for path in (tmp_path / "cache").rglob("*.json")]
    assert len(written) == 1
    assert "secret" not in written[0]
    forget_recent()
    server.close()
    assert list_files(dataset(given)) == (file,)
    with pytest.raises(DataError) as refused:
        list_files(dataset(given.replace("a.txt", "b.txt")))
    assert "secret" not in str(refused.value)


def test_an_object_store_is_listed_by_glob() -> None:
    memory = fsspec.filesystem("memory")
    for name in ("train/a.txt", "train/deep/b.txt", "train/.c.txt", "other/d.txt"):
        memory.pipe_file(f"/corpus/{name}", name.encode())
    files = list_files(dataset("memory://corpus/train/**/*.txt"))
    assert [(file.name, file.bytes, file.location) for file in files] == [
        ("a.txt", 11, "memory://corpus/train/a.txt"),
        ("deep/b.txt", 16, "memory://corpus/train/deep/b.txt"),
    ]
    assert (files[0].version or "").startswith("modified:")
    (file,) = list_files(dataset("memory://corpus/other/d.txt"))
    assert file.name == "d.txt"
    with pytest.raises(DataError, match="is a directory; write a glob"):
        list_files(dataset("memory://corpus/other"))
    with pytest.raises(DataError, match="matches no file"):
        list_files(dataset("memory://corpus/*.json"))
    with pytest.raises(DataError, match="there is no such file"):
        list_files(dataset("memory://corpus/none.txt"))
    with pytest.raises(DataError, match="Install s3fs to access S3; install that package"):
        list_files(dataset("s3://bucket/*.txt"))
    with pytest.raises(DataError, match="Protocol not known: nosuch"):
        list_files(dataset("nosuch://bucket/*.txt"))
    with pytest.raises(DataError, match="is a chain of file systems"):
        list_files(dataset("zip://*.txt::memory://corpus/x.zip"))


def test_a_damaged_memory_of_a_listing_is_asked_for_anew(hub: Hub, tmp_path: Path) -> None:
    source = dataset(f"hf://datasets/org/web@{COMMIT}/data/train-*")
    first: tuple[SourceFile, ...] = list_files(source)
    (path,) = (tmp_path / "cache").rglob("listings/*.json")
    for damage in ("{", json.dumps({"base": "x", "files": [{"pathh": 1}]}), "[]"):
        path.write_text(damage, encoding="utf-8")
        forget_recent()
        assert list_files(source) == first
