"""Sources `LIST#GLOB`: which files a list names, what they are called, how the list is pinned, and what it must not name."""

from __future__ import annotations

import gzip
import hashlib
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tasks.data_steps import RawFiles
from tasks.download import download_body
from tasks.mixture_config import Dataset
from tasks.sources import DataError, check_files, file_lists, find_one, list_files, remote_files
from tasks.steps import Step
from tests.loopback_server import Fault, Hub, Loopback, loopback
from tests.transfer_probe import bring, quick_requests

COMMIT = Hub.COMMIT
FOLDERS = ("quality=high/kind=actual", "quality=high/kind=synthetic", "quality=low/kind=actual")
PATHS = [f"contrib/cc/{folder}/part-{number}.jsonl.gz" for folder in FOLDERS for number in range(2)]


@pytest.fixture(autouse=True)
def quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quick_requests(tmp_path, monkeypatch, attempts=3)


@pytest.fixture
def server() -> Iterator[Loopback]:
    with loopback() as running:
        yield running


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def put_list(server: Loopback, lines: list[str], path: str = "/contrib/cc/data.paths.gz") -> tuple[str, dict[str, str]]:
    """Serves a list; its URL, and its pin as a dataset has it."""
    data = "\n".join(lines).encode()
    data = gzip.compress(data, mtime=0) if path.endswith(".gz") else data
    return server.put(path, data), {path.rpartition("/")[2]: sha256(data)}


def dataset(*source: object, **changes: Any) -> Dataset:
    return Dataset(name="web", source=tuple(map(str, source)), **changes)


def names(given: Dataset) -> list[str]:
    return [file.name for file in list_files(given)]


def refused(source: object, words: str, **changes: Any) -> None:
    with pytest.raises(DataError, match=rf"dataset 'web': .*{words}"):
        list_files(dataset(source, **changes))


def test_a_pinned_list_names_files_that_are_not_asked_for(server: Loopback) -> None:
    url, pin = put_list(server, ["# a comment", "", *PATHS, PATHS[0], "  "])
    files = list_files(dataset(f"{url}#**/quality=high/**/*.jsonl.gz", sha256=pin))
    assert [file.name for file in files] == [f"kind={kind}/part-{number}.jsonl.gz" for kind in ("actual", "synthetic") for number in (0, 1)]
    assert files[0].location == f"{server.url}/{PATHS[0]}"
    version = f"list:{pin['data.paths.gz']}:3"
    assert files[0].identity() == {"name": "kind=actual/part-0.jsonl.gz", "bytes": None, "sha256": None, "version": version}
    assert [(asked.method, asked.path) for asked in server.requests] == [("GET", "/contrib/cc/data.paths.gz")]


def test_equal_names_from_other_lines_of_a_list_are_other_files(server: Loopback) -> None:
    url, pin = put_list(server, PATHS)
    high, low = (list_files(dataset(f"{url}#**/quality={quality}/kind=actual/*.gz", sha256=pin)) for quality in ("high", "low"))
    assert [file.name for file in high] == [file.name for file in low] == ["part-0.jsonl.gz", "part-1.jsonl.gz"]
    assert not {file.version for file in high} & {file.version for file in low}


def test_names_are_below_the_fixed_part_of_the_glob_or_the_common_parent(server: Loopback) -> None:
    url, pin = put_list(server, [*PATHS, f"{server.url}/contrib/cc/notes%20of%20it.txt", "/contrib/cc/.hidden/a.jsonl.gz"], "/list.txt")
    given = {
        "contrib/**/*.jsonl.gz": [path.removeprefix("contrib/") for path in PATHS],
        "/contrib/cc/quality=low/*/*-1*": ["kind=actual/part-1.jsonl.gz"],
        "**/quality=low/**/part-1.jsonl.gz": ["part-1.jsonl.gz"],
        "**/*.jsonl.gz": [path.removeprefix("contrib/cc/") for path in PATHS],
        PATHS[3]: ["part-1.jsonl.gz"],
        "contrib/cc/*.txt": ["notes of it.txt"],
    }
    assert {glob: names(dataset(f"{url}#{glob}", sha256=pin)) for glob in given} == given
    several = dataset(f"{url}#**/quality=low/**", f"{url}#**/*of*.txt", sha256=pin)
    assert names(several) == ["000/part-0.jsonl.gz", "000/part-1.jsonl.gz", "001/notes of it.txt"]
    assert len(server.gets("/list.txt")) == 1


