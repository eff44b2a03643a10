"""The torch backend gives what NumPy gives: to rounding, and masks and selections bit for bit."""

from __future__ import annotations

import functools
import os
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
import torch
from test_execution import StopAt, digest

import weightsmith as ws
from conftest import llama_tensors, read_safetensors
from devices import DEVICES
from weightsmith import conformance
from weightsmith.checkpoint.tensor import ArrayTensor
from weightsmith.cli.main import main
from weightsmith.conformance import inputs_for, models_for, parameters_for
from weightsmith.engine import executor, torch_backend
from weightsmith.engine.arrays import merge_arrays
from weightsmith.engine.backend import NUMPY, choose_backend
from weightsmith.engine.evaluate import Evaluator
from weightsmith.engine.torch_backend import TorchBackend
from weightsmith.errors import DeviceError, Interrupted, OutputError
from weightsmith.methods import statistics
from weightsmith.methods.registry import all_methods

OWN = [method for method in all_methods().values() if method.function.__module__.startswith("weightsmith.")]
# Where the masks lie on the weights themselves.
RANDOM = [method.name for method in OWN if method.random and "density" in method.parameters and method.work is None]
# Beyond statistics' _SMALL_SCOPE, so that selection begins with a sample.
LARGE = (3, 50_001)
# A last digit or two of the working dtype, of the largest value: sums are taken in another order.
ROUNDING = {np.float32: 5e-7, np.float64: 1e-13}


@pytest.fixture(params=DEVICES)
def device(request):
    return request.param


def save_both(merged, tmp_path, device, on_nonfinite="error", **options):
    """Save with NumPy and with torch; return what was written, and both summaries."""
    summaries = (
        merged.save(tmp_path / "numpy", on_nonfinite=on_nonfinite),
        merged.save(tmp_path / "torch", device=device, backend="torch", on_nonfinite=on_nonfinite, **options),
    )
    return read_safetensors(tmp_path / "numpy"), read_safetensors(tmp_path / "torch"), summaries


def assert_same_bytes(found, expected):
    assert found.keys() == expected.keys()
    assert [name for name in expected if found[name].tobytes() != expected[name].tobytes()] == []


def places(array):
    """Number 16-bit floats in their order, so that neighbours differ by one."""
    patterns = array.view(np.int16).astype(np.int32)
    return np.where(patterns < 0, -32768 - patterns, patterns)


def families(method, write_model, dtype):
    """Write fine-tunes of one base, as many as a method takes."""
    base = llama_tensors(0, hidden=32, vocabulary=64)
    tensors = [base]
    for seed in range(1, 1 + models_for(method)):
        change = llama_tensors(seed, hidden=32, vocabulary=64, scale=0.1)
        tensors.append({name: base[name] + change[name] for name in base})
    cast = [{name: array.astype(dtype) for name, array in one.items()} for one in tensors]
    return [write_model(f"model{i}", one) for i, one in enumerate(cast)]


def merged_by(method, folders):
    base, *models = folders
    return ws.merge(
        method.name, models, None if method.base == "unused" else base, seed=3, **parameters_for(method, len(models))
    )


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("method", OWN, ids=lambda method: method.name)
def test_every_method_is_the_same_to_rounding(write_model, tmp_path, device, method, dtype):
    expected, found, _ = save_both(merged_by(method, families(method, write_model, dtype)), tmp_path, device)
    for name, array in expected.items():
        assert found[name].dtype == array.dtype == dtype
        bound = ROUNDING[dtype] * max(1.0, float(np.abs(array).max()))
        np.testing.assert_allclose(found[name], array, rtol=0, atol=bound, err_msg=name)


@pytest.mark.parametrize("method", OWN, ids=lambda method: method.name)
def test_bfloat16_results_are_the_same_but_for_rare_neighbours(write_model, tmp_path, device, method):
    """At most one value in a thousand is rounded to the other neighbour."""
    expected, found, _ = save_both(
        merged_by(method, families(method, write_model, ml_dtypes.bfloat16)), tmp_path, device
    )
    one, other = (places(np.concatenate([part[name].ravel() for name in expected])) for part in (expected, found))
    assert np.abs(one - other).max() <= 1
    assert np.count_nonzero(one != other) <= one.size / 1000


