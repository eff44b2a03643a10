"""What a recipe may say: mergekit's keys, and ours. Every other key is an error."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from weightsmith.architecture.vocabulary import MOST_PADDING

Scalar: TypeAlias = bool | int | float | str

DTYPES = ("float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2")
DTypeName = Literal["float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"]


def _reference(value: Any) -> Any:
    """Turn mergekit's object form of a model reference into the text ``path@revision+lora@revision``."""
    if not isinstance(value, dict):
        return value
    unknown = set(value) - {"model", "lora", "override_architecture", "path", "revision"}
    if unknown:
        raise ValueError(f"a model reference has no key {sorted(unknown)[0]!r}")
    if value.get("override_architecture") is not None:
        raise ValueError("override_architecture has no meaning here: tensors are understood by their names")
    if "path" in value:
        revision = value.get("revision")
        return f"{value['path']}@{revision}" if revision else str(value["path"])
    text = _reference(value.get("model"))
    lora = value.get("lora")
    return f"{text}+{_reference(lora)}" if lora else text


Reference = Annotated[str, BeforeValidator(_reference), Field(min_length=1)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=False, populate_by_name=True)


class Scope(_Part):
    """Which tensors a condition is for; all that is given must hold."""

    layers: tuple[int, int] | None = Field(
        None, description="First layer and the one after the last, counted from 0 in the output."
    )
    names: str | tuple[str, ...] | None = Field(
        None, description="A pattern of the tensor's whole name, with * and ?, or a list of them."
    )
    regex: str | None = Field(None, description="A regular expression searched for in the tensor's name.")
    modules: str | tuple[str, ...] | None = Field(None, description="A module's name, or a list of them.")

    @field_validator("regex")
    @classmethod
    def _compiles(cls, value: str | None) -> str | None:
        import re

        if value is not None:
            try:
                re.compile(value)
            except re.error as error:
                raise ValueError(f"{value!r} is not a regular expression: {error}") from error
        return value


class Selection(_Part):
    """Those tensors that a filter and a scope let through."""

    filter: str | None = Field(
        None, description="A text that the tensor's name must contain; '*' or nothing for all tensors."
    )
    scope: Scope | None = Field(None, description="Further conditions on layer, name or module.")


class Condition(Selection):
    """A value for those tensors that a filter and a scope let through."""

    value: Scalar | tuple[Scalar, ...] = Field(
        description="The value, or a list of values that is spread over the layers."
    )


Setting: TypeAlias = Scalar | Condition | tuple[Scalar | Condition, ...]
# An empty 'parameters:' is YAML's null.
Settings: TypeAlias = Annotated[dict[str, Setting], BeforeValidator(lambda value: {} if value is None else value)]


_FISHER = (
    "A checkpoint that holds the importance (diagonal Fisher information) of each of the model's weights, under the "
    "weight's name and in its shape; for methods that take one."
)


class ModelInput(_Part):
    """A model that takes part in a merge."""

    model: Reference = Field(description="A folder, file, hub id, URL or step, with @revision and +adapter.")
    prefix: str | None = Field(
        None, description="Inside modules: what the names of the module's tensors begin with in this model."
    )
    parameters: Settings = Field(default_factory=dict, description="Parameters of the method for this model.")
    fisher: Reference | None = Field(None, description=_FISHER)


class Source(_Part):
    """Some layers of a model."""

    model: Reference = Field(description="A folder, file, hub id, URL or step, with @revision and +adapter.")
    layer_range: tuple[int, int] = Field(description="First layer and the one after the last, from 0.")
    parameters: Settings = Field(default_factory=dict, description="Parameters of the method for this model.")
    fisher: Reference | None = Field(None, description=_FISHER)


class Slice(_Part):
    """Some layers of the output, merged from equally many layers of each source."""

    sources: tuple[Source, ...] = Field(min_length=1, description="The layers that are merged.")
    base_model: Reference | None = Field(None, description="The base of this slice, if it has its own.")
    base_fisher: Reference | None = Field(None, description="The importances of that base's weights.")
    parameters: Settings = Field(default_factory=dict, description="Parameters for this slice.")

    @model_validator(mode="before")
    @classmethod
    def _refuse_dead_key(cls, value: Any) -> Any:
        if isinstance(value, dict) and "residual_weight" in value:
            raise ValueError("residual_weight has never had an effect in mergekit; remove it")
        return value

    @model_validator(mode="after")
    def _has_whose_fisher(self) -> Slice:
        if self.base_fisher is not None and self.base_model is None:
            raise ValueError("base_fisher is for the slice's own base_model; of the merge's base give it at the merge")
        return self


class Module(_Part):
    """One tower or other part of a model, merged by itself."""

    prefix: str | None = Field(
        None, description="What the names of its tensors begin with; by default found by the module's name."
    )
    models: tuple[ModelInput, ...] | None = Field(None, description="The models that are merged.")
    slices: tuple[Slice, ...] | None = Field(None, description="Or the layers it is put together from.")
    parameters: Settings = Field(default_factory=dict, description="Parameters for this module.")

    @model_validator(mode="after")
    def _one_form(self) -> Module:
        if (self.models is None) == (self.slices is None):
            raise ValueError("give either models or slices")
        return self


class RuleModel(_Part):
    """One of the merge's models, to take part in what a rule decides."""

    model: Reference = Field(description="The model, by the text by which the merge names it.")
    parameters: Settings = Field(default_factory=dict, description="Parameters of the rule's method for this model.")