def test_lists_of_one_name_are_pinned_by_their_number(server: Loopback) -> None:
    (one, pin), (two, other) = (put_list(server, [f"{number}/a.txt"], f"/{number}/list.txt") for number in (1, 2))
    assert names(dataset(f"{one}#**", f"{two}#**", sha256={f"{n:03d}/list.txt": p["list.txt"] for n, p in enumerate((pin, other))})) == [
        "000/a.txt",
        "001/a.txt",
    ]
    with pytest.raises(DataError, match=r"/2/list\.txt has the sha256"):
        list_files(dataset(f"{one}#**", f"{two}#**", sha256=pin))


def test_a_pinned_list_is_read_once_and_serves_every_glob_offline(server: Loopback, tmp_path: Path) -> None:
    url, pin = put_list(server, PATHS)
    first = list_files(dataset(f"{url}#**/*.gz", sha256=pin))
    (kept,) = (tmp_path / "cache").rglob("lists/*")
    kept.write_bytes(b"damaged")
    remote_files._recent.clear()
    assert list_files(dataset(f"{url}#**/*.gz", sha256={"data.paths.gz": pin["data.paths.gz"].upper()})) == first
    assert len(server.requests) == 2
    server.close()
    remote_files._recent.clear()
    assert list_files(dataset(f"{url}#**/*.gz", sha256=pin)) == first
    assert len(names(dataset(f"{url}#**/quality=low/**", sha256=pin))) == 2
    refused(f"{url}#**/*.gz", r"cannot be listed .*in 3 tries.*check the network", sha256={"data.paths.gz": "0" * 64})


def test_a_list_that_is_not_the_pinned_one_is_refused(server: Loopback, tmp_path: Path) -> None:
    url, pin = put_list(server, PATHS)
    refused(f"{url}#**", f"has the sha256 {pin['data.paths.gz']}, and dataset.sha256 says 0{{64}}", sha256={"data.paths.gz": "0" * 64})
    for path in PATHS:
        server.put(f"/{path}", b"x")
    refused(f"{url}#**", r"sha256 names 'data\.path\.gz'.* \(did you mean 'data\.paths\.gz'\?\)", sha256={"data.path.gz": "0" * 64})
    refused(f"{url}#**", "is no sha256, which has 64 hexadecimal digits", sha256={"data.paths.gz": "abc"})
    assert not list((tmp_path / "cache").rglob("lists/*"))