@pytest.mark.parametrize("method", RANDOM)
@pytest.mark.parametrize("scope", ["row", "tensor"])
def test_random_masks_are_the_same_bit_for_bit(device, method, scope):
    """Of task vectors without zeros, those of the result are the mask."""
    rng = np.random.default_rng(0)
    delta = rng.choice([-1.0, 1.0], (301, 401)) * rng.uniform(0.5, 1, (301, 401))
    given = {"weight": 1.0, "density": 0.5}
    if method.startswith("della"):
        given |= {"epsilon": 0.3, "trim_scope": scope}
    expected, found = (
        merge_arrays(method, [delta.astype(np.float32)], np.zeros_like(delta, np.float32), parameters=given, **options)
        for options in ({}, {"backend": "torch", "device": device})
    )
    assert 0.4 < np.mean(expected == 0) < 0.6
    np.testing.assert_array_equal(found == 0, expected == 0)


def large_inputs(dtype):
    rng = np.random.default_rng(0)
    base = rng.standard_normal(LARGE).astype(np.float32)
    # Rounded: many magnitudes are equal, and position decides among them.
    return [(base + np.round(rng.standard_normal(LARGE), 1)).astype(dtype) for _ in range(2)], base.astype(dtype)


@pytest.mark.parametrize("radix", [False, True], ids=["gathered", "radix"])
@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float32, np.float64])
def test_selection_keeps_the_same_entries(device, dtype, radix, monkeypatch):
    if radix:
        monkeypatch.setattr(statistics, "MOST_GATHERED", 10)
    models, base = large_inputs(dtype)
    given = {"weight": [0.5, 0.25], "density": [0.3, 0.6]}
    expected, found = (
        merge_arrays("ties", models, base, parameters=given, **options)
        for options in ({}, {"backend": "torch", "device": device, "threads": 2})
    )
    assert found.tobytes() == expected.tobytes()


@pytest.mark.parametrize("method", ["ties", "dare_ties", "della", "slerp", "arcee_fusion"])
def test_threads_and_blocks_do_not_change_a_byte(write_model, tmp_path, device, method, monkeypatch):
    merged = merged_by(all_methods()[method], families(all_methods()[method], write_model, np.float32))
    merged.save(tmp_path / "one", threads=1, device=device, backend="torch")
    monkeypatch.setattr(torch_backend, "BLOCK", 100)
    monkeypatch.setattr(torch_backend, "_GPU_BLOCK", 100)
    monkeypatch.setattr(executor, "_SMALL", 50)
    merged.save(tmp_path / "two", threads=3, device=device, backend="torch")
    assert_same_bytes(read_safetensors(tmp_path / "two"), read_safetensors(tmp_path / "one"))


@pytest.mark.parametrize("scope", ["layer", "model"])
def test_statistics_of_several_tensors(write_model, tmp_path, device, scope):
    base, *models = families(all_methods()["ties"], write_model, ml_dtypes.bfloat16)
    merged = ws.merge("ties", models, base, weight=0.5, density=0.3, trim_scope=scope)
    expected, found, _ = save_both(merged, tmp_path, device, threads=3)
    assert_same_bytes(found, expected)


def test_a_pipeline_of_steps(write_model, tmp_path, device):
    base, *models = families(all_methods()["ties"], write_model, ml_dtypes.bfloat16)
    soup = ws.average(models[:2])
    expected, found, _ = save_both(ws.merge("ties", [soup, models[2]], base, weight=0.3, density=0.5), tmp_path, device)
    assert_same_bytes(found, expected)


def test_a_method_that_reads_whole_tensors(device):
    models, base = inputs_for(all_methods()["nuslerp"], (24, 36))
    given = {"weight": [0.3, 0.7], "nuslerp_flatten": False, "nuslerp_row_wise": True}
    expected, found = (
        merge_arrays("nuslerp", models, base, parameters=given, **options)
        for options in ({}, {"backend": "torch", "device": device, "threads": 3, "block_size": 100})
    )
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "dtype", ["float64", "float32", "float16", "bfloat16", *(f"float8_e{kind}" for kind in ("4m3fn", "5m2"))]
)
def test_every_dtype_is_read_and_written(write_model, tmp_path, device, dtype):
    """Also values that overflow; tensors of integers are carried."""
    tensors = [llama_tensors(seed, scale=scale) for seed, scale in ((0, 300.0), (1, 200_000.0))]
    kinds = [ml_dtypes.float8_e5m2, np.float32] if dtype.startswith("float8") else [ml_dtypes.bfloat16, np.float64]
    folders = [
        write_model(f"m{i}", {n: a.astype(kind) for n, a in one.items()} | {"steps": np.arange(5)})
        for i, (one, kind) in enumerate(zip(tensors, kinds, strict=True))
    ]
    merged = ws.merge("linear", folders, weight=[0.5, 0.25], out_dtype=dtype)
    expected, found, summaries = save_both(merged, tmp_path, device, "warn")
    for name, array in expected.items():
        assert found[name].dtype == array.dtype
        with np.errstate(invalid="ignore"):
            np.testing.assert_array_equal(found[name].astype(np.float64), array.astype(np.float64))
    assert summaries[0].nonfinite == summaries[1].nonfinite
    assert bool(summaries[0].nonfinite) == (dtype in ("float16", "float8_e4m3fn", "float8_e5m2"))


