"""Bundles of the zoo's models, which were really trained: each restored one still does what its expert does."""

from __future__ import annotations

import pytest

import weightsmith as ws
from weightsmith.quickstart import accuracies, zoo

EXPERTS = ("shifted", "covered", "thick")
# kind, parameters, most points of accuracy lost on any task, most of the three models' bytes with a base by reference
ROWS = [
    ("emr", {}, 5, 0.43),
    ("tall", {}, 7, 0.43),
    ("tsv", {}, 2, 0.56),
    ("rmm", {"basis": 3}, 0, 1.06),
    ("rmm", {"basis": 3, "rank": 16}, 2, 0.44),
    ("bitdelta", {}, 6, 0.13),
    ("lossless", {}, 0, 0.84),
]


@pytest.fixture(scope="module")
def measured() -> dict[str, float]:
    test = ws.open(zoo() / "digits-test.safetensors")
    return {name: accuracies(ws.open(zoo() / name), test)[name] for name in EXPERTS}


@pytest.mark.parametrize(("kind", "parameters", "lost", "share"), ROWS)
def test_restored_experts_keep_their_accuracy(measured, tmp_path, kind, parameters, lost, share):
    base, test = zoo() / "base", ws.open(zoo() / "digits-test.safetensors")
    models = [zoo() / name for name in EXPERTS]
    bundle = ws.bundle.create(
        tmp_path / "out", models, base=base, kind=kind, base_by_reference=True, **parameters
    ).bundle
    sizes = bundle.sizes()
    assert (sizes.shared + sum(sizes.tasks.values())) / sizes.models < share
    for name in EXPERTS:
        found = accuracies(ws.open(tmp_path / "out", task=name, base=base), test)[name]
        assert found >= measured[name] - lost / 100 - 1e-9
    if lost == 0:
        ws.save(ws.open(f"{base}+{tmp_path / 'out'}#thick"), tmp_path / "thick")
        assert ws.diff(tmp_path / "thick", zoo() / "thick").total.relative < 2e-5
    if kind == "lossless":
        assert ws.diff(tmp_path / "thick", zoo() / "thick").identical
