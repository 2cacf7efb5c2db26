"""Models of the Hugging Face hub: in its local cache, or downloaded into it."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from types import ModuleType

from tvfast.errors import CheckpointError

WHOLE_MODEL = (("*.safetensors", "*.json", "*.model", "*.txt", "*.jinja"), ("*.bin", "*.bin.index.json"))
"""What is downloaded of a model; the second only where the first brings no weights."""

ADAPTER = (("adapter_config.json", "adapter_model.safetensors"), ("adapter_model.bin",))

TOKENIZER = (("*.json", "*.model", "*.txt", "*.jinja"),)

_ELSEWHERE = ("*/*", "consolidated*")  # other formats, and the same weights once more
_WEIGHTS = ".safetensors"
ID = re.compile(r"[A-Za-z0-9][\w.-]*(?:/[\w.-]+)?")
"""What the name of a model of the hub looks like; so do paths."""

_OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
_TRUE = ("1", "ON", "YES", "TRUE")


def hub_id(path: str) -> tuple[str, str] | None:
    """Name and revision that `org/name` or `org/name@revision` means; None: no such id."""
    name, _, revision = path.partition("@")
    if not ID.fullmatch(name) or ".." in re.split("[/@]", path):
        return None
    return name, revision or "main"


def cache_folder() -> str:
    """Where huggingface_hub keeps what it downloads."""
    environment = os.environ
    if cache := environment.get("HF_HUB_CACHE") or environment.get("HUGGINGFACE_HUB_CACHE"):
        return os.path.expanduser(cache)
    general = environment.get("XDG_CACHE_HOME") or os.path.join("~", ".cache")
    home = environment.get("HF_HOME") or os.path.join(general, "huggingface")
    return os.path.join(os.path.expanduser(home), "hub")


def cached_snapshot(path: str) -> str | None:
    """The directory of a hub id in the local cache; None: it is not there."""
    found = hub_id(path)
    if found is None:
        return None
    name, revision = found
    repository = os.path.join(cache_folder(), "models--" + name.replace("/", "--"))
    reference = os.path.join(repository, "refs", *revision.split("/"))
    if os.path.isfile(reference):
        with open(reference, "rb") as file:
            revision = file.read(256).decode("ascii", "replace").strip()
    snapshot = os.path.join(repository, "snapshots", revision)
    known = re.fullmatch(r"\w[\w.-]*", revision) and os.path.isdir(snapshot)
    return snapshot if known else None


def is_offline() -> str | None:
    """The variable that forbids downloads; None: there is none."""
    return next((name for name in _OFFLINE if os.environ.get(name, "").upper() in _TRUE), None)


def may_be_downloaded(path: str) -> bool:
    """Whether a path that is not there reads as `org/name`, and no directory `org` says otherwise."""
    found = hub_id(path)
    return found is not None and "/" in found[0] and not os.path.isdir(found[0].partition("/")[0])


def downloaded(path: str, files: Sequence[Sequence[str]]) -> str:
    """The directory of a hub id in the local cache, after what it lacks is downloaded.

    Args:
        path: one that `may_be_downloaded`.
        files: patterns of their names; the second ones count where the first bring no weights.

    Raises:
        CheckpointError: no such model or revision, no right to read it, no connection; or downloads are
            forbidden, or huggingface_hub is not installed.
    """
    found = hub_id(path)
    assert found is not None
    name, revision = found
    kept = "not in" if cached_snapshot(path) is None else "only in part in"
    nowhere = f"{path}: no such file or directory, and {kept} the local cache of the hub ({cache_folder()})"
    if (variable := is_offline()) is not None:
        raise CheckpointError(
            f"{nowhere}; {variable} forbids to download it. Expected a checkpoint's directory or file; if it "
            f"is a model of the hub, unset {variable} or download it first: `hf download {name}`."
        )
    try:
        import huggingface_hub
        from huggingface_hub import errors
        from huggingface_hub.utils.tqdm import disable_progress_bars
    except ImportError:
        raise CheckpointError(
            f"{nowhere}; huggingface_hub, which downloads models, is not installed. Expected a checkpoint's "
            "directory or file; if it is a model of the hub, `pip install tvfast[hub]`, or download it first."
        ) from None
    if not sys.stderr.isatty():
        disable_progress_bars()
    try:
        for patterns in files:
            snapshot = huggingface_hub.snapshot_download(
                name,
                revision=revision,
                cache_dir=cache_folder(),
                allow_patterns=list(patterns),
                ignore_patterns=list(_ELSEWHERE),
            )
            if any(file.endswith(_WEIGHTS) for file in _names(snapshot)):
                break
    except Exception as error:  # its HTTP client, which differs between releases, has errors of its own
        raise CheckpointError(f"{path}: {_reason(error, errors, name, revision)}") from None
    if not _names(snapshot):
        wanted = ", ".join(pattern for patterns in files for pattern in patterns)
        raise CheckpointError(
            f"{path}: the hub's {name} has no file that is read here; expected some of {wanted}, outside of "
            "folders. Check the name, or give a model in another format."
        )
    return str(snapshot)


def _names(snapshot: str) -> list[str]:
    """What a snapshot holds; of one without a file that was asked for, there is not even the folder."""
    try:
        return os.listdir(snapshot)
    except FileNotFoundError:
        return []


def _reason(error: Exception, errors: ModuleType, name: str, revision: str) -> str:
    """What went wrong, and what to do."""
    if isinstance(error, errors.GatedRepoError):
        return (
            f"the hub gives {name} only to those who accepted its terms; expected that you did, and "
            f"`hf auth login`. See huggingface.co/{name}."
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            f"no such file or directory, and no model {name} on the hub; expected a checkpoint's directory "
            "or file, or a model's id. Check the name; if the model is private, `hf auth login` first."
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return (
            f"the hub's {name} has no revision {revision!r}; expected a branch, a tag or a commit. Check it."
        )
    shown = " ".join(str(error).split())[:300] or type(error).__name__
    return (
        f"no such file or directory, and {name} could not be downloaded from the hub ({shown}). Expected a "
        "checkpoint's directory or file, or a connection; what has arrived is kept, so run again."
    )
