"""What a call of ``from_pretrained``, or of ``plan``, asks of us: where config and GGUF are, and which rules."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

from transformers_kt._environment import default_rules
from transformers_kt.errors import CheckpointError, CheckpointNotFoundError, KtError
from transformers_kt.families.registry import families, knows
from transformers_kt.gguf.checkpoint import (
    Checkpoint,
    HubFiles,
    cached_file,
    files_on_hub,
    is_hub_name,
    open_checkpoint,
)
from transformers_kt.gguf.reader import GgufFile
from transformers_kt.rules.files import AUTO, KtRules
from transformers_kt.text import listed

# Where from_pretrained looks for files. A GGUF is found by its own path, in a repository of its own.
HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
_GGUF_HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "token", "revision")
KT_OPTIONS = (
    *("kt_cpu_layers", "kt_gpu_experts"),
    *("kt_expert_slots", "kt_expert_profile", "kt_prefill_stream_tokens", "kt_cuda_graph"),
)
"""What `PlacementRequest.read` takes beside rules, map and limits."""
NAME_OPTIONS = ("pretrained_model_name_or_path", "pretrained_model_name")
"""What from_pretrained calls its first argument."""
SOURCE_OPTIONS = (
    *NAME_OPTIONS,
    "gguf_path",
    "gguf_file",
    "kt_rules",
    *KT_OPTIONS,
    *HUB_OPTIONS,
)
"""The options of which a `Request` is made."""
MOOT_OPTIONS = ("trust_remote_code", "code_revision", "adapter_kwargs", "_commit_hash", "low_cpu_mem_usage")
"""Without effect here: the GGUF's architecture decides which code runs, the plan how memory is saved."""


@dataclass(frozen=True, slots=True)
class Request:
    """What a call of from_pretrained asks of us.

    ``folder`` is the folder or hub id that has the config, None where the GGUF is all there is; ``hub`` says how to get
    files from there, ``gguf_hub`` how to get the GGUF. ``kt_options`` are those of KT_OPTIONS that are given.
    """

    folder: str | None
    gguf: str
    rules: KtRules
    kt_options: Mapping[str, Any]
    hub: dict[str, Any]
    gguf_hub: dict[str, Any]

    @property
    def name(self) -> str:
        return self.folder or self.gguf

    @property
    def title(self) -> str:
        return Path(os.path.abspath(self.name)).name.removesuffix(".gguf")

    def open(self) -> Checkpoint:
        return open_checkpoint(self.gguf, **self.gguf_hub)


class Call(NamedTuple):
    """A call of from_pretrained: ``stock(cls, name, *args, **options)``, without the options that `Request` has."""

    stock: Callable[..., Any]  # the function that was there before ours
    cls: Any
    args: tuple[Any, ...]
    options: dict[str, Any]


def read_request(name: Any, options: Mapping[str, Any]) -> Request | None:
    """What ``from_pretrained(name, **options)`` asks of us; None if nothing."""
    rules = options.get("kt_rules")
    kt_options = {key: options[key] for key in KT_OPTIONS if options.get(key) is not None}
    asks = options.get("gguf_path") is not None or rules is not None or bool(kt_options)
    if not asks and not _is_for_us(name, options):
        return None
    hub = {key: options[key] for key in HUB_OPTIONS if options.get(key) is not None}
    name = None if name is None else os.fspath(name)
    if options.get("gguf_path") is not None:
        gguf = os.fspath(options["gguf_path"])
        folder = _folder_beside(name, gguf, hub)
    else:
        gguf = _gguf_at(name, options.get("gguf_file"), hub)
        folder = _folder_with_config(name, hub)
        if options.get("gguf_file") is not None and folder is not None:
            # For transformers such a file is the source of config and tokenizer. A folder's own are better, where they
            # are of a model that we know.
            folder = folder if _is_known(folder_of(folder, hub) / "config.json") else None
    # A revision is one of the repository that the name says.
    left_out = () if options.get("gguf_path") is None else ("revision",)
    gguf_hub = {key: hub[key] for key in _GGUF_HUB_OPTIONS if key in hub and key not in left_out}
    return Request(folder, gguf, rules_or_default(rules), kt_options, hub, gguf_hub)


def rules_or_default(rules: KtRules | None) -> KtRules:
    """``rules`` as a call gives them, or what the environment says, or "auto"."""
    return (default_rules() or AUTO) if rules is None else rules


def _folder_beside(name: str | None, gguf: str, hub: Mapping[str, Any]) -> str | None:
    """Where the config is when ``gguf`` is named by gguf_path=; None for the GGUF itself."""
    folder = _folder_with_config(name, hub)
    if name is not None and folder is None and Path(name).is_file() and name != gguf:
        raise CheckpointError(f"two GGUF files are named, {name} and gguf_path={gguf}; name one of them")
    return folder


def _folder_with_config(name: str | None, hub: Mapping[str, Any]) -> str | None:
    return name if name is not None and _has_config(name, hub) else None


def _gguf_at(name: str | None, gguf_file: str | None, hub: Mapping[str, Any]) -> str:
    """Where the GGUF is when ``name`` has to lead to it."""
    if name is not None:
        path = Path(name)
        if gguf_file is not None:
            return (
                str(folder_of(name, hub) / gguf_file) if path.is_dir() else f"{name}:{_in_repository(gguf_file, hub)}"
            )
        if path.exists() or ":" in name:
            return name
        found = files_on_hub(name, **{key: hub[key] for key in _GGUF_HUB_OPTIONS if key in hub})
        if found is not None and found.models:
            return f"{name}:{_only_model(name, found, 'There is no one GGUF.')}"
    raise CheckpointNotFoundError(
        f"there is no GGUF: {name} is no local file or folder. Name the weights with gguf_path= (a file, a folder, or "
        'hub "org/repo:file.gguf")'
    )


