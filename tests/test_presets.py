"""Named runs against a table worked out apart: shapes, parameters, FLOPs, and that each can be planned from here."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from model.batch_arithmetic import BatchArithmetic
from model.flops import num_parameters, train_flops_per_token
from model.presets import JOBS, SLICES, job_named
from model.slices import slice_named
from tasks.planning import plan_run
from tasks.presets import Preset, preset
from tasks.sources import NotListed, remote_files
from tasks.sources.source_file import Found

CHECKOUT = Path(__file__).resolve().parent.parent
V = 128_256

# name: width, mlp, heads, kv heads, width of a head, layers, tied, tokens of a sequence, parameters with Llama 3's vocabulary
TABLE = {
    "15m": (128, 448, 2, 2, 64, 4, True, 1024, 17_368_192),
    "75m": (256, 896, 4, 4, 64, 8, False, 1024, 73_273_600),
    "150m": (512, 1792, 8, 8, 64, 6, False, 1024, 154_147_328),
    "300m": (768, 2688, 12, 12, 64, 12, False, 1024, 299_649_792),
    "600m": (1024, 3584, 16, 8, 64, 24, False, 1024, 602_457_088),
    "1.4b": (2048, 7168, 16, 8, 128, 16, False, 4096, 1_431_373_824),
    "1.9b": (2048, 7168, 16, 8, 128, 24, False, 4096, 1_884_391_424),
    "3.2-1b": (2048, 8192, 32, 8, 64, 16, True, 8192, 1_235_814_400),  # as published
    "3.5b": (2560, 8960, 20, 10, 128, 32, False, 4096, 3_487_992_320),
    "8b": (4096, 14_336, 32, 8, 128, 32, False, 4096, 8_030_261_248),  # as published
    "13b": (5120, 13_824, 40, 8, 128, 40, False, 4096, 12_323_804_160),
    "32b": (5120, 27_648, 40, 8, 128, 64, False, 4096, 32_519_623_680),
    "70b": (8192, 28_672, 64, 8, 128, 80, False, 4096, 70_553_706_496),  # as published
    "dclm-1b-1x": (2048, 8192, 16, 16, 128, 24, False, 2048, 2_136_049_664),
    "dclm-7b-1x": (4096, 11_008, 32, 32, 128, 32, False, 2048, 7_526_944_768),
}


def test_every_preset_has_its_line() -> None:
    assert {*TABLE} == {entry.value for entry in Preset} - {"debug", "tiny"}
    assert {job_named(name).name for name in TABLE} == {*SLICES} == {*JOBS} - {"debug", "tiny"}


@pytest.mark.parametrize("name", TABLE)
def test_shape_parameters_and_flops(name: str) -> None:
    width, mlp, heads, kv_heads, head, layers, tied, seq_len, parameters = TABLE[name]
    model = preset(name).model.with_vocab(V)
    assert (model.hidden_dim, model.intermediate_dim, model.num_heads, model.num_kv_heads) == (width, mlp, heads, kv_heads)
    assert (model.head_size, model.num_layers, model.tie_word_embeddings, model.seq_len) == (head, layers, tied, seq_len)
    assert model == job_named(name).model

    attention = width * heads * head + 2 * width * kv_heads * head + heads * head * width  # q; k and v; output
    layer = attention + 3 * width * mlp
    counted = layers * (layer + 2 * width) + width + V * width * (1 if tied else 2)
    assert num_parameters(model) == counted == parameters

    # two FLOPs for each weight that is multiplied, and each of scores and sums of values over the tokens before, on average half
    forward = 2 * (layers * layer + V * width) + layers * 4 * (seq_len / 2) * heads * head
    assert train_flops_per_token(model, seq_len) == pytest.approx(3 * forward, rel=1e-12)


def test_flops_of_the_reference_models_by_the_convention_of_levanter() -> None:
    """Marin's own figures, with the whole square of scores; its norms and softmax count here for nothing."""
    for name, flops in {"dclm-1b-1x": 12.455e9, "dclm-7b-1x": 45.25e9}.items():
        model = job_named(name).model
        assert train_flops_per_token(model, 2048, full_attention=True) == pytest.approx(flops, rel=2e-3)


@pytest.mark.parametrize("name", TABLE)
def test_its_batch_divides_over_its_slices(name: str) -> None:
    train = preset(name).train
    assert train.accelerator_type is not None
    BatchArithmetic.of(train, slice_named(train.accelerator_type).num_chips * train.slice_count)


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every listing fails as it does without a network, at once."""

    def away(*_: object, **__: object) -> list[Found]:
        raise NotListed("cannot be listed (no network)")

    monkeypatch.setattr(remote_files, "_recently", away)


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("name", TABLE)
def test_it_is_planned_without_the_network(name: str, tmp_path: Path) -> None:
    plan = plan_run(preset(name), tmp_path / "root", to_read=True)
    assert plan.num_parameters == TABLE[name][-1]
    assert plan.fetch_bytes > 8e12
    assert [round(100 * part.tokens / plan.total_tokens, 2) for part in plan.components] == [92.57, 6.09, 1.34]
    assert any("dclm_baseline, starcoderdata, proofpile_2 and 16 more cannot be listed" in warning for warning in plan.warnings)
    assert any("bytes free, this run needs about" in warning for warning in plan.warnings)
    assert not any(tmp_path.iterdir())


@pytest.mark.usefixtures("no_network")
def test_what_is_to_run_is_refused_without_the_network(tmp_path: Path) -> None:
    with pytest.raises(NotListed, match=r"dataset 'dclm_baseline'"):
        plan_run(preset("150m"), tmp_path / "root")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["15m", "75m", "150m", "300m", "600m", "1.4b", "1.9b", "3.2-1b", "3.5b", "8b", "dclm-7b-1x"])
def test_it_compiles_ahead_for_its_slices(name: str) -> None:
    pytest.importorskip("libtpu")
    accelerator, count = SLICES[job_named(name).name]
    command = ["-m", "model.preflight", name, "--accelerator", accelerator, "--num-slices", str(count), "--remat", "full", "--no-search"]
    done = subprocess.run([sys.executable, *command, "--json"], capture_output=True, text=True, cwd=CHECKOUT, timeout=550)
    assert done.returncode == 0, done.stderr[-3000:]
    assert '"fits": true' in done.stdout
