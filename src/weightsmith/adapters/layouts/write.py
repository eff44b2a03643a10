"""A :class:`Network` said in one of the layouts: the names of its tensors, and what stands beside them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from weightsmith.adapters.layouts import fusing, naming
from weightsmith.adapters.layouts import network as n
from weightsmith.adapters.layouts import parts as p
from weightsmith.adapters.layouts.config import to_config
from weightsmith.adapters.layouts.named import RANKS_KEY, full_name, in_diffusers_names, tower_for
from weightsmith.adapters.layouts.network import Entry, Network
from weightsmith.adapters.layouts.read import DIFFUSERS_KEY
from weightsmith.adapters.layouts.tensors import Renamed, number, transposed
from weightsmith.adapters.layouts.towers import Tower
from weightsmith.adapters.peft_config import PREFIX
from weightsmith.checkpoint.layout import Part
from weightsmith.checkpoint.tensor import Tensor
from weightsmith.errors import CheckpointError, PlanError

_TEXT = "text_encoder"
_WRAPPER = "text_model."
# What diffusers needs to know of a config, and writes into the header itself.
_IN_HEADER = (
    *("r", "lora_alpha", "alpha", "rank_pattern", "alpha_pattern", "target_modules", "use_dora", "use_rslora", "bias"),
    *("lora_bias", "decompose_both", "decompose_factor", "use_effective_conv2d"),
)
_CLASSES = {"Flux": "flux", "SD3": "sd3"}


@dataclass
class Written:
    """An adapter in a layout, before it is written.

    Attributes:
        tensors: name -> tensor.
        parts: the files of tensors.
        metadata: texts for the header of every file of tensors.
        files: relative path -> content of each file beside them.
        notes: what a person should know.
        one_file: whether a single file of tensors holds all there is to say.
    """

    tensors: dict[str, Tensor]
    parts: Sequence[Part]
    metadata: dict[str, str] = field(default_factory=dict)
    files: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    one_file: bool = True

    def add(self, name: str, tensor: Tensor, origin: str) -> None:
        """Add a tensor.

        Raises:
            CheckpointError: if there is one of that name.
        """
        if name in self.tensors:
            raise CheckpointError(f"two modules, one of them {origin}, would both be named {name}")
        self.tensors[name] = Renamed(tensor, name)


Writer = Callable[[Network, Sequence[Tower]], Written]


def write_peft(network: Network, towers: Sequence[Tower]) -> Written:
    """Return PEFT's layout: a folder with a config; for several models of a pipeline one folder for each."""
    components = network.components
    several = len(components) > 1
    names = dict(zip(map(id, network.entries), (entry.module for entry in network.entries), strict=True))
    written = Written({}, [Part(f"{one}/" if several else "", "adapter_model") for one in components], one_file=False)
    for component in components:
        entries = [entry for entry in network.entries if entry.component == component]
        tower = tower_for(component, towers)
        own = Network(network.name, entries, {}, network.hints)
        own.plain = {key: tensor for key, tensor in network.plain.items() if key[0] == component}
        config = to_config(own, entries, names, tower.weights if tower is not None else ())
        changed = {entry.module for entry in entries}
        biases = {name for _, name in own.plain if name.removesuffix(".bias") in changed}
        plain = {name: tensor for (_, name), tensor in own.plain.items() if name not in biases}
        modules = sorted({name.rpartition(".")[0] for name in plain})
        if modules:
            config["modules_to_save"] = modules
            plain |= _rest_of(modules, plain, tower)
        if biases:
            config["bias"] = "lora_only"
            plain |= {f"{name.removesuffix('.bias')}.base_layer.bias": own.plain[component, name] for name in biases}
        place = f"{component}/" if several else ""
        written.files[f"{place}adapter_config.json"] = config
        for entry in entries:
            for part, tensor in entry.parts.items():
                written.add(f"{place}{PREFIX}{entry.module}.{part}", tensor, entry.origin)
        for name, tensor in plain.items():
            written.add(f"{place}{PREFIX}{name}", tensor, name)
    return written


