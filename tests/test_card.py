"""The model card: front matter that hubs read, safe with hostile names."""

from __future__ import annotations

import yaml

from weightsmith.card import model_card
from weightsmith.methods.registry import get_method


def card(recipe="merge_method: x\n", models=("org/one", "./local", "org/two"), **more):
    settings = {"methods": [get_method("ties")], "base": "org/one", "config": {"architectures": ["L"]}, **more}
    return model_card(recipe, models=models, **settings)


def front(text):
    return yaml.safe_load(text.split("---\n")[1])


def test_front_matter_names_hub_models_alone():
    found = front(card())
    assert found["base_model"] == ["org/one", "org/two"]
    assert found["library_name"] == "transformers"
    assert found["tags"] == ["weightsmith", "merge"]
    assert "base_model" not in front(card(models=["/somewhere/a"]))


def test_hostile_names_and_recipes_stay_text():
    name = "org/x\n---\nlicense: evil\n`rm`"
    text = card(recipe=f"a: |\n  ```\n  {name!r}\n", models=[name])
    assert set(front(text)) == {"tags", "library_name"}
    assert "````yaml" in text


def test_adapters_and_the_models_of_steps_are_named_too():
    step = "{models: [{model: org/three}], base_model: org/four@main}"
    text = card(f"steps: {{first: {step}}}\nmodels: [{{model: first}}]\n", models=["first", "org/one+org/lora"])
    assert sorted(front(text)["base_model"]) == ["org/four", "org/lora", "org/one", "org/three"]


def test_a_name_that_is_no_reference_is_text_alone():
    text = card(models=["a@b@c/d"])
    assert "base_model" not in front(text)
    assert "- `a@b@c/d`" in text