# Weights that transformers finds in a folder by itself.
_STOCK_WEIGHTS = ("model*.safetensors", "pytorch_model*.bin", "*.safetensors.index.json", "*.bin.index.json")


def _is_for_us(name: Any, options: Mapping[str, Any]) -> bool:
    """Whether ``name`` leads to a GGUF that transformers does not load, or only dequantized, without an argument of
    ours.

    It does as such a file, as hub "org/repo:file.gguf", as a folder with a GGUF and without config, as the folder of a
    model that we know whose only weights are a GGUF, and where ``gguf_file`` names a GGUF of an architecture that we
    know.
    """
    if not isinstance(name, str | os.PathLike):
        return False
    path = Path(name)
    if options.get("gguf_file") is not None:
        return _is_of_known_architecture(name, options)
    if ".gguf" in path.name and not path.is_dir():  # also a part of a file or a pipe, which opening it refuses
        return path.exists() or is_hub_name(os.fspath(name))
    if not path.is_dir() or next(path.glob("*.gguf"), None) is None:
        return False
    if not (path / "config.json").exists():
        return True
    if options.get("subfolder") or options.get("state_dict") is not None or not _is_known(path / "config.json"):
        return False
    return not any(found for pattern in _STOCK_WEIGHTS for found in path.glob(pattern))


def request_after(failure: Exception, name: Any, options: Mapping[str, Any]) -> Request | None:
    """What a call asks of us that transformers could not answer: ``name`` is a hub repository whose only weights are
    one GGUF of a model that we know. None if it is anything else.

    Only asked after a ``failure``: the hub has to be asked, which calls for other models must not cost. Raises
    `CheckpointNotFoundError` with both reasons where there are several.
    """
    no_plain_repository = ("gguf_file", "subfolder", "state_dict")
    if not isinstance(name, str) or any(options.get(key) for key in no_plain_repository) or Path(name).exists():
        return None
    hub = {key: options[key] for key in HUB_OPTIONS if options.get(key) is not None}
    gguf_hub = {key: hub[key] for key in _GGUF_HUB_OPTIONS if key in hub}
    found = files_on_hub(name, **gguf_hub)
    if found is None or not found.models:
        return None
    if any(fnmatchcase(file, pattern) for pattern in _STOCK_WEIGHTS for file in found.names):
        return None
    has_config = "config.json" in found.names
    if has_config and ((config := cached_file(name, "config.json", **gguf_hub)) is None or not _is_known(config)):
        return None
    model = _only_model(name, found, str(failure))
    if not has_config and not _is_of_known_architecture(name, {**options, "gguf_file": model}):
        return None
    return Request(name if has_config else None, f"{name}:{model}", rules_or_default(None), {}, hub, gguf_hub)


def _only_model(repo: str, found: HubFiles, without: str) -> str:
    """The GGUF of a hub repository that has any; ``without`` says what its name alone does not do."""
    if len(found.models) > 1:
        raise CheckpointNotFoundError(
            f"{without} Hub repository {repo} has {len(found.models)} GGUF models: {listed(found.models, most=10)}. "
            f'Name one of them, as "{repo}:{found.models[0]}"'
        )
    return found.models[0]


def _is_of_known_architecture(name: str | os.PathLike[str], options: Mapping[str, Any]) -> bool:
    """Whether the file that ``gguf_file`` names, in a folder or on the hub, is of a family that we compute.

    Only its header says, so from the hub it is downloaded, as transformers would do it. What cannot be had or read is
    left to transformers.
    """
    hub = {key: options[key] for key in HUB_OPTIONS if options.get(key) is not None}
    if Path(name).is_dir():
        path: Path | None = folder_of(os.fspath(name), hub) / options["gguf_file"]
    else:
        once = {key: hub[key] for key in _GGUF_HUB_OPTIONS if key in hub and key != "force_download"}
        path = cached_file(os.fspath(name), _in_repository(options["gguf_file"], hub), **once)
    try:
        architecture = None if path is None else GgufFile(path).metadata.get("general.architecture")
    except KtError:
        return False
    return architecture in [known for family in families() for known in family.architectures]


def _is_known(config: Path) -> bool:
    """Whether the config is of a family that we compute. One that cannot be read is left to transformers."""
    try:
        facts = json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(facts, dict) and knows(facts)


def _has_config(name: str, hub: Mapping[str, Any]) -> bool:
    path = Path(name)
    if path.is_dir():
        return (folder_of(name, hub) / "config.json").is_file()
    if path.is_file():
        return path.suffix == ".json"
    return ":" not in name  # a hub id, not a GGUF on the hub


def _in_repository(gguf_file: str, hub: Mapping[str, Any]) -> str:
    return f"{hub['subfolder']}/{gguf_file}" if "subfolder" in hub else gguf_file


def folder_of(name: str, hub: Mapping[str, Any]) -> Path:
    return Path(name, hub.get("subfolder", ""))


def without(options: Mapping[str, Any], keys: Collection[str]) -> dict[str, Any]:
    return {key: value for key, value in options.items() if key not in keys}
