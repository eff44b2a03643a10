"""What a bundle holds of models that differ, what lies beside the weights, and what becomes of a run that is stopped."""

from __future__ import annotations

import errno
import json
import random
import shutil
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import faults
import weightsmith as ws
from conftest import llama_tensors, read_safetensors
from faults import CRASHED, KILLED, REFUSED, Fault
from weightsmith.bundle.kind import kinds
from weightsmith.errors import CheckpointError, MethodError, OutputError, PlanError, RecipeError
from weightsmith.plan.merged import LazyCheckpoint


@pytest.fixture
def folders(write_model) -> list[Path]:
    """A base and three fine-tunes of it."""
    base = llama_tensors(0)
    found = [write_model("base", base)]
    for i, name in enumerate(("one", "two", "three"), 1):
        change = llama_tensors(i, scale=0.1)
        found.append(write_model(name, {k: v + change[k] for k, v in base.items()}))
    return found


def create(folders: list[Path], target: Path, kind: str = "emr", **options: Any) -> ws.bundle.Bundle:
    return ws.bundle.create(target, folders[1:], base=folders[0], kind=kind, **options).bundle


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# -- models that are not alike --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", list(kinds()))
def test_models_that_differ_in_names_shapes_and_dtypes_come_back_with_their_own(write_model, tmp_path, kind):
    rng = np.random.default_rng(0)
    base = {
        **llama_tensors(0),
        "only_base": np.ones(3, np.float32),
        "ids": np.arange(6),
        "scale": np.float32(2),
        "empty": np.zeros((0, 3), np.float32),
        "frozen": rng.standard_normal((40, 3)).astype(np.float32),
    }

    def tuned(seed: int) -> dict[str, Any]:
        change = llama_tensors(seed, scale=0.1)
        found = {k: v + change[k] if k in change else v for k, v in base.items()}
        found["scale"] = np.float32(seed)
        return found

    one = tuned(1)
    one["lm_head.weight"] = rng.standard_normal((5, 8)).astype(np.float32)
    del one["only_base"]
    two = {k: v.astype(np.float16) if v.dtype == np.float32 else v for k, v in tuned(2).items()}
    two["ids"] = np.arange(6) + 1
    two["extra.weight"] = rng.standard_normal((4, 4)).astype(ml_dtypes.bfloat16)
    three = tuned(3)
    three["model.embed_tokens.weight"] = rng.standard_normal((17, 8)).astype(np.float32)
    three["ids"] = np.arange(6, dtype=np.int32)
    del three["lm_head.weight"]
    models = {"one": one, "two": two, "three": three}
    config = {"model_type": "llama", "num_hidden_layers": 2, "tie_word_embeddings": True}
    folders = {task: write_model(task, tensors, config) for task, tensors in models.items()}
    ws.bundle.create(tmp_path / "out", folders, base=write_model("base", base), kind=kind)
    for task, tensors in models.items():
        found = ws.open(tmp_path / "out", task=task)
        assert list(found) == list(ws.open(folders[task]))
        for name, values in tensors.items():
            assert (found[name].shape, found[name].dtype) == (values.shape, values.dtype), name
            whole = values.dtype.kind == "i" or name not in base or base[name].shape != values.shape
            if whole or name in ("extra.weight", "empty") or kind == "lossless":
                assert found[name].numpy().tobytes() == values.tobytes(), name
    stored = read_safetensors(tmp_path / "out" / "tasks" / "one")
    assert not any("frozen" in name or "ids" in name for name in stored)
    # It is saved as the model was, tied head and all.
    ws.save(ws.open(tmp_path / "out", task="three"), tmp_path / "again")
    assert set(read_safetensors(tmp_path / "again")) == set(three)
    assert json.loads((tmp_path / "again" / "config.json").read_text())["tie_word_embeddings"] is True