def test_what_is_not_finite_is_counted_once(write_model, tmp_path, device):
    """Not again in every sweep of a statistic, and in whole tensors too."""
    tensors = [llama_tensors(seed) for seed in range(3)]
    tensors[1]["model.norm.weight"][2] = np.nan
    tensors[2]["lm_head.weight"][0, :3] = np.inf
    base, a, b = (write_model(name, one) for name, one in zip(("base", "a", "b"), tensors, strict=True))
    for i, merged in enumerate(
        (
            ws.merge("ties", [ws.average([a, b]), b], base, weight=0.3, density=0.5),
            ws.merge("nuslerp", [a, b], base, weight=0.5, nuslerp_flatten=False, nuslerp_row_wise=True),
        )
    ):
        _, _, (expected, found) = save_both(merged, tmp_path / str(i), device, "warn")
        assert found.nonfinite == expected.nonfinite
        counts = {(entry.tensor, entry.where): entry.count for entry in found.nonfinite if entry.where != "result"}
        # In the first b is an input twice.
        assert counts == {("model.norm.weight", "a"): 1, ("lm_head.weight", "b"): 3 if i else 6}


def test_an_interrupted_run_goes_on_where_it_stopped_on_the_same_backend_alone(write_model, tmp_path, device):
    method = all_methods()["dare_ties"]
    merged = merged_by(method, families(method, write_model, np.float32))
    options = {"device": device, "backend": "torch"}
    merged.save(tmp_path / "whole", **options)
    with pytest.raises(Interrupted):
        merged.save(tmp_path / "out", threads=1, progress=StopAt(4, KeyboardInterrupt()), **options)
    with pytest.raises(OutputError, match="its arithmetic differ from"):
        merged.save(tmp_path / "out")
    assert merged.save(tmp_path / "out", **options).resumed >= 4
    assert digest(tmp_path / "out") == digest(tmp_path / "whole")


CHECKS = (conformance.any_shape, conformance.inputs_untouched, conformance.wide_inputs, conformance.nonfinite_inputs)


@pytest.mark.parametrize("method", OWN, ids=lambda method: method.name)
def test_checks_of_the_battery_hold(device, method, monkeypatch):
    monkeypatch.setattr(conformance, "merge_arrays", functools.partial(merge_arrays, device=device, backend="torch"))
    for check in CHECKS:
        check(method)


class Folded(ArrayTensor):
    """Stands for a base with an adapter: it is computed in float32, and cannot be written to."""

    def read_wide(self, start, stop):
        values = self.read(start, stop).astype(np.float32) / 3
        values.flags.writeable = False
        return values


def test_inputs_that_are_computed_or_read_only(device):
    array = np.arange(10, dtype=np.float16)
    array.flags.writeable = False
    evaluator = Evaluator(backend=choose_backend(device, "torch"))
    found, lost = evaluator.result(Folded("x", array), 2, 9, np.dtype(np.float32))
    np.testing.assert_array_equal(found, array[2:9].astype(np.float32) / 3)
    assert lost == 0
    models = [array, array]
    np.testing.assert_array_equal(merge_arrays("linear", models, parameters={"weight": 1.0}, backend="torch"), array)


def test_memory_that_inputs_are_read_to_is_used_again_block_after_block(device):
    backend = choose_backend(device, "torch")
    evaluator = Evaluator(backend=backend)
    tensors = [ArrayTensor("x", np.full(100, float(i), np.float32)) for i in range(5)]
    with backend.computing():
        held = [evaluator.values(tensor, 0, 100) for tensor in tensors]
        within = [backend.load(tensor, 0, 100, np.dtype(np.float32)) for tensor in tensors]
    for i, (one, other) in enumerate(zip(held, within, strict=True)):
        assert one.tolist() == other.tolist() == [float(i)] * 100
    assert len(backend.scratch._buffers) == len(tensors)