def _rest_of(modules: Sequence[str], plain: Mapping[str, Tensor], tower: Tower | None) -> dict[str, Tensor]:
    """Return the base's tensors that modules have beside those replaced: PEFT replaces modules, never parts of them."""
    if tower is None:
        return {}
    pairs = [(f"{module}.weight", tower.weights.get(module)) for module in modules]
    pairs += [(f"{module}.bias", tower.biases.get(module)) for module in modules]
    return {name: tensor for name, tensor in pairs if tensor is not None and name not in plain}


def write_kohya(network: Network, towers: Sequence[Tower]) -> Written:
    """Return kohya's layout, with LyCORIS': one file, names with underscores, an alpha for each module."""
    kind = network.kind
    if kind not in n.ALPHA_KEYS:
        raise CheckpointError(
            f"{network.name} is of the kind {kind}; the kohya layout is written for LORA, LOHA and LOKR"
        )
    _refuse_plain(network, "kohya")
    entries, ranks = _fused(_with_components(in_diffusers_names(network, towers), "kohya"), towers)
    prefixes = _kohya_prefixes(entries)
    written = Written({}, [Part("", "pytorch_lora_weights")])
    alphas: dict[str, float] = {}
    held: dict[str, float] = {}
    for entry in entries:
        stem = f"{prefixes[entry.component]}_{_wrapped(entry).replace('.', '_')}"
        for part, tensor in entry.parts.items():
            if part == p.MAGNITUDE:
                rows = tensor.size
                axes = len(entry.parts["lora_A.weight"].shape)
                written.add(f"{stem}.dora_scale", Renamed(tensor, shape=(rows,) + (1,) * (axes - 1)), entry.module)
            elif part.startswith(("hada_", "lokr_")):
                written.add(f"{stem}.{part}", tensor, entry.module)
            elif part in ("lora_A.weight", "lora_B.weight"):
                written.add(f"{stem}.lora_{'down' if part[5] == 'A' else 'up'}.weight", tensor, entry.module)
            else:
                raise CheckpointError(f"{network.name}: {entry.module} has {part}, which the kohya layout cannot say")
        rank = entry.rank
        alpha = (entry.alpha if entry.alpha is not None else float(rank)) if rank else 1.0
        written.add(f"{stem}.alpha", number(f"{stem}.alpha", alpha), entry.module)
        alphas[stem], held[stem] = alpha, rank or 1
    dora = any(p.MAGNITUDE in entry.parts for entry in entries)
    written.metadata = _kohya_metadata(kind, held, alphas, dora=dora)
    named = {f"{prefixes[c]}_{name.replace('.', '_')}": own for (c, name), own in ranks.items()}
    if named:
        written.metadata[RANKS_KEY] = json.dumps(named, separators=(",", ":"))
    if dora:
        written.notes += ("it holds DoRA's magnitudes, which LyCORIS and ComfyUI read, and diffusers leaves out",)
    if len(set(alphas.values())) > 1 and any(entry.component == "unet" for entry in entries):
        written.notes += (
            "its modules have different alphas, which diffusers (0.42) takes wrongly from this layout for attention's "
            "projections; from its own it takes them as they are",
        )
    return written


def _kohya_metadata(
    kind: str, ranks: Mapping[str, float], alphas: Mapping[str, float], *, dora: bool
) -> dict[str, str]:
    """Return what kohya's trainers write in the header of the settings, which other programs show."""
    same = len(set(ranks.values())) == 1
    plain = kind == "LORA" and not dora
    found = {
        "ss_network_module": "networks.lora" if plain else "lycoris.kohya",
        "ss_network_dim": f"{next(iter(ranks.values())):.0f}" if same else "Dynamic",
        "ss_network_alpha": f"{next(iter(alphas.values())):.9g}" if len(set(alphas.values())) == 1 else "Dynamic",
    }
    if not plain:
        algorithm = {"algo": {"LORA": "lora", "LOHA": "loha", "LOKR": "lokr"}[kind], "dora_wd": dora}
        found["ss_network_args"] = json.dumps(algorithm)
    return found


