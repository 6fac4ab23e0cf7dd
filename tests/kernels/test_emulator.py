"""The emulator finds what a kernel must not do, says where, and is none the worse for it; what it computes is what PTX says."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from streamkv.errors import BackendError
from streamkv_kernels import device as device_module
from streamkv_kernels.device import Variant
from streamkv_kernels.emulated import EmulatedDevice, EmulatorError, Schedule

HERE = Path(__file__).parent
SINS = Variant("sins")
LINES = {
    match[1]: number
    for number, line in enumerate((HERE / "sins.cu").read_text().splitlines(), 1)
    if (match := re.match(r"SIN\((\w+)\)", line))
}
SHARED = 4096


@pytest.fixture(scope="module")
def fast(plain: EmulatedDevice) -> EmulatedDevice:
    return replace(plain, sources=HERE, optimize=1, _libraries={})


@pytest.fixture(scope="module")
def careful(checked: EmulatedDevice) -> EmulatedDevice:
    return replace(checked, sources=HERE, optimize=1, _libraries={})


def commit(device: EmulatedDevice, name: str, *, index: int | None = 0, n: int = 1, floats: int = 64) -> torch.Tensor:
    """Launch a sin over x = 0, 1, 2 ... and an index that is the same everywhere."""
    x = torch.arange(floats, dtype=torch.float32)
    indices = None if index is None else torch.full((64,), index, dtype=torch.int32)
    device.kernel(SINS, name, SHARED).launch((1, 1, 1), (64, 1, 1), x, indices, n)
    return x


RACE = "race: it (reads|writes) shared byte \\d+, which (thread \\d+ wrote|was read \\(thread \\d+\\)) without a barrier since"
CHECKED_ONLY = {
    "race": RACE,
    "race_across_warps": RACE,
    "write_after_read": RACE,
    "write_after_own_and_another_read": RACE,
    "two_writers": "race: it writes shared byte 0, which thread \\d+ wrote",
    "shuffle_is_no_barrier": RACE,
    "reused_too_early": RACE,
    "in_flight": "race: it reads shared byte \\d+ while a cp.async of thread \\d+ is in flight to it",
    "waits_for_too_few": "race: it reads shared byte \\d+ while a cp.async",
    "copy_without_barrier": RACE,
    "overwrites_a_copy": "race: it writes shared byte \\d+ while a cp.async",
    "adds_to_a_copy": "while a cp.async of thread",
    "reads_past_the_end": "read of 4 bytes that belong to none of its tensors",
    "writes_past_the_end": "write of 4 bytes that belong to none",
    "copies_past_the_end": "read of 16 bytes that belong to none",
    "past_shared_memory": "write of 4 bytes past the 4096 bytes of shared memory",
    "misaligned": "misaligned read of 8 bytes",
    "single_byte": "it writes a single byte of shared memory",
}
ALWAYS = {
    "ends_in_flight": "it ends while 1 of its cp.async are in flight",
    "misaligned_16": "misaligned read of 16 bytes",
    "misaligned_copy": "misaligned address of cp_async16",
    "misaligned_matrix": "misaligned address of ldmatrix_x4",
    "divergent_barrier": "divergence: ",
    "divergent_within_a_warp": "divergence: ",
    "divergent_collective": "divergence: ",
    "unlike_collectives": "divergence: thread \\d+ is in shfl\\w* while thread \\d+ of its warp is in shfl",
    "barrier_after_exit": "divergence: ",
}
NO_LINE = {"ends_in_flight"}  # it stands in no function of its kernel any more


@pytest.mark.parametrize("name", [*CHECKED_ONLY, *ALWAYS])
@pytest.mark.parametrize("order", ["oldest", "newest", "random"])
def test_the_checked_build_finds_it_and_says_where(careful: EmulatedDevice, name: str, order: str) -> None:
    device = replace(careful, schedule=Schedule(order, seed=3))
    with pytest.raises(EmulatorError, match=(CHECKED_ONLY | ALWAYS)[name]) as caught:
        commit(device, name)
    error = caught.value
    assert error.kernel == name
    assert error.block == (0, 0, 0)
    assert 0 <= error.thread < 64
    line = int(error.line.removeprefix("sins.cu:"))
    following = min((other for other in LINES.values() if other > LINES[name]), default=10**6)
    assert LINES[name] <= line < following or name in NO_LINE
    assert torch.equal(commit(device, "copies")[:32], torch.zeros(32)), "the next launch works"


@pytest.mark.parametrize("name", ALWAYS)
def test_the_plain_build_finds_it_too(fast: EmulatedDevice, name: str) -> None:
    with pytest.raises(EmulatorError, match=ALWAYS[name]) as caught:
        commit(fast, name)
    assert name in NO_LINE or caught.value.line == f"sins.cu:{LINES[name]}"


@pytest.mark.parametrize("name", ["ordered", "copies"])
@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("order", ["oldest", "newest", "random"])
def test_nothing_is_found_in_what_is_right(
    careful: EmulatedDevice, fast: EmulatedDevice, name: str, order: str, early: bool
) -> None:
    schedule = Schedule(order, seed=1, early_copies=early)
    results = [commit(replace(device, schedule=schedule), name) for device in (careful, fast)]
    assert torch.equal(*results)
    if name == "copies":
        expected = torch.cat([torch.zeros(32), torch.arange(64.0).view(16, 4)[torch.arange(31, -1, -1) % 16, 0]])
    else:
        pairs = torch.arange(64).view(2, 32)[[1, 0]].flatten() ^ 1
        expected = pairs.float()
    assert torch.equal(results[0], expected)


@pytest.mark.parametrize("looks", [False, True])
def test_a_wild_pointer_ends_the_launch_only(careful: EmulatedDevice, fast: EmulatedDevice, looks: bool) -> None:
    device = careful if looks else fast
    for _ in range(3):
        with pytest.raises(EmulatorError, match="belong to none of its tensors" if looks else "not mapped") as caught:
            commit(device, "null_pointer", index=None)
        assert caught.value.line == f"sins.cu:{LINES['null_pointer']}"
        if looks:
            with pytest.raises(EmulatorError, match="belong to none of its tensors"):
                commit(device, "index_out_of_range", index=10_000)
        with pytest.raises(EmulatorError, match="division by zero"):
            commit(device, "divides_by_zero")
        with pytest.raises(EmulatorError, match="stack overflows"):
            commit(device, "overflows_its_stack")
        commit(device, "copies")


def test_what_never_ends_is_ended(careful: EmulatedDevice, fast: EmulatedDevice) -> None:
    for device, name in ((fast, "endless"), (careful, "endless"), (careful, "endless_reading")):
        with pytest.raises(EmulatorError, match=r"it runs longer than 0\.05 s"):
            commit(replace(device, time_limit_s=0.05), name)


@pytest.mark.parametrize(("name", "each"), [("rows_in_one_bank", 8), ("rows_in_all_banks", 1)])
def test_bank_conflicts_of_matrices_are_counted(fast: EmulatedDevice, name: str, each: int) -> None:
    commit(fast, name)
    assert fast.counters["ldmatrix"] == 2
    assert fast.counters["ldmatrix_wavefronts"] == 2 * 4 * each


def test_traffic_is_counted(careful: EmulatedDevice) -> None:
    device = replace(careful, record_traffic=True)
    commit(device, "strided_store")
    assert (device.counters["shared_wavefronts"], device.counters["least_shared_wavefronts"]) == (2 * 8, 2)
    commit(device, "strided_load", floats=512)
    assert (device.counters["global_sectors"], device.counters["least_global_sectors"]) == (64, 2 * 4)
    assert (device.counters["shared_wavefronts"], device.counters["least_shared_wavefronts"]) == (2, 2)


def test_schedules_differ(fast: EmulatedDevice) -> None:
    def order(schedule: Schedule) -> list[int]:
        out = torch.zeros(64, dtype=torch.int32)
        replace(fast, schedule=schedule).kernel(SINS, "order", SHARED).launch((1, 1, 1), (64, 1, 1), out, 0, 0.0)
        return out.tolist()

    assert order(Schedule()) == list(range(64))
    assert order(Schedule("newest")) != order(Schedule())
    assert order(Schedule("random", seed=1)) == order(Schedule("random", seed=1)) != order(Schedule("random", seed=2))
    assert sorted(order(Schedule("random", seed=2))) == list(range(64))


# ---------------------------------------------------------------- arguments


def test_arguments_that_a_gpu_would_misread_are_refused(fast: EmulatedDevice) -> None:
    x, index = torch.zeros(64), torch.zeros(64, dtype=torch.int32)
    kernel = fast.kernel(SINS, "race")
    for arguments in ((x, index, 1.0), (x, 1, 1), (1.0, index, 1), (x, index.long(), 1), (x.half(), index, 1), (x, index, True)):
        with pytest.raises(TypeError, match=r"argument \d of race is"):
            kernel.bind(*arguments)
    with pytest.raises(TypeError, match="takes 3 arguments, not 2"):
        kernel.bind(x, index)
    bound = kernel.bind(x, index, 1)
    for block in ((31, 1, 1), (1056, 1, 1), (0, 1, 1)):
        with pytest.raises(ValueError, match="whole warps"):
            bound.launch((1, 1, 1), block)
    with pytest.raises(ValueError, match="no grid"):
        bound.launch((1, 0, 1), (32, 1, 1))
    with pytest.raises(ValueError, match="bytes of shared memory"):
        fast.kernel(SINS, "race", 300_000).bind(x, index, 1).launch((1, 1, 1), (32, 1, 1))


def test_sources_that_do_not_compile_are_one_sentence(fast: EmulatedDevice, tmp_path: Path) -> None:
    (tmp_path / "bad.cu").write_text('#include "device.cuh"\nSKV_KERNEL(bad)(float* x, int n) { x[n] = 0.f; }\nSKV_EXPORT(bad)\n')
    with pytest.raises(BackendError, match="a scalar parameter of a kernel is long long or double"):
        replace(fast, sources=tmp_path).kernel(Variant("bad"), "bad")
    with pytest.raises(BackendError, match=r"sins\.cu has no SKV_EXPORT\(nothing\)"):
        fast.kernel(SINS, "nothing")


# ---------------------------------------------------------------- numbers


def test_conversions_are_those_of_torch(fast: EmulatedDevice) -> None:
    powers = 2.0 ** torch.arange(-30, 20, dtype=torch.float64)
    factors = (1, -1, 1.0625, 1.1875, 1.5, 1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-11, 1 + 3 * 2**-11)  # halfway between two numbers
    edges = [0.0, -0.0, 65504.0, 65519.9, 65520.0, 447.9, 448.0, 463.9, 464.0, 500.0, torch.inf, torch.nan, 127.5, -128.5]
    normal = torch.randn(2000, generator=torch.Generator().manual_seed(0)) * 100
    x = torch.cat([normal, *((powers * factor).float() for factor in factors), torch.tensor(edges)])
    out = torch.full((7, len(x)), torch.nan)
    fast.kernel(SINS, "numbers").launch((-(-len(x) // 64), 1, 1), (64, 1, 1), x, out, len(x))
    kept = x.clamp(-448, 448)  # torch gives NaN beyond
    same = {0: x.bfloat16(), 1: x.half(), 2: kept.to(torch.float8_e4m3fn), 5: x.half(), 6: x.bfloat16()}
    for row, expected in same.items():
        assert torch.equal(out[row].nan_to_num(nan=-7e7), expected.float().nan_to_num(nan=-7e7)), row
    finite = x.isfinite()
    assert torch.equal(out[3][finite], x[finite].clamp(-127, 127).round())
    assert (out[4] - x.double().tanh())[finite].abs().max() < 3e-7


def test_codes_of_a_byte(fast: EmulatedDevice) -> None:
    out = torch.zeros(4, 256)
    fast.kernel(SINS, "codes").launch((1, 1, 1), (256, 1, 1), out)
    codes = torch.arange(256, dtype=torch.uint8)
    floats, ints = codes.view(torch.float8_e4m3fn).float().nan_to_num(nan=1e9), codes.view(torch.int8).float()
    assert torch.equal(out[0].nan_to_num(nan=1e9).abs(), floats.abs())
    assert torch.equal(out[0].nan_to_num(nan=0), floats.where(floats.abs() < 1e9, 0.0))
    assert torch.equal(out[1].nan_to_num(nan=0), floats.where(floats.abs() < 1e9, 0.0).flip(0))
    assert torch.equal(out[2], ints)
    assert torch.equal(out[3], ints.flip(0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_product_of_matrices(fast: EmulatedDevice, careful: EmulatedDevice, dtype: torch.dtype) -> None:
    random = torch.Generator().manual_seed(0)
    a, b = (torch.randn(rows, 16, generator=random).to(dtype) for rows in (16, 8))
    c, d = torch.randn(16, 8, generator=random), torch.zeros(16, 8)
    for device in (fast, careful):
        kernel = device.kernel(SINS, f"product_{'bf16' if dtype is torch.bfloat16 else 'f16'}", SHARED)
        kernel.launch((1, 1, 1), (32, 1, 1), a, b, c, d)
        assert (d - (c.double() + a.double() @ b.double().T)).abs().max() < 1e-5


def test_matrices_are_transposed(fast: EmulatedDevice) -> None:
    x = torch.randn(4, 8, 8).half()
    out = torch.zeros(4, 32, 1, dtype=torch.int32)
    fast.kernel(SINS, "transposed", SHARED).launch((1, 1, 1), (32, 1, 1), x, out)
    assert torch.equal(out.view(torch.float16).reshape(4, 8, 8), x.transpose(1, 2))


# ---------------------------------------------------------------- the sources


def test_only_the_device_layer_knows_ptx_and_nothing_needs_a_header() -> None:
    sources = [path for suffix in ("cu", "cuh") for path in device_module.SOURCES.glob(f"*.{suffix}")]
    assert device_module.SOURCES / "device.cuh" in sources
    for path in sources:
        text = path.read_text()
        assert "#include <" not in text, path.name
        if path.name != "device.cuh":
            assert not re.search(r"\basm\b|__(shared|shfl|syncthreads|syncwarp|device|global)", text), path.name


def test_the_portable_switch_of_fibers_does_the_same(fast: EmulatedDevice) -> None:
    device = replace(fast, machine_defines=("EMU_UCONTEXT",), _libraries={})
    x, index = torch.arange(64, dtype=torch.float32), torch.zeros(64, dtype=torch.int32)
    device.kernel(SINS, "ordered", SHARED).launch((1, 1, 1), (64, 1, 1), x, index, 1)
    assert torch.equal(x, commit(fast, "ordered"))
    with pytest.raises(EmulatorError, match="divergence"):
        device.kernel(SINS, "divergent_barrier", SHARED).launch((1, 1, 1), (64, 1, 1), x, index, 1)
