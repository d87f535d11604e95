"""What is refused before a slice is asked for: each with the field, its value, and what to do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import uuid4

import pytest

from model.config import LlamaConfig
from model.job import TrainingJob
from model.train_config import SimpleTrainConfig
from tasks import pool_checks, pool_training
from tasks.bucket_checks import BucketLocation, compare_location, location_finding, use_finding
from tasks.findings import Finding, refuse
from tasks.places import ObjectPath
from tasks.pool_checks import check_accelerator_type, check_before_asking, check_cost, check_fit_and_cost, place_findings
from tasks.pool_settings import PoolSettings
from tasks.preflight import DoesNotFit
from tests.object_store import BUCKET, faulty_proxy, object_store, use_store
from tests.synthetic_stores import write_mixture

ROOT = ObjectPath(BUCKET, "runs")
CLOUD = PoolSettings(pool="tpu", provider="cloud", project="p", zones=("us-central1-a",), accelerator_type="v4-128")
TRAIN = SimpleTrainConfig(train_batch_size=8, num_train_steps=10, learning_rate=1e-3)
MODEL = LlamaConfig(seq_len=64, hidden_dim=32, intermediate_dim=64, num_heads=2, num_kv_heads=1, num_layers=1)


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with object_store() as url:
        yield url


def changed(**fields: Any) -> PoolSettings:
    return CLOUD.model_copy(update=fields)


def never(line: str) -> None:
    pytest.fail(f"told {line!r}")


ONE, TWO = ["us-central2-b"], ["us-central2-b", "europe-west4-a"]


@pytest.mark.parametrize(
    ("resource", "zones", "state", "words"),
    [
        ({"location": "US-CENTRAL2"}, ONE, "ok", "is in US-CENTRAL2, like the zones us-central2-b"),
        (
            {"location": "US-EAST1"},
            ONE,
            "fail",
            "is in US-EAST1, and the pool's slices are in us-central2-b: give a --root in a bucket of us-central2",
        ),
        ({"location": "US-CENTRAL2"}, TWO, "warn", "of the pool's zones europe-west4-a are not"),
        ({"location": "EUROPE-WEST4"}, TWO, "warn", "of the pool's zones us-central2-b are not"),
        ({"location": "ASIA-EAST1"}, TWO, "fail", "slices are in us-central2-b, europe-west4-a"),
        ({"location": "US"}, ONE, "warn", "a multi-region around the zones us-central2-b: what slices read from it is charged"),
        ({"location": "EU"}, ONE, "fail", "is in EU, and the pool's slices are in us-central2-b"),
        ({"location": "EU"}, ["europe-west4-a"], "warn", "a multi-region around the zones europe-west4-a"),
        ({"location": "US"}, ["northamerica-northeast1-a"], "fail", "is in US"),
        ({"location": "NAM4"}, ["us-central1-a", "us-east1-d"], "ok", "is in NAM4"),
        ({"location": "NAM4"}, ONE, "fail", "is in NAM4"),
        ({"location": "US", "customPlacementConfig": {"dataLocations": ["US-CENTRAL2", "US-EAST1"]}}, ONE, "ok", "is in US"),
        ({"location": "US", "customPlacementConfig": {"dataLocations": ["US-WEST1", "US-EAST1"]}}, ONE, "fail", "is in US"),
    ],
)
def test_where_a_bucket_lies(resource: dict[str, Any], zones: list[str], state: str, words: str) -> None:
    found = compare_location("b", BucketLocation.parse(resource), zones)
    assert found.state == state
    assert words in str(found)


def test_a_bucket_is_asked_where_it_lies(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    use_store(monkeypatch, server)
    assert location_finding(ROOT, ["us-central1-a"]).state == "ok"  # where the server of tests says its buckets are
    assert location_finding(ROOT, ["us-central2-b"]).state == "fail"
    with pytest.raises(OSError, match="there is no bucket gs://no-such-bucket"):
        location_finding(ObjectPath("no-such-bucket", "runs"), ["us-central1-a"])
    with faulty_proxy(server, lambda method, path: 403) as proxy:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", proxy.url)
        found = location_finding(ROOT, ["us-central1-a"])
    assert found.state == "warn"
    assert "grant roles/storage.legacyBucketReader on it" in str(found)


@pytest.mark.parametrize("refused", ["POST", "GET", "DELETE"])
def test_a_bucket_that_cannot_be_used(server: str, monkeypatch: pytest.MonkeyPatch, refused: str) -> None:
    use_store(monkeypatch, server)
    assert use_finding(ROOT).state == "ok"
    with faulty_proxy(server, lambda method, path: 403 if method == refused else None) as proxy:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", proxy.url)
        found = use_finding(ROOT)
        with pytest.raises(ValueError, match=rf"--root={ROOT}: no permission .* grant roles/storage.objectUser on gs://{BUCKET}"):
            refuse(place_findings(changed(zones=()), ROOT), never)
    assert found.state == "fail"


def test_a_directory_of_this_machine(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"--root={tmp_path} is a directory of this machine, .*'tpu' .provider=cloud.*give --root gs://"):
        refuse(place_findings(CLOUD, tmp_path), never)


def test_warnings_are_told_and_failures_refused_all_at_once() -> None:
    told: list[str] = []
    found = [Finding("a", "warn", "dear"), Finding("b", "ok", "fine"), Finding("c", "fail", "x=1", "use 2"), Finding("d", "fail", "y=3")]
    with pytest.raises(ValueError, match=r"^x=1: use 2; y=3$"):
        refuse(found, told.append)
    refuse(found[:2], told.append)
    assert told == ["dear", "dear"]


def test_an_unknown_slice() -> None:
    with pytest.raises(
        ValueError, match=r"accelerator_type='v4-127' of the work pool 'tpu': unknown TPU slice.*did you mean v4-.*job_variables"
    ):
        check_accelerator_type(changed(accelerator_type="v4-127"))
    with pytest.raises(ValueError, match="accelerator_type of the work pool 'tpu' is not set"):
        check_accelerator_type(changed(accelerator_type=None))


def test_a_job_that_costs_more_than_it_may() -> None:
    told: list[str] = []
    # 64 chips for 10 hours: 590 dollars as spot, 2,061 on demand, by the table of prices
    check_cost(changed(max_cost=600), "r1", 10.0, told.append)
    check_cost(changed(max_cost=None, provisioning="on-demand"), "r1", 10.0, told.append)
    assert "r1 takes 10 hours of 1 x v4-128 at least: $590: 640 chip-hours at $0.92, spot list price" in told[0]
    assert "$2,061" in told[1]
    for settings, words in (
        (
            changed(max_cost=600, provisioning="on-demand"),
            r"max_cost=600 of .*'tpu' does not buy r1, .*\$2,061: 640 chip-hours .* raise max_cost",
        ),
        (changed(max_cost=1000, num_slices=2), r"10 hours of 2 x v4-128 at least: \$1,180: 1,280 chip-hours"),
    ):
        with pytest.raises(ValueError, match=words):
            check_cost(settings, "r1", 10.0, never)


def test_a_job_is_compiled_for_the_slice_that_the_pool_asks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[SimpleTrainConfig] = []
    found: list[Any] = [None]

    def preflight(name: str, model: LlamaConfig, train: SimpleTrainConfig, *, tell: Any) -> Any:
        asked.append(train)
        return found[0]

    monkeypatch.setattr(pool_checks, "preflight", preflight)
    check_fit_and_cost(changed(num_slices=2, max_cost=1), "r1", MODEL, TRAIN, never)  # no compiler here: nothing is known
    assert (asked[0].accelerator_type, asked[0].slice_count) == ("v4-128", 2)
    found[0] = SimpleNamespace(fits=True, hours=10.0)
    with pytest.raises(ValueError, match="max_cost=1 of the work pool 'tpu' does not buy r1"):
        check_fit_and_cost(changed(max_cost=1), "r1", MODEL, TRAIN, never)
    found[0] = SimpleNamespace(fits=False, advice=())
    monkeypatch.setattr("model.preflight.report.headline", lambda found: "it does NOT fit")
    with pytest.raises(DoesNotFit, match="it does NOT fit"):
        check_fit_and_cost(CLOUD, "r1", MODEL, TRAIN, never)


def work_pool(type_: str = "tpu", **defaults: Any) -> Any:
    properties = {name: {"default": value} for name, value in defaults.items()} | {"image": {"type": "string"}}
    return SimpleNamespace(name="tpu", type=type_, base_job_template={"variables": {"properties": properties}})


def test_what_a_pool_asks_for_is_completed_by_its_deployment_and_by_the_run() -> None:
    pool = work_pool(provider="cloud", zones=["us-central2-b"], accelerator_type="v4-8", max_cost=None, project="{{ $PROJECT }}")
    settings = PoolSettings.of(pool, {"accelerator_type": "v4-16", "max_cost": 7}, {"accelerator_type": "v4-32", "num_slices": 2})
    assert (settings.provider, settings.zones, settings.accelerator_type) == ("cloud", ("us-central2-b",), "v4-32")
    assert (settings.num_slices, settings.max_cost, settings.project) == (2, 7, None)
    with pytest.raises(ValueError, match=r"max_cost='much' of the work pool 'tpu': .*number.*correct it in the pool's form"):
        PoolSettings.of(pool, {"max_cost": "much"})


class Server:
    """A Prefect server with one work pool, and the runs that were asked for."""

    def __init__(self, pool: Any, *keys: str) -> None:
        self.pool = pool
        self.runs = [SimpleNamespace(idempotency_key=key) for key in keys]

    def read_work_pool(self, name: str) -> Any:
        return self.pool

    def read_flow_runs(self, **filters: Any) -> Any:
        return self.runs


def job_in(root: Path, **model: Any) -> TrainingJob:
    mixture = write_mixture(root, {"web": 1.0})
    return TrainingJob(
        name="job",
        fingerprint="f" * 64,
        directory=root / "checkpoints" / "job-f",
        mixture=Path(mixture.path),
        model=LlamaConfig(**{**dict(MODEL), **model}),
        train=TRAIN,
    )


def test_tokens_beyond_the_disk_of_a_host_need_its_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = job_in(tmp_path).model_copy(update={"mixture_bucket": f"gs://{BUCKET}/runs/mixtures/web-1"})
    sizes = iter([75_000_000_000, 115_200_000_000])
    monkeypatch.setattr(pool_checks, "bytes_to_fetch", lambda place, directory: next(sizes))
    pool_checks.check_disk(CLOUD, job)
    with pytest.raises(
        ValueError, match=r"brings the 115 GB of tokens of .*room for about 75 GB: set cache_in_memory=true in the work pool"
    ):
        pool_checks.check_disk(CLOUD, job)
    pool_checks.check_disk(changed(cache_in_memory=True), job)


def ask(server: Server, job: TrainingJob, **variables: Any) -> None:
    deployment: Any = SimpleNamespace(id=uuid4(), work_pool_name="tpu", job_variables=variables)
    check_before_asking(server, job, deployment, {}, tell=never)  # pyright: ignore[reportArgumentType]


def test_a_tokenizer_with_more_tokens_than_the_model_has_rows(tmp_path: Path) -> None:
    server = Server(work_pool(accelerator_type="v4-16"))
    ask(server, job_in(tmp_path / "open"))
    with pytest.raises(ValueError, match=r"model.vocab_size=300 is smaller than the tokenizer's vocabulary of 512"):
        ask(server, job_in(tmp_path / "small", vocab_size=300))


def test_a_run_that_is_there_is_adopted_and_pools_of_other_types_are_left_alone(tmp_path: Path) -> None:
    job = job_in(tmp_path)
    wrong = work_pool(provider="cloud", accelerator_type="v4-127")
    with pytest.raises(ValueError, match="v4-127"):
        ask(Server(wrong, f"{'e' * 64}:0"), job)
    ask(Server(wrong, f"{job.fingerprint}:3"), job)
    ask(Server(work_pool("process", accelerator_type="v4-127")), job)


def test_a_job_in_a_bucket_is_looked_at_where_it_lies(tmp_path: Path, server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    use_store(monkeypatch, server)
    monkeypatch.setattr(pool_checks, "check_fit_and_cost", lambda *_: None)
    job = job_in(tmp_path).model_copy(update={"bucket": f"{ROOT}/checkpoints/job-f"})
    ask(Server(work_pool(accelerator_type="v4-16")), job, provider="cloud", zones=["us-central1-a"])
    with pytest.raises(
        ValueError, match=rf"--root=gs://{BUCKET}: the bucket .* is in US-CENTRAL1, and the pool's slices are in us-east5-a"
    ):
        ask(Server(work_pool(accelerator_type="v4-16")), job, provider="cloud", zones=["us-east5-a"])


def test_nothing_is_asked_for_where_a_check_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_training, "run_deployment", lambda *_, **__: pytest.fail("a run was asked for"))
    deployment: Any = SimpleNamespace(id=uuid4(), work_pool_name="tpu", job_variables={"provider": "cloud"})
    monkeypatch.setattr(pool_training, "get_client", lambda **_: nullcontext(Server(work_pool(accelerator_type="v4-16"))))
    monkeypatch.setattr(pool_training, "pretrain_deployment", lambda *_: deployment)
    with pytest.raises(ValueError, match=r"is a directory of this machine, .*give --root gs://bucket/prefix"):
        pool_training.train_on_pool(job_in(tmp_path), "tpu")