@pytest.mark.parametrize("kind", list(kinds()))
def test_a_model_that_changes_nothing_takes_nothing(write_model, folders, tmp_path, kind):
    same = write_model("same", llama_tensors(0))
    bundle = create([*folders, same], tmp_path / "out", kind)
    assert bundle.sizes().tasks["same"] == 0
    assert not (tmp_path / "out" / "tasks" / "same").exists()
    found = {name: tensor.numpy() for name, tensor in ws.open(tmp_path / "out", task="same").items()}
    assert all(np.array_equal(found[name], values) for name, values in llama_tensors(0).items())
    # What the others are does not depend on it, but for TSV, which shares ranks among all tasks.
    if kind != "tsv":
        create(folders, tmp_path / "without", kind)
        for name, tensor in ws.open(tmp_path / "without", task="two").items():
            assert np.array_equal(tensor.numpy(), ws.open(tmp_path / "out", task="two")[name].numpy())


def test_adapters_are_folded_onto_the_base(write_model, tmp_path):
    from test_kinds import write_lora

    base = write_model("base", llama_tensors(0))
    adapter = write_lora(tmp_path / "lora", 1)
    ws.bundle.create(tmp_path / "out", {"a": adapter, "b": f"{base}+{adapter}"}, base=base, kind="lossless")
    expected = ws.open(f"{base}+{adapter}")
    for task in "ab":
        found = ws.open(tmp_path / "out", task=task)
        assert all(np.array_equal(tensor.numpy(), found[name].numpy()) for name, tensor in expected.items())


# -- files beside the weights ---------------------------------------------------------------------------------------------


def test_files_beside_the_models_are_kept_once_and_come_back_with_each(folders, tmp_path):
    shared, other = (b'{"model": {"vocab": {"a": %d}}}' % number for number in (0, 1))
    for i, folder in enumerate(folders):
        (folder / "tokenizer.json").write_bytes(other if i == 2 else shared)
        (folder / "modeling_own.py").write_text("import os")
    (folders[1] / "chat_template.jinja").write_text("{{ one }}")
    (folders[3] / "additional_chat_templates").mkdir()
    (folders[3] / "additional_chat_templates" / "tools.jinja").write_text("{{ three }}")
    (folders[3] / "config.json").write_text('{"model_type": "llama", "num_hidden_layers": 2, "own": [1, 2]}')
    create(folders, tmp_path / "out")
    names = sorted(path.name for path in (tmp_path / "out" / "files").iterdir())
    assert [name.split("-", 1)[1] for name in names if "tokenizer" in name] == ["tokenizer.json"]
    assert len(names) == 4
    for i, name in enumerate(("one", "two", "three"), 1):
        ws.save(ws.open(tmp_path / "out", task=name), tmp_path / name / "again")
        again, model = tmp_path / name / "again", folders[i]
        for file in ("tokenizer.json", "chat_template.jinja", "additional_chat_templates/tools.jinja"):
            assert (again / file).exists() == (model / file).exists()
            if (model / file).exists():
                assert (again / file).read_bytes() == (model / file).read_bytes()
        assert not (again / "modeling_own.py").exists()
        assert ws.open(tmp_path / "out", task=name).config == ws.open(model).config
        assert ws.open(model).config.items() <= ws.open(again).config.items()


def test_the_base_in_a_bundle_is_a_model_of_its_own(folders, tmp_path):
    (folders[0] / "tokenizer.json").write_bytes(b"{}")
    create(folders, tmp_path / "out")
    base = ws.open(tmp_path / "out" / "base")
    assert {name: tensor.numpy().tobytes() for name, tensor in base.items()} == {
        name: values.tobytes() for name, values in llama_tensors(0).items()
    }
    assert base.config == ws.open(folders[0]).config
    assert list(base.companions.files) == ["tokenizer.json"]


# -- the base by reference ------------------------------------------------------------------------------------------------


def test_a_base_by_reference_is_needed_and_known_again(write_model, folders, tmp_path):
    bundle = create(folders, tmp_path / "out", base_by_reference=True)
    whole = create(folders, tmp_path / "whole")
    assert bundle.sizes().base == 0
    assert not (tmp_path / "out" / "base").exists()
    with pytest.raises(CheckpointError, match=rf"keeps its base by reference, to '{folders[0]}'.*BASE\+.*out#one"):
        ws.open(tmp_path / "out", task="one")
    moved = tmp_path / "moved"
    shutil.copytree(folders[0], moved)
    ways = [ws.open(tmp_path / "out", task="one", base=moved), ws.open(f"{moved}+{tmp_path / 'out'}#one")]
    for found in ways:
        for name, tensor in ws.open(tmp_path / "whole", task="one").items():
            assert np.array_equal(found[name].numpy(), tensor.numpy())
    ws.save(ways[0], tmp_path / "restored")
    assert ws.reproduce(tmp_path / "restored").ok
    with pytest.raises(CheckpointError, match="holds its own base: leave out"):
        ws.open(f"{moved}+{tmp_path / 'whole'}#one")
    assert whole.sizes().base > 0
    other = llama_tensors(0)
    other["lm_head.weight"] = other["lm_head.weight"][:-1]
    with pytest.raises(CheckpointError, match=r"lm_head.weight' is float32 \[16, 8\] there, and this one has it as"):
        ws.open(tmp_path / "out", task="one", base=write_model("other", other))
    del other["lm_head.weight"]
    with pytest.raises(CheckpointError, match="and this one lacks it"):
        ws.open(tmp_path / "out", task="one", base=write_model("other", other))