def _kohya_prefixes(entries: Sequence[Entry]) -> dict[str, str]:
    components = {entry.component for entry in entries}
    flux = any(naming.family_of([entry.module]) == "flux" for entry in entries)
    first = "lora_te" if components <= {"unet", _TEXT} else "lora_te1"
    found = {"unet": "lora_unet", "transformer": "lora_unet", _TEXT: first, "text_encoder_3": "lora_te3"}
    found["text_encoder_2"] = "lora_te3" if flux else "lora_te2"
    unknown = components - set(found)
    if unknown:
        raise CheckpointError(f"kohya's layout has no name for {', '.join(sorted(unknown))}")
    return found


def _fused(network: Network, towers: Sequence[Tower]) -> tuple[list[Entry], dict[tuple[str, str], list[int]]]:
    """Return modules of transformers under their publishers' names, and the ranks of those that became one."""
    found: list[Entry] = []
    groups: dict[str, tuple[naming.Rule, dict[int, Entry]]] = {}
    transformers = [entry for entry in network.entries if entry.component == "transformer"]
    tower = tower_for("transformer", towers)
    family = _family(network, transformers, tower) if transformers else None
    for entry in network.entries:
        known = naming.fused_rules(family)(entry.module) if family and entry.component == "transformer" else None
        if known is None:
            if entry.component == "transformer" and naming.original_rules(family or "flux")(entry.module) is None:
                raise CheckpointError(f"{network.name}: kohya's layout has no name for {entry.module} of this model")
            found.append(entry)
        else:
            groups.setdefault(known[1], (known[0], {}))[1][known[2]] = entry
    ranks = {}
    for name, (rule, held) in groups.items():
        fused, own = fusing.fuse(network.name, rule, name, held, _height(rule, held, tower))
        found.append(fused)
        if own:
            ranks["transformer", name] = own
    return found, ranks


def _family(network: Network, entries: Sequence[Entry], tower: Tower | None) -> str:
    known = naming.family_of(entry.module for entry in entries) or (tower.family if tower is not None else None)
    named = network.hints.get("class", "")
    known = known or next((family for start, family in _CLASSES.items() if named.startswith(start)), None)
    if known is not None:
        return known
    module = entries[0].module
    if all(naming.fused_rules(family)(module) is None for family in naming.FAMILIES):
        raise CheckpointError(
            f"{network.name}: kohya's names are known for UNets, Flux and SD3, and {module} is of none"
        )
    raise CheckpointError(
        f"{network.name}: modules such as {module} are in Flux and in Stable Diffusion 3, and kohya's names for them "
        "differ: name the base (--base)"
    )


def _height(rule: naming.Rule, held: Mapping[int, Entry], tower: Tower | None) -> int | None:
    """Return how many rows the base's matrices have together that a rule makes one."""
    if tower is None:
        return None
    block = re.search(r"\.(\d+)\.", next(iter(held.values())).module)
    names = [part.replace("#", block[1] if block else "") for part in rule.parts]
    known = [tower.weights[name] for name in names if name in tower.weights]
    return sum(weight.shape[0] for weight in known) if len(known) == len(names) else None


def write_diffusers(network: Network, towers: Sequence[Tower]) -> Written:
    """Return diffusers' layout: one file, the configs in its header."""
    kind = network.kind
    if kind not in ("LORA", "LOKR"):
        raise CheckpointError(f"{network.name} is of the kind {kind}, and diffusers loads LORA and LOKR alone")
    _refuse_plain(network, "diffusers")
    whole = _with_components(in_diffusers_names(network, towers), "diffusers")
    written = Written({}, [Part("", "pytorch_lora_weights")])
    metadata: dict[str, Any] = {}
    for component in whole.components:
        entries = [entry for entry in whole.entries if entry.component == component]
        # Encoders have lost their wrapper; what ends in the same parts is found with and without it.
        names = {id(entry): entry.module.removeprefix(_WRAPPER) for entry in entries}
        config = to_config(whole, entries, names, ())
        metadata |= {f"{component}.{key}": config[key] for key in _IN_HEADER if key in config}
        for entry in entries:
            stem = f"{component}.{_wrapped(entry)}"
            for part, tensor in entry.parts.items():
                written.add(f"{stem}.{_diffusers_part(component, entry, part)}", tensor, entry.module)
    written.metadata[DIFFUSERS_KEY] = json.dumps(metadata, indent=2, sort_keys=True)
    return written