class ScopeRule(Selection):
    """Another method, or other models or parameters, for those tensors that a filter and a scope let through."""

    merge_method: str | None = Field(None, description="The method; by default the merge's own.")
    models: tuple[RuleModel, ...] | None = Field(
        None, min_length=1, description="Those of the merge's models (or its base) that take part; by default all do."
    )
    parameters: Settings = Field(
        default_factory=dict, description="Parameters of the rule's method; what is not given here the merge gives."
    )

    @model_validator(mode="after")
    def _decides(self) -> ScopeRule:
        if self.filter is None and self.scope is None:
            raise ValueError("say with filter or scope which tensors the rule is for; merge_method takes the rest")
        if self.merge_method is None and self.models is None and not self.parameters:
            raise ValueError("the rule changes nothing: give merge_method, models or parameters")
        return self


class TokenSource(_Part):
    """Where the embedding of a token comes from."""

    kind: Literal["model_token", "zero"] = Field(description="Another token's embedding, or zeros.")
    model: Reference | None = Field(None, description="The model of the other token.")
    token: str | None = Field(None, description="The other token's text.")
    token_id: int | None = Field(None, ge=0, description="The other token's number.")

    @model_validator(mode="after")
    def _names_a_token(self) -> TokenSource:
        given = [self.model, self.token, self.token_id]
        if self.kind == "zero" and any(one is not None for one in given):
            raise ValueError("kind: zero takes no model and no token")
        if self.kind == "model_token" and (self.model is None or (self.token is None) == (self.token_id is None)):
            raise ValueError("kind: model_token needs model, and either token or token_id")
        return self


_Token = Annotated[str, Field(min_length=1)]


class TokenRule(_Part):
    """What to do with one token."""

    source: TokenSource | Reference | None = Field(
        None, description="Where models that lack the token take its embedding from: a model, another token, or zeros."
    )
    force: bool = Field(False, description="Whether models that have the token take it from there too.")


class Tokenizer(_Part):
    """The output's tokenizer."""

    source: Reference = Field(
        "union", description="base, a model's reference, or union: the base's tokenizer with the tokens of all models."
    )
    tokens: Annotated[dict[_Token, TokenRule], BeforeValidator(lambda value: {} if value is None else value)] = Field(
        default_factory=dict, description="Rules for single tokens, as the tokenizer spells them; new ones are added."
    )
    pad_to_multiple_of: int | None = Field(
        None, ge=1, le=MOST_PADDING, description="Round the number of rows up to a multiple of this."
    )


class Merge(_Part):
    """One merge: a method, its models and its parameters."""

    merge_method: str = Field(description="The method's name; 'weightsmith methods' lists them.")
    name: str | None = Field(None, description="The name by which other documents of the file refer to it.")
    base_model: Reference | None = Field(
        None, description="The base of task vectors; config, tokenizer and carried tensors come from it."
    )
    base_fisher: Reference | None = Field(None, description="The same as a model's fisher, for the base.")
    models: tuple[ModelInput, ...] | None = Field(None, description="The models that are merged, whole.")
    slices: tuple[Slice, ...] | None = Field(None, description="Or the layers it is put together from.")
    modules: dict[str, Module] | None = Field(None, description="Or its towers, each merged by itself.")
    parameters: Settings = Field(default_factory=dict, description="Parameters of the method.")
    rules: tuple[ScopeRule, ...] = Field(
        (), description="For some tensors another method; the first rule that holds decides, merge_method the rest."
    )
    dtype: DTypeName | None = Field(
        None, description="The output's dtype; by default that of the inputs, tensor by tensor."
    )
    out_dtype: DTypeName | None = Field(None, description="The output's dtype, where dtype is given too.")
    tokenizer_source: Reference | None = Field(
        None,
        description="Whose tokenizer the output takes: base, a model's reference, or union. All models' embeddings "
        "are brought to its tokens first.",
    )
    tokenizer: Tokenizer | None = Field(None, description="The same with rules for single tokens.")
    chat_template: str | None = Field(
        None, description="auto, alpaca, chatml, llama3, mistral, exaone, or the text of a Jinja template."
    )
    on_missing: Literal["error", "base", "first", "skip"] = Field(
        "error", description="What to do with a tensor that some of the models lack."
    )
    on_shape_mismatch: Literal["error", "base", "first", "pad", "crop"] = Field(
        "error",
        description="What to do with a tensor whose shape differs between the models: take one model's; or, where it "
        "differs in the number of rows alone, complete the shorter with rows of zeros, or cut all to the shortest.",
    )
    compat: Literal["mergekit"] | None = Field(
        None, description="Restore that tool's numbers where it departs from the published method."
    )
    seed: int = Field(0, ge=0, description="The seed of random methods.")

    @model_validator(mode="after")
    def _one_form(self) -> Merge:
        if sum(form is not None for form in (self.models, self.slices, self.modules)) != 1:
            raise ValueError("give exactly one of models, slices and modules")
        if self.models == () or self.slices == () or self.modules == {}:
            raise ValueError("name at least one model")
        if self.tokenizer is not None and self.tokenizer_source is not None:
            raise ValueError("give either tokenizer or tokenizer_source")
        if self.base_fisher is not None and self.base_model is None:
            raise ValueError("base_fisher needs the base_model whose weights it is about")
        return self

    @property
    def asked_tokenizer(self) -> Tokenizer | None:
        """What ``tokenizer``, or ``tokenizer_source`` in its place, asks for; None where neither is given."""
        if self.tokenizer is None and self.tokenizer_source is not None:
            return Tokenizer.model_validate({"source": self.tokenizer_source})
        return self.tokenizer


class Recipe(Merge):
    """A recipe: a merge, and the steps whose results it may name as models."""

    steps: dict[str, Merge] = Field(
        default_factory=dict,
        description="Merges whose results other steps and this merge refer to by name; nothing of them is written.",
    )
