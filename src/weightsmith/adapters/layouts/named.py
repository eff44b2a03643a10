"""The names that modules have in a base, or in diffusers where there is none."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from weightsmith.adapters.layouts import fusing, naming
from weightsmith.adapters.layouts.network import Entry, Network
from weightsmith.adapters.layouts.shapes import fitted, prepared, take_changes
from weightsmith.adapters.layouts.towers import Tower
from weightsmith.errors import CheckpointError, PlanError, did_you_mean, shown

RANKS_KEY = "weightsmith_ranks"


def named(network: Network, towers: Sequence[Tower], header: Mapping[str, str]) -> Network:
    """Return an adapter with its parts as PEFT has them, under the base's names or diffusers'."""
    ranks = _ranks(header)
    entries = [prepared(network.name, entry) for entry in network.entries]
    found = []
    families: dict[str, str | None] = {}
    for entry in entries:
        tower = tower_for(entry.component, towers)
        if tower is not None and (own := tower.find(entry.module)) is not None:
            found.append(Entry(entry.component, own, entry.parts, entry.alpha, entry.origin))
            continue
        if entry.component not in families:
            members = [one.module for one in entries if one.component == entry.component]
            families[entry.component] = naming.family_of(members)
        layers = tower.layers if tower is not None else naming.LAYERS_PER_BLOCK
        found += _to_diffusers(network.name, entry, families[entry.component], layers, ranks)
    if towers:
        found = _to_base(network.name, found, towers)
    result = Network(network.name, [], dict(network.plain), network.hints)
    for entry in found:
        tower = tower_for(entry.component, towers)
        member = entry if tower is None else fitted(entry, tower)
        take_changes(result, member, tower)
        if member.parts:
            result.entries.append(member)
    _check_unique(result)
    return result


def _ranks(header: Mapping[str, str]) -> Mapping[str, Any]:
    text = header.get(RANKS_KEY)
    try:
        found = json.loads(text) if text is not None else {}
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _ranks_of(ranks: Mapping[str, Any], origin: str) -> list[int] | None:
    own = ranks.get(origin)
    good = isinstance(own, list) and all(isinstance(one, int) and 0 <= one < 1_000_000 for one in own)
    return own if good else None


def _to_diffusers(owner: str, entry: Entry, family: str | None, layers: int, ranks: Mapping[str, Any]) -> list[Entry]:
    """Return a module under diffusers' name or names, if it is under its publisher's."""
    if entry.component == "unet":
        module = naming.ldm_to_diffusers(entry.module, layers)
        if module is None and naming.is_ldm([entry.module]):
            raise CheckpointError(f"{owner}: {shown(entry.origin)} is no module of a Stable Diffusion UNet")
        entry.module = module or entry.module
        return [entry]
    if family is None:
        return [entry]
    known = naming.original_rules(family)(entry.module)
    if known is None:
        if re.match(r"(?:double|single|joint)_blocks\.", entry.module):
            raise CheckpointError(
                f"{owner}: {shown(entry.origin)} has no equal under diffusers' names of a model's modules"
            )
        return [entry]
    return fusing.split(owner, entry, *known, _ranks_of(ranks, entry.origin))


def _to_base(owner: str, entries: Sequence[Entry], towers: Sequence[Tower]) -> list[Entry]:
    """Return modules under the base's names, several together where the base has one matrix for them."""
    found: list[Entry] = []
    waiting: dict[tuple[str, str], tuple[naming.Rule, dict[int, Entry]]] = {}
    guessed = _only_tower(owner, entries, towers)
    for entry in entries:
        if guessed is not None and not entry.component:
            entry.component = guessed.component
        tower = tower_for(entry.component, towers)
        if tower is None:
            there = ", ".join(tower.component for tower in towers)
            raise PlanError(
                f"{owner} changes {entry.component or 'a model'} ({shown(entry.origin)}), and the base has {there}"
            )
        own = tower.find(entry.module)
        if own is None and not entry.component and not tower.component:
            # Of one model alone: whoever folds it knows the names that wrappers of a model add.
            own = entry.module
        if own is not None:
            found.append(Entry(entry.component, own, entry.parts, entry.alpha, entry.origin))
            continue
        known = naming.fused_rules(tower.family)(entry.module) if tower.family else None
        if known is None or known[1] not in tower.weights:
            raise PlanError(
                f"{owner} changes {shown(entry.origin)}, and the base has no module "
                f"{tower.prefix}{entry.module}{did_you_mean(entry.module, tower.weights)}"
            )
        waiting.setdefault((entry.component, known[1]), (known[0], {}))[1][known[2]] = entry
    for (component, name), (rule, held) in waiting.items():
        tower = tower_for(component, towers)
        weight = tower.weights[name] if tower is not None else None
        height = weight.shape[0] if weight is not None and weight.shape else None
        fused, _ = fusing.fuse(owner, rule, name, held, height)
        found.append(Entry(component, name, fused.parts, fused.alpha, fused.origin))
    return found


def _only_tower(owner: str, entries: Sequence[Entry], towers: Sequence[Tower]) -> Tower | None:
    """Return the one model of a pipeline that has all modules for which no model is named."""
    bare = [entry for entry in entries if not entry.component]
    if not bare or (len(towers) == 1 and not towers[0].component):
        return None
    fitting = [tower for tower in towers if all(tower.find(entry.module) for entry in bare)]
    if len(fitting) == 1:
        return fitting[0]
    which = " and ".join(tower.component for tower in fitting) or "none of them"
    there = ", ".join(tower.component for tower in towers)
    raise PlanError(
        f"{owner} does not say which model of the base it is for; {which} of {there} has all modules that it changes "
        f"(such as {shown(bare[0].module)}): name that model as the base"
    )


def _check_unique(network: Network) -> None:
    seen: dict[tuple[str, str], str] = {}
    for entry in network.entries:
        other = seen.setdefault((entry.component, entry.module), entry.origin)
        if other != entry.origin:
            raise CheckpointError(
                f"{network.name}: {shown(other)} and {shown(entry.origin)} are two names of {entry.module}: leave one "
                "out"
            )


def tower_for(component: str, towers: Sequence[Tower]) -> Tower | None:
    """Return the base's model of a component, or the base itself where it is one model."""
    if len(towers) == 1 and not towers[0].component:
        return towers[0]
    return next((tower for tower in towers if tower.component == component), None)


def in_diffusers_names(network: Network, towers: Sequence[Tower]) -> Network:
    """Return an adapter whose modules go by diffusers' names, whatever those of its base are."""
    found: list[Entry] = []
    for component in network.components:
        entries = [entry for entry in network.entries if entry.component == component]
        tower = tower_for(component, towers)
        layers = tower.layers if tower is not None else naming.LAYERS_PER_BLOCK
        family = naming.family_of(entry.module for entry in entries)
        for entry in entries:
            found += _to_diffusers(network.name, entry, family, layers, {})
    return Network(network.name, found, network.plain, network.hints)


def placed(network: Network, towers: Sequence[Tower]) -> Iterator[tuple[Entry, str]]:
    """Yield every module with the name that it has in the base, or without one, with its component before a slash."""
    for entry in network.entries:
        tower = tower_for(entry.component, towers)
        yield entry, full_name(entry.component, entry.module, tower)


def full_name(component: str, name: str, tower: Tower | None) -> str:
    """Return the base's name of a module or tensor of one of its models."""
    if tower is not None:
        return tower.prefix + name
    return f"{component}/{name}" if component else name