def _diffusers_part(component: str, entry: Entry, part: str) -> str:
    """Return diffusers' name of a part: those of CLIP's encoders are older than PEFT's, and read by all versions."""
    if component.startswith(_TEXT) and part in ("lora_A.weight", "lora_B.weight") and not naming.is_t5(entry.module):
        linear = "lora" if entry.module.endswith("text_projection") else "lora_linear_layer"
        return f"{linear}.{'down' if part[5] == 'A' else 'up'}.weight"
    return part


def write_mlx(network: Network, towers: Sequence[Tower]) -> Written:
    """Return MLX-LM's layout: a folder; one rank and scale for all modules, which go by the layers of one model."""
    if network.kind != "LORA" or len(network.components) != 1:
        raise CheckpointError(f"{network.name}: MLX' layout holds LoRA on one model")
    _refuse_plain(network, "mlx")
    ranks, scales = ({getattr(entry, key) for entry in network.entries} for key in ("rank", "scale"))
    dora = {p.MAGNITUDE in entry.parts for entry in network.entries}
    for what, values in (("rank", ranks), ("scale", scales), ("kind, with DoRA and without", dora)):
        if len(values) != 1:
            raise CheckpointError(f"{network.name}: MLX' layout has one {what} for all modules, and it has several")
    keys = set()
    written = Written({}, [Part("", "adapters")], one_file=False)
    for entry in network.entries:
        match = re.fullmatch(r".*\blayers\.\d+\.(.+)", entry.module)
        odd = [part for part in entry.parts if part not in ("lora_A.weight", "lora_B.weight", p.MAGNITUDE)]
        if match is None or odd or len(entry.parts["lora_A.weight"].shape) != 2:
            raise CheckpointError(
                f"{network.name}: MLX' layout cannot say {odd[0] if odd else 'LoRA'} of {entry.module}"
            )
        keys.add(match[1])
        written.add(f"{entry.module}.lora_a", transposed(entry.parts["lora_A.weight"]), entry.module)
        written.add(f"{entry.module}.lora_b", transposed(entry.parts["lora_B.weight"]), entry.module)
        if p.MAGNITUDE in entry.parts:
            written.add(f"{entry.module}.m", entry.parts[p.MAGNITUDE], entry.module)
    parameters = {"rank": ranks.pop(), "scale": scales.pop(), "dropout": 0.0, "keys": sorted(keys)}
    kind = "dora" if dora.pop() else "lora"
    written.files["adapter_config.json"] = {"fine_tune_type": kind, "num_layers": -1, "lora_parameters": parameters}
    return written


WRITERS: Mapping[str, Writer] = {
    "peft": write_peft,
    "kohya": write_kohya,
    "diffusers": write_diffusers,
    "mlx": write_mlx,
}


def _refuse_plain(network: Network, layout: str) -> None:
    if network.plain:
        component, name = next(iter(network.plain))
        raise CheckpointError(
            f"{network.name} replaces {full_name(component, name, None)} as a whole (a bias, or modules_to_save), "
            f"which the {layout} layout cannot say: fold it into its base instead"
        )


def _with_components(network: Network, layout: str) -> Network:
    """Return an adapter whose every module says which model of a pipeline it is of."""
    bare = [entry for entry in network.entries if not entry.component]
    told = {naming.component_of(entry.module) for entry in bare} - {""}
    if bare and len(told) != 1:
        raise PlanError(
            f"{network.name} changes {bare[0].module}, and the {layout} layout is for the models of image pipelines, "
            f"of which its names fit {' and '.join(sorted(told)) or 'none'}"
        )
    for entry in bare:
        (entry.component,) = told
    return network


def _wrapped(entry: Entry) -> str:
    """Return a module's name with the wrapper that CLIP's encoders had when the layouts were made."""
    bare = entry.component.startswith(_TEXT) and re.match(
        r"encoder\.layers\.|embeddings\.|final_layer_norm\b", entry.module
    )
    return _WRAPPER + entry.module if bare else entry.module