def test_a_list_of_a_hub_repository(server: Loopback, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with loopback() as storage:
        hub = Hub(server, storage)
        data = b"https://h.org/dolma/c4/c4-0000.json.gz\nhttps://h.org/dolma/c4/c4-0001.json.gz\nhttps://h.org/dolma/wiki/wiki-0.json.gz\n"
        hub.put("urls/v1_7.txt", data)
        hub.put("c#/train.txt", b"x\n")
        for large in (False, True):
            hub.put("urls/v1_7.txt", data, large=large)
            source = f"hf://datasets/org/web@{COMMIT}/urls/v1_7.txt#**/c4-*.json.gz"
            files = list_files(dataset(source, sha256={"v1_7.txt": sha256(data)}))
            assert [(file.name, file.location) for file in files] == [
                (f"c4-000{number}.json.gz", f"https://h.org/dolma/c4/c4-000{number}.json.gz") for number in (0, 1)
            ]
            remote_files._recent.clear()
        assert len(hub.asked("resolve")) == 1
        refused(f"hf://datasets/org/web@{COMMIT}/urls/none.txt#**", r"urls/none\.txt' matches no file")
        refused("hf://datasets/org/web/urls/v1_7.txt#**", "has no revision")
        refused(f"hf://datasets/org/web@{COMMIT}/urls/*.txt#**", "before the # must be one file, a list of files")
        assert names(dataset(f"hf://datasets/org/web@{COMMIT}/c#/*.txt")) == ["train.txt"]


def test_a_local_list_and_a_local_path_with_a_hash(server: Loopback, tmp_path: Path) -> None:
    path = tmp_path / "my list.txt"
    path.write_text("\ufeffhttps://h.org/a/x.txt\r\nhttps://h.org/b/x.txt\r\n", encoding="utf-8")
    pin = {"my list.txt": sha256(path.read_bytes())}
    assert names(dataset(f"{path}#**", sha256=pin)) == ["a/x.txt", "b/x.txt"]
    assert names(dataset(f"file://{str(path).replace(' ', '%20')}#a/*", sha256=pin)) == ["x.txt"]
    path.write_text("a/x.txt\n", encoding="utf-8")
    refused(f"{path}#b/**", "has the sha256", sha256=pin)
    refused(f"{path}#**", r"line 1: 'a/x\.txt' is neither .*a list on this machine has no server")
    plain = tmp_path / "my list.txt#a.txt"
    plain.write_text("text\n", encoding="utf-8")
    (tmp_path / "c#").mkdir()
    (tmp_path / "c#" / "b.txt").write_text("text\n", encoding="utf-8")
    assert names(dataset(plain)) == ["my list.txt#a.txt"]
    assert list_files(dataset(tmp_path / "c#" / "*.txt"))[0].location == str(tmp_path / "c#" / "b.txt")
    assert find_one(str(plain)).location == str(plain)
    assert not server.requests


def test_files_of_a_list_without_a_pin_are_each_asked_for(
    server: Loopback, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, pin = put_list(server, ["a/one.txt", "a/two.txt", "b/three.txt"])
    for path in ("/a/one.txt", "/a/two.txt"):
        server.put(path, path.encode())
    given = dataset(f"{url}#a/*.txt")
    files = list_files(given)
    etags = [server.files[f"/a/{file.name}"].etag for file in files]
    assert [(file.name, file.bytes, file.version) for file in files] == [
        ("one.txt", 10, f"etag:{etags[0]}"),
        ("two.txt", 10, f"etag:{etags[1]}"),
    ]
    check_files(given, trained=True)
    assert [asked.method for asked in server.requests] == ["GET", "HEAD", "HEAD"]
    refused(f"{url}#**", r"/b/three\.txt answered 404")
    monkeypatch.setattr(file_lists, "_MAX_INQUIRIES", 1)
    words = r"2 files that match, more than the 1 that are asked for each; pin the list with sha256=\{'data\.paths\.gz': "
    refused(f"{url}#a/*", f"{words}'{pin['data.paths.gz']}'")
    server.close()
    remote_files._recent.clear()
    with caplog.at_level(logging.WARNING):
        assert list_files(given) == files
    assert "going on with what it listed last" in caplog.text
    refused(f"{url}#a/*.txt", "cannot be listed", sha256=pin)


def test_nothing_that_matches_shows_what_the_list_has(server: Loopback) -> None:
    url, pin = put_list(server, PATHS)
    refused(f"{url}#**/*.zst", rf"names 6 file\(s\), such as '{PATHS[0]}', and '\*\*/\*\.zst' matches none; correct the glob", sha256=pin)
    refused(f"{url}#", r"picks nothing from its list; write a glob after the #")
    refused(f"{url}#a**b", "is no glob")
    refused(f"{server.url}/#**", "before the # must be one file")
    empty, _ = put_list(server, ["# nothing"], "/empty.txt")
    refused(f"{empty}#**", r"names 0 file\(s\), and '\*\*' matches none")
    refused(f"{server.url}/none.txt#**", r"/none\.txt answered 404 Not Found")


@pytest.mark.parametrize(
    "line",
    [
        *("file:///etc/passwd", "../secret.txt", "a/../../b.txt", "a/%2e%2e/b.txt", "http://h.org/../b.txt", "ftp://h.org/a.txt"),
        *("s3://bucket/a.txt", "//elsewhere.org/a.txt", "https:///a.txt", "https://h.org:99999/a.txt", "https://[h/a.txt"),
        *("https://h.org/a.txt  12ab", "a\tb.txt", "a\x00b.txt", "package:x", "/../a.txt"),
    ],
)
def test_lines_that_lead_elsewhere_are_refused(server: Loopback, line: str) -> None:
    url, pin = put_list(server, [PATHS[0], line], "/list.txt")
    refused(f"{url}#**", r"/list\.txt, line 2: .* is neither an http\(s\) URL nor a path from the root of the list's server", sha256=pin)


def test_names_that_cannot_be_used_are_refused(server: Loopback) -> None:
    for lines, words in {
        ("a/b.txt", "a\\..\\b.txt"): "cannot be used below a directory of ours",
        ("a/b.txt", "a/"): "cannot be used below a directory of ours",
        ("a/b.txt", "a/b.txt/c.txt"): "is a file and a directory",
        ("https://one.org/a/b.txt", "https://two.org/a/b.txt"): r"lines 1 and 2: both files would have the name 'b\.txt'",
    }.items():
        url, pin = put_list(server, list(lines), "/list.txt")
        refused(f"{url}#**", words, sha256=pin)


def test_what_is_no_list_is_refused(server: Loopback, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = gzip.compress(b"a/b.txt\n" * 100)
    for data in (whole[:-9], whole[:20] + b"xxxxxxxx" + whole[28:], b"\xff\xfe\x00"):
        refused(f"{server.put('/list.gz', data)}#**", r"/list\.gz is no list of files, which is UTF-8 text or that compressed by gzip")
    monkeypatch.setattr(file_lists, "_MAX_BYTES", 1 << 20)
    bomb = gzip.compress(b"a/b.txt\n" * (1 << 18))
    assert len(bomb) < 1 << 14
    (tmp_path / "list.txt").write_bytes(b"a/b.txt\n" * (1 << 18))
    for source in (server.put("/bomb.gz", bomb), server.put("/large.txt", b"a" * (1 << 21), length=False), tmp_path / "list.txt"):
        refused(f"{source}#**", r"has more than 1 MiB, so it is no list of files")


def test_a_list_is_asked_for_again_where_that_can_help(server: Loopback) -> None:
    url, pin = put_list(server, PATHS)
    server.faults["/contrib/cc/data.paths.gz"] = [Fault(status=503), Fault(cut=20)]
    assert len(names(dataset(f"{url}#**", sha256=pin))) == 6
    assert len(server.requests) == 3


def test_secrets_in_a_list_or_its_url_are_never_written_down(server: Loopback, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PASSWORD", "secret")
    host = server.url.removeprefix("http://")
    server.put("/a.txt", b"text\n")
    url, pin = "", {}
    for number, line in enumerate(("a.txt?X-Amz-Signature=secret", f"http://me:secret@{host}/a.txt", "a.txt")):
        url, pin = put_list(server, ["# see https://me@example.org?", line], f"/list-{number}.txt")
        source = f"{url.replace('http://', 'http://me:${PASSWORD}@')}#**"
        for changes in ({"sha256": pin}, {}):
            (file,) = list_files(dataset(source, **changes))
            assert "secret" in file.location
            assert file.name == "a.txt"
    kept = [path.read_bytes() for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert len(kept) == 1
    assert b"secret" not in kept[0]
    with pytest.raises(DataError) as error:
        list_files(dataset(f"{url.replace('http://', 'http://me:${PASSWORD}@')}#**/*.gz", sha256=pin))
    assert "secret" not in str(error.value)


def test_held_out_data_is_refused_by_the_path_in_the_url(server: Loopback) -> None:
    url, pin = put_list(server, ["data/val/a.txt", "data/train/b.txt"])
    check_files(dataset(f"{url}#data/train/*", sha256=pin), trained=True)
    with pytest.raises(DataError, match="has 'val' in its name"):
        check_files(dataset(f"{url}#**", sha256=pin), trained=True)
    with pytest.raises(DataError, match="has 'val' in its name"):
        check_files(dataset(f"{url}#data/val/*", sha256=pin), trained=True)


def test_files_of_unknown_size_arrive_and_go_on_where_they_stopped(server: Loopback, tmp_path: Path) -> None:
    url, pin = put_list(server, ["a/one.bin", "a/two.bin", "a/c#.bin", "a/50%25.bin"])
    data = bytes(range(256)) * 12_000
    for path, options in {"/a/one.bin": {}, "/a/two.bin": {"length": False}, "/a/c#.bin": {}, "/a/50%.bin": {}}.items():
        server.put(path, data, **options)
    server.faults["/a/one.bin"] = [Fault(cut=2_000_000)]
    for file in list_files(dataset(f"{url}#a/*.bin", sha256=pin)):
        target = tmp_path / file.name
        assert bring(file, target) == (sha256(data), len(data))
        assert target.read_bytes() == data
    assert [asked.headers.get("range") for asked in server.gets("/a/one.bin")] == [None, "bytes=2000000-"]
    server.files.clear()
    with pytest.raises(DataError, match=r"/a/one\.bin answered 404"):
        bring(list_files(dataset(f"{url}#a/one.bin", sha256=pin))[0], tmp_path / "gone")


def test_the_download_step_takes_files_of_a_list(server: Loopback, tmp_path: Path) -> None:
    url, pin = put_list(server, ["a/one.txt", "a/two.txt"])
    for name in ("one", "two"):
        server.put(f"/a/{name}.txt", name.encode())
    step = Step("raw", "web", RawFiles(files=list_files(dataset(f"{url}#**", sha256=pin))))
    (directory := tmp_path / "raw").mkdir()
    assert download_body(step, directory, ()) == {"files": 2, "bytes": 6, "files_kept": 0, "bytes_fetched": 6}
    entry = json.loads((directory / "provenance.json").read_text(encoding="utf-8"))["files"][1]
    assert (entry["name"], entry["sha256"], entry["version"]) == ("two.txt", sha256(b"two"), f"list:{pin['data.paths.gz']}:2")
    assert download_body(step, directory, ())["files_kept"] == 2


def test_one_file_of_a_list_by_its_url(server: Loopback) -> None:
    url, _ = put_list(server, ["a/one.bin", "a/two.bin"])
    server.put("/a/two.bin", b"two")
    assert find_one(f"{url}#**/two.bin").identity()["bytes"] == 3
    with pytest.raises(DataError, match=r"one\.bin answered 404"):
        find_one(f"{url}#**")


def test_a_large_list_is_read_in_reasonable_steps(server: Loopback, tmp_path: Path) -> None:
    lines = [f"contrib/cc/quality={quality}/CC-MAIN-{part:05d}.jsonl.zstd" for quality in ("high", "low") for part in range(10_000)]
    url, pin = put_list(server, lines)
    assert len(list_files(dataset(f"{url}#**/quality=low/*.zstd", sha256=pin))) == 10_000
    assert len(server.requests) == 1
    assert not [path for path in (tmp_path / "cache").rglob("*.json") if json.loads(path.read_text(encoding="utf-8"))]
