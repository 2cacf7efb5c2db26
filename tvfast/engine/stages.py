"""Recipes of several stages: what an earlier one will write is known before it is merged."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from types import TracebackType
from typing import Any

from tvfast.checkpoint.layout import Layout
from tvfast.checkpoint.reading import Checkpoint
from tvfast.checkpoint.stored import Stored
from tvfast.engine.binding import Binding
from tvfast.engine.durable import output_error


class Stages:
    """Results of earlier stages as inputs of later ones: first foreseen, then real.

    A context manager; leaving it removes what was written for foreseeing.

    Args:
        out: directory of the last stage's result.
    """

    def __init__(self, out: str) -> None:
        parent, name = os.path.split(os.path.abspath(out))
        self.folder = os.path.join(parent, f".{name}.stages")
        self.foreseen: dict[str, Checkpoint] = {}
        self.identities: dict[str, list[dict[str, Any]]] = {}
        self._leaving = ExitStack()
        self._companions = ""  # a folder, once there is a stage

    def __enter__(self) -> Stages:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._leaving.close()

    def folder_of(self, name: str) -> str:
        """Where the result of a stage goes."""
        number = list(self.foreseen).index(name)
        return os.path.join(self.folder, f"{number + 1}")

    def foresee(
        self,
        name: str,
        binding: Binding,
        layout: Layout,
        companions: Mapping[str, bytes],
        identity: dict[str, Any],
    ) -> None:
        """Let later stages see the result of one that is not merged yet.

        Args:
            companions: every file beside its weights.
            identity: what its bytes depend on; see `manifest.Identity`.
        """
        if not self._companions:
            temporary = tempfile.TemporaryDirectory(prefix="tvfast-stages-")
            self._companions = self._leaving.enter_context(temporary)
        number = len(self.foreseen) + 1
        directory = os.path.join(self._companions, f"{number}")
        os.makedirs(directory)
        for file, content in companions.items():
            with open(os.path.join(directory, file), "wb") as out:
                out.write(content)
        folder = os.path.join(self.folder, f"{number}")
        tensors = {}
        for task in binding.tasks:
            for tensor, dtype, shape in task.described:
                place = layout.places[tensor]
                path = os.path.join(folder, layout.shards[place.shard].name)
                tensors[tensor] = Stored(tensor, path, place.offset, place.n_bytes, dtype, shape)
        files = tuple(os.path.join(folder, shard.name) for shard in layout.shards)
        self.foreseen[name] = Checkpoint(name, directory, tensors, files, {}, binding.config, ())
        self.identities[name] = _as_input(identity)

    def clear(self) -> None:
        """Remove every stage's result.

        Raises:
            OutputError: the system refuses.
        """
        try:
            shutil.rmtree(self.folder)
        except FileNotFoundError:
            pass
        except OSError as error:
            raise output_error(error, "remove the results of earlier stages", self.folder) from error


def _as_input(identity: dict[str, Any]) -> list[dict[str, Any]]:
    """A stage's identity as that of an input: its recipe, then its inputs' files, without places."""
    own = {key: value for key, value in identity.items() if key != "inputs"}
    files = [
        {**file, "name": f"{number}/{file.get('name', '')}"}
        for number, found in enumerate(identity["inputs"].values())
        for file in found
    ]
    return [{"name": "recipe", **own}, *files]