class Stream:
    """Stands for a GPU's: notes how much memory is held when it is waited for."""

    def __init__(self, backend):
        self.backend, self.held = backend, []

    def synchronize(self):
        self.held.append(self.backend._thread.taken)


def test_memory_is_free_again_only_when_the_stream_is_done():
    backend = TorchBackend("cpu")
    stream = backend._thread.stream = Stream(backend)
    tensor = ArrayTensor("x", np.zeros(10, np.float32))

    def fail():
        with backend.computing():
            backend.load(tensor, 0, 10, np.dtype(np.float32))
            with backend.computing():
                backend.load(tensor, 0, 10, np.dtype(np.float32))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert stream.held == [2, 1]
    assert backend._thread.taken == 0


def test_a_device_without_memory_left_is_one_clear_error(write_model, tmp_path, monkeypatch):
    def fail(*_):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    method = all_methods()["linear"]
    merged = merged_by(method, families(method, write_model, np.float32))
    monkeypatch.setattr(torch_backend.convert, "widen", fail)
    with pytest.raises(DeviceError, match=r"the memory of cpu is full.*fewer --threads"):
        merged.save(tmp_path / "out", backend="torch")


def test_by_default_numpy_computes_and_torch_where_it_is_asked_for():
    assert choose_backend() is choose_backend("cpu") is choose_backend(backend="numpy") is NUMPY
    assert isinstance(choose_backend(backend="torch"), TorchBackend)


@pytest.mark.parametrize(
    ("device", "backend", "message"),
    [
        ("cuda", "numpy", "the backend numpy computes on the cpu alone; for the device 'cuda' use torch"),
        ("cuda", None, "there is no device 'cuda'; use one of: cpu"),
        ("cuda:1", "torch", "there is no device 'cuda:1'; use one of: cpu"),
        ("gpu7", None, "there is no device 'gpu7'; use one of: cpu"),
        ("meta", None, "there is no device 'meta'; use one of: cpu"),
        ("mps", None, "mps has no float64"),
        ("cpu", "tourch", "there is no backend 'tourch' (did you mean 'torch'?)"),
    ],
)
def test_a_device_that_cannot_be_used_is_refused(device, backend, message, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(DeviceError) as error:
        choose_backend(device, backend)
    assert message in str(error.value)


def test_without_pytorch_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.delitem(sys.modules, "weightsmith.engine.torch_backend")
    with pytest.raises(DeviceError, match=r"needs PyTorch .*pip install 'weightsmith\[torch\]'"):
        choose_backend("cuda")


def test_on_the_command_line(write_model, tmp_path, capsys):
    base, a = (str(write_model(name, llama_tensors(i))) for i, name in enumerate(("base", "a")))
    flags = ["merge", "--method", "slerp", "--base", base, "--model", a, "-p", "t=0.4"]
    for options in (["--backend", "torch", "--device", "cpu"], []):
        with pytest.raises(SystemExit) as end:
            main([*flags, *options, str(tmp_path / f"out{len(options)}")])
        assert not end.value.code
    expected, found = (read_safetensors(tmp_path / name) for name in ("out0", "out4"))
    for name, array in expected.items():
        np.testing.assert_allclose(found[name], array, rtol=0, atol=1e-6)
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        main([*flags, "--device", "cuda", "--backend", "numpy", str(tmp_path / "no")])
    assert end.value.code == 1
    assert capsys.readouterr().err.startswith("error: the backend numpy computes on the cpu alone")


def test_a_merge_on_numpy_never_loads_torch(write_model, tmp_path):
    folders = [str(write_model(name, llama_tensors(i))) for i, name in enumerate(("base", "a", "b"))]
    script = (
        "import sys, weightsmith as ws\n"
        "base, a, b, out = sys.argv[1:]\n"
        "ws.merge('della', [a, b], base, weight=0.5, density=0.5, trim_scope='tensor').save(out)\n"
        "print('torch' in sys.modules)"
    )
    for kernels in ("", "numpy"):
        done = subprocess.run(
            [sys.executable, "-c", script, *folders, str(tmp_path / f"out{kernels}")],
            env={**os.environ, "WEIGHTSMITH_KERNELS": kernels},
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout == "False\n"