def test_another_version_of_the_base_gives_nothing_of_itself_away(write_model, folders, tmp_path):
    create(folders, tmp_path / "out", base_by_reference=True)
    tensors = llama_tensors(0)
    tensors["model.norm.weight"][5] += 1e-6
    opened = ws.open(tmp_path / "out", task="one", base=write_model("newer", tensors))
    assert opened["lm_head.weight"].numpy().shape == (16, 8)
    for _ in range(2):
        with pytest.raises(CheckpointError, match=r"model.norm.weight' is not what it was in the base"):
            opened["model.norm.weight"].read(0, 1)
    with pytest.raises(CheckpointError, match="another version"):
        ws.save(opened, tmp_path / "restored")
    assert not (tmp_path / "restored").exists()


# -- names, targets, references -------------------------------------------------------------------------------------------


def test_tasks_are_named_by_their_folders_or_as_they_are_told(folders, tmp_path):
    assert create(folders, tmp_path / "out").tasks == ("one", "two", "three")
    named = {"a": folders[1], "B.2-x_y": folders[2]}
    assert ws.bundle.create(tmp_path / "b", named, base=folders[0], kind="emr").bundle.tasks == ("a", "B.2-x_y")


@pytest.mark.parametrize(
    "name", ["", ".", "..", "a/b", "a#b", "a+b", "a@b", "-a", ".a", "a b", "a\0", "ä", "a" * 101, "a\n"]
)
def test_names_that_would_be_misread_are_refused(folders, tmp_path, name):
    with pytest.raises(PlanError, match="a task cannot be named"):
        ws.bundle.create(tmp_path / "out", {name: folders[1]}, base=folders[0], kind="emr")


def test_two_tasks_of_one_name_are_refused_with_what_to_do(folders, tmp_path):
    with pytest.raises(PlanError, match="two tasks would be named 'one' and 'one'; name them with --name"):
        create([*folders, folders[1]], tmp_path / "out")
    with pytest.raises(PlanError, match="'One' and 'one'"):
        ws.bundle.create(tmp_path / "out", {"One": folders[1], "one": folders[2]}, base=folders[0], kind="emr")


def test_what_cannot_be_bundled_is_refused_before_anything_is_read(write_model, folders, tmp_path):
    with pytest.raises(PlanError, match="at least one model"):
        create(folders[:1], tmp_path / "out")
    config = {"model_type": "llama", "quantization_config": {"quant_method": "gptq"}}
    quantised = write_model("quantised", llama_tensors(5), config)
    with pytest.raises(PlanError, match="quantised: its tensors are codes"):
        create([*folders, quantised], tmp_path / "out")
    create([*folders, quantised], tmp_path / "lossless", "lossless")
    pipeline = tmp_path / "pipeline"
    pipeline.mkdir()
    (pipeline / "model_index.json").write_text("{}")
    shutil.copytree(folders[1], pipeline / "unet")
    with pytest.raises(PlanError, match="pipeline of several models; bundle one of its components: .*pipeline/unet"):
        create([*folders, pipeline], tmp_path / "out")
    with pytest.raises(RecipeError, match="float8_e4m3fn; use float32, bfloat16 or float16"):
        create(folders, tmp_path / "out", dtype="float8_e4m3fn")
    with pytest.raises(RecipeError, match="did you mean 'float32'"):
        create(folders, tmp_path / "out", dtype="float23")
    with pytest.raises(MethodError, match="given with its parameters"):
        create(folders, tmp_path / "out", ws.bundle.open(tmp_path / "lossless").kind, basis=2)  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


