"""What a server remembers between rounds: a folder with one small file, and the clients' stored updates.

``state.json`` names the rule, the round and, for each client of the population, its record of participation and the
file of its stored update. It is replaced whole: a state is of one round or of the next, never of both. The next one is
written first as ``next.json``, with what tells that the round's model is published; who opens the folder after a crash
finds out from it whether that round took place. Stored updates are files named by client and round, and are removed
only after no state names them any more.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from weightsmith.checkpoint.checkpoint import Identity
from weightsmith.checkpoint.json_text import parse_object
from weightsmith.checkpoint.manifest import manifest_of
from weightsmith.checkpoint.staging import make_folder, sync_folder
from weightsmith.checkpoint.storage import read_whole
from weightsmith.errors import CheckpointError, OutputError, RecipeError, WeightsmithError, shown
from weightsmith.federated.coefficients import Participation

FORMAT = 1
_STATE, _NEXT, _LOCK = "state.json", "next.json", "lock"
_UPDATE = re.compile(r"\d{6}-\d{1,9}\.safetensors")
# What a run that was killed while it wrote an update left.
_UNFINISHED = re.compile(r"\.\d{6}-\d{1,9}\.safetensors\.weightsmith")
# A record of a client takes some hundred bytes: more than any population that one server has.
_LARGEST = 64_000_000
_COUNT = 2**53


@dataclass(frozen=True)
class Client:
    """What is remembered of one client.

    Attributes:
        participation: when it took part.
        update: the file of its stored update, in the state's folder; None where it has none.
    """

    participation: Participation = field(default_factory=Participation)
    update: str | None = None


@dataclass(frozen=True)
class State:
    """What a server remembers.

    Attributes:
        folder: where it is kept.
        rule: the rule that it belongs to.
        round: how many rounds are in it.
        clients: every client of the population by name.
    """

    folder: Path
    rule: str
    round: int
    clients: Mapping[str, Client]

    def file_of(self, place: int) -> str:
        """Return the name of the file for an update of the coming round, of the client at a place."""
        # Not the client's name, which may be none for a file.
        return f"{place:06d}-{self.round + 1}.safetensors"

    def path_of(self, update: str) -> str:
        """Return the path of a stored update."""
        return str(self.folder / update)

    def after(self, clients: Mapping[str, Client]) -> State:
        """Return the state of the next round."""
        return State(self.folder, self.rule, self.round + 1, clients)

    def to_json(self) -> dict[str, Any]:
        """Return what is written of it."""
        return {
            "format": FORMAT,
            "rule": self.rule,
            "round": self.round,
            "clients": {
                name: {**asdict(client.participation), "update": client.update} for name, client in self.clients.items()
            },
        }


def open_state(folder: str | os.PathLike[str], rule: str, population: Sequence[str] | None) -> State:
    """Open a server's state, or begin one; nothing is written.

    Args:
        folder: where it is kept.
        rule: the rule that asks for it.
        population: the names of all clients; may be left out where the state knows them.

    Raises:
        CheckpointError: if what is there is no state, or not whole.
        RecipeError: if it is another rule's or population's, or there is none yet and no population is given.
        OutputError: if a round that was killed as it ended cannot be ended, or another process is at it.
    """
    path = Path(os.path.abspath(folder))
    names = None if population is None else list(population)
    if names is not None and (not names or len(set(names)) < len(names)):
        raise RecipeError("the population must name at least one client, and each once")
    if path.exists() and not path.is_dir():
        raise CheckpointError(f"{path} is a file; a server's state is kept in a folder")
    if (path / _NEXT).exists():
        try:
            with _locked(path):
                _settle(path)
        except OSError as error:
            raise OutputError(f"cannot end the round that {path / _NEXT} tells of: {error.strerror}") from error
    if not (path / _STATE).exists():
        if names is None:
            raise RecipeError(f"there is no state in {path} yet: give population, the names of all clients")
        return State(path, rule, 0, dict.fromkeys(names, Client()))
    found = _read(path)
    if found.rule != rule:
        raise RecipeError(f"the state in {path} is of {found.rule}, not of {rule}; give each rule a folder of its own")
    if names is not None and set(names) != set(found.clients):
        odd = sorted(set(names) ^ set(found.clients))[0]
        where = "not in the state" if odd in names else "in the state alone"
        raise RecipeError(
            f"the population is not that of the state in {path}: {odd!r} is {where}; leave population out, or begin a "
            "state in another folder"
        )
    return found


@contextmanager
def replacing(state: State, successor: State, target: Path, token: str) -> Iterator[None]:
    """Replace a state by its successor if what is done meanwhile succeeds.

    Args:
        state: the state that the round began from.
        successor: the next one. Its updates are written before, or in the ``with`` block.
        target: the output whose publication makes the round happen.
        token: what :func:`token_of` says of that output.

    Raises:
        OutputError: if the state has moved on, another process is replacing it, or the folder cannot be written.
    """
    folder = state.folder
    try:
        make_folder(folder)
        with _locked(folder):
            _check_unmoved(state)
            document = {**successor.to_json(), "target": str(target), "token": token}
            _write(folder / _NEXT, document)
            try:
                yield
            except BaseException:
                # Unless it was published after all: then the note is needed.
                _settle(folder)
                raise
            os.replace(folder / _NEXT, folder / _STATE)
            sync_folder(folder)
            _clear(folder, successor)
    except OSError as error:
        raise OutputError(f"cannot write the state in {folder}: {error.strerror}") from error


def token_of(recipe: str, inputs: Sequence[Identity]) -> str:
    """Return what tells an output from any other: a hash of its recipe and of the files that it was made from."""
    content = json.dumps([recipe, [asdict(identity) for identity in inputs]]).encode()
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def _settle(folder: Path) -> None:
    """Take the step that ``next.json`` tells of, if its output is published; forget it otherwise."""
    note = folder / _NEXT
    if not note.exists():
        return
    successor, document = _parsed(note)
    try:
        manifest = manifest_of(Path(str(document.get("target"))))
        published = token_of(manifest.recipe, manifest.inputs) == document.get("token")
    except (WeightsmithError, OSError):
        published = False
    if published:
        os.replace(note, folder / _STATE)
    else:
        note.unlink()
    sync_folder(folder)
    current = successor if published else (_read(folder) if (folder / _STATE).exists() else None)
    _clear(folder, current)


def _clear(folder: Path, state: State | None) -> None:
    """Remove the updates that no state names; what cannot be removed is left to the next round."""
    kept = {client.update for client in state.clients.values()} if state else set()
    with suppress(OSError):
        for name in os.listdir(folder):
            if _UPDATE.fullmatch(name) and name not in kept:
                (folder / name).unlink()
            elif _UNFINISHED.fullmatch(name):
                shutil.rmtree(folder / name)


def _check_unmoved(state: State) -> None:
    """Check that a folder still holds the state that a round began from."""
    if (state.folder / _NEXT).exists():
        _settle(state.folder)
    now = _read(state.folder).to_json() if (state.folder / _STATE).exists() else None
    if now != (state.to_json() if state.round else None):
        raise OutputError(
            f"the state in {state.folder} has moved on since this round was prepared (it was at round {state.round}); "
            "prepare the round again"
        )


def _read(folder: Path) -> State:
    return _parsed(folder / _STATE)[0]


def _parsed(file: Path) -> tuple[State, dict[str, Any]]:
    """Read a state, checked completely."""
    document = parse_object(read_whole(str(file), _LARGEST), str(file))

    def expect(fits: bool, what: str, value: Any) -> None:
        if not fits:
            raise CheckpointError(f"{file}: {what} is {shown(value)}, which no state of a server has")

    expect(document.get("format") == FORMAT, "format", document.get("format"))
    rule, number, entries = (document.get(key) for key in ("rule", "round", "clients"))
    expect(isinstance(rule, str), "rule", rule)
    expect(_is_count(number), "round", number)
    expect(isinstance(entries, dict) and bool(entries), "clients", entries)
    clients: dict[str, Client] = {}
    for name, entry in (entries or {}).items():
        expect(isinstance(entry, dict), f"client {shown(name)}", entry)
        counts = [entry.get(key) for key in ("intervals", "total", "absent")]
        expect(all(map(_is_count, counts)) and (counts[0] <= counts[1]), f"participation of {shown(name)}", counts)
        update = entry.get("update")
        expect(update is None or (isinstance(update, str) and bool(_UPDATE.fullmatch(update))), "update", update)
        clients[name] = Client(Participation(*counts), update)
    return State(file.parent, str(rule), int(number or 0), clients), document


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _COUNT


def _write(path: Path, document: Mapping[str, Any]) -> None:
    """Write a file that is there whole, or not."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    with draft.open("w", encoding="utf-8") as file:
        json.dump(document, file, indent=1, ensure_ascii=True)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(draft, path)
    sync_folder(path.parent)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    handle = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise OutputError(f"another process is replacing the state in {folder} now; wait for it") from error
        yield
    finally:
        os.close(handle)