def test_targets_are_kept_and_inputs_never_touched(folders, tmp_path):
    before = [content(folder) for folder in folders]
    create(folders, tmp_path / "out")
    with pytest.raises(OutputError, match="exists already"):
        create(folders, tmp_path / "out")
    with pytest.raises(OutputError, match="a bundle is a folder"):
        create(folders, tmp_path / "out.safetensors")
    with pytest.raises(OutputError, match="an input"):
        create(folders, folders[1], overwrite=True)
    with pytest.raises(OutputError, match="an input"):
        ws.save(ws.open(tmp_path / "out", task="one"), tmp_path / "out", overwrite=True)
    assert create(folders, tmp_path / "out", "tall", overwrite=True).kind.name == "tall"
    assert [content(folder) for folder in folders] == before


def test_a_task_is_a_model_wherever_one_is_named(folders, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    create(folders, tmp_path / "out")
    merged = ws.merge("linear", ["out#one", "out#two"], weight=[0.25, 0.75])
    for name in ("one", "two"):
        ws.save(ws.open(f"out#{name}"), tmp_path / f"opened-{name}")
    same = ws.merge("linear", [tmp_path / "opened-one", tmp_path / "opened-two"], weight=[0.25, 0.75])
    merged.save(tmp_path / "m")
    same.save(tmp_path / "s")
    one, other = read_safetensors(tmp_path / "m"), read_safetensors(tmp_path / "s")
    assert all(np.array_equal(one[name], other[name]) for name in one)
    assert "out#one" in merged.to_yaml()
    assert ws.reproduce(tmp_path / "m").ok
    assert isinstance(merged, LazyCheckpoint)
    with pytest.raises(CheckpointError, match="out is a bundle of several models: name one of them, as out#TASK"):
        ws.open("out")
    with pytest.raises(CheckpointError, match=r"has no task 'on' \(did you mean 'one'\?\); it has one, two, three"):
        ws.open("out#on")
    with pytest.raises(CheckpointError, match="one is no bundle: it has no weightsmith-bundle.json"):
        ws.open("one#one")
    for wrong in (("out#one", "one"), ("out", None)):
        with pytest.raises(CheckpointError, match="name a bundle and one of its tasks, once"):
            ws.open(wrong[0], task=wrong[1], base="base")


def test_a_bundle_behind_a_url_is_read_by_ranges(folders, tmp_path):
    fsspec = pytest.importorskip("fsspec")
    (folders[1] / "tokenizer.json").write_text('{"a": 1}')
    create(folders, tmp_path / "out")
    system = fsspec.filesystem("memory")
    system.put(str(tmp_path / "out"), "/bundles/out", recursive=True)
    try:
        found = ws.open("memory://bundles/out#one")
        for name, tensor in ws.open(tmp_path / "out", task="one").items():
            assert np.array_equal(found[name].numpy(), tensor.numpy())
        assert found.config == ws.open(folders[1]).config
        assert found.companions.files["tokenizer.json"].read_text() == '{"a": 1}'
        assert ws.bundle.open("memory://bundles/out").to_json() == ws.bundle.open(tmp_path / "out").to_json()
    finally:
        system.rm("/bundles", recursive=True)


# -- whole, or not there --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", list(kinds()))
def test_a_bundle_is_verified_and_made_again_from_its_manifest(folders, tmp_path, kind):
    create(folders, tmp_path / "out", kind, shard_size=900)
    assert ws.verify(tmp_path / "out").ok
    assert ws.reproduce(tmp_path / "out").ok
    rng = random.Random(5)
    for file in sorted((tmp_path / "out").rglob("*")):
        if file.is_file():
            plain = file.read_bytes()
            place = rng.randrange(len(plain))
            file.write_bytes(plain[:place] + bytes([plain[place] ^ 1 << rng.randrange(8)]) + plain[place + 1 :])
            try:
                problems = ws.verify(tmp_path / "out").problems
            except CheckpointError as error:
                problems = (str(error),)  # type: ignore[assignment]
            assert problems, (file, place)
            file.write_bytes(plain)
    assert ws.verify(tmp_path / "out").ok


def test_sizes_are_those_of_the_files(folders, tmp_path):
    (folders[2] / "tokenizer.json").write_text("{}")
    bundle = create(folders, tmp_path / "out")
    files = content(tmp_path / "out")
    sizes = bundle.sizes()
    assert sizes.total == sum(map(len, files.values()))
    assert sizes.shared == len(files["shared/model.safetensors"])
    assert sizes.tasks["two"] == len(files["tasks/two/model.safetensors"])
    weights = sum(v.nbytes for v in llama_tensors(0).values())
    assert sizes.models == 3 * weights
    assert sizes.ratio == sizes.total / sizes.models
    # A bit for 32, and one number.
    mask = sum(-(-v.size // 8) for v in llama_tensors(0).values())
    assert sum(v.nbytes for v in read_safetensors(tmp_path / "out" / "tasks" / "two").values()) == mask + 4


@pytest.mark.parametrize("kind", ["emr", "rmm", "lossless"])
def test_whatever_call_fails_or_is_the_last_the_same_command_ends_it(folders, tmp_path, kind):
    """A sample of tests/engine/test_faults.py's faults: the machinery is the same, the files beside are not."""
    (folders[2] / "tokenizer.json").write_text("{}")
    work = tmp_path / "work"
    done = faults.run(lambda: create(folders, tmp_path / "new", kind, threads=1, shard_size=1500), tmp_path / "none")
    assert done.code == 0, done.text
    new = content(tmp_path / "new")

    def prepare() -> None:
        shutil.rmtree(work, ignore_errors=True)
        shutil.rmtree(tmp_path / "graveyard", ignore_errors=True)
        work.mkdir()

    def make() -> None:
        create(folders, work / "new", kind, threads=1, shard_size=1500)

    prepare()
    undisturbed = faults.run(make, work)
    assert (undisturbed.code, content(work / "new")) == (0, new)
    rng = random.Random(1)
    count = len(undisturbed.calls)
    for kind_of_fault in ("raise", "stays", "half", "before", "after", "half-kill", "power"):
        for at in sorted(rng.sample(range(1, count + 1), 6)):
            prepare()
            if kind_of_fault in ("raise", "stays", "half"):
                number = rng.choice((errno.EIO, errno.ENOSPC, errno.EACCES))
                way = "half" if kind_of_fault == "half" else "raise"
                fault = Fault(at, way, number, kind_of_fault == "stays")  # type: ignore[arg-type]
            else:
                fault = Fault(at, kind_of_fault, seed=at)  # type: ignore[arg-type]
            first = faults.run(make, work, fault, tmp_path / "base")
            told = f"{fault} ({undisturbed.calls[at - 1]}): {first}"
            assert first.code in (0, REFUSED, KILLED), told
            assert first.code != CRASHED, told
            whole = (work / "new").exists()
            assert not whole or content(work / "new") == new, told
            again = faults.run(make, work)
            assert again.code == 0 or (whole and "exists already" in again.text), (told, again)
            assert content(work / "new") == new, told
            assert [path.name for path in work.iterdir()] == ["new"], told


def test_what_a_stopped_run_finished_is_not_computed_again(folders, tmp_path, monkeypatch):
    from weightsmith.bundle.masks import Emr
    from weightsmith.errors import Interrupted

    class Stop:
        def __init__(self, after: int) -> None:
            self.left = after

        def start(self, *_: int) -> None: ...
        def advance(self, nbytes: int) -> None: ...
        def finish(self) -> None: ...
        def tensor_done(self, name: str) -> None:
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt

    expected = content(create(folders, tmp_path / "whole", threads=1) and tmp_path / "whole")
    with pytest.raises(Interrupted):
        create(folders, tmp_path / "out", threads=1, progress=Stop(20))
    assert not (tmp_path / "out").exists()
    made: list[str] = []
    plain = Emr._tile
    monkeypatch.setattr(Emr, "_tile", lambda self, group, *rest: made.append(group.name) or plain(self, group, *rest))
    # The rescalers need the sums of all, so each is computed once more, and none twice.
    done = ws.bundle.create(tmp_path / "out", folders[1:], base=folders[0], kind="emr", threads=1)
    assert done.summary.resumed == 20
    assert sorted(made) == sorted(llama_tensors(0))
    assert content(tmp_path / "out") == expected
