"""A model is found whatever part of it is named; what is not one model is refused with what was found instead."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import huggingface_hub
import numpy as np
import pytest
from gguf_handmade import TINY_V3, tiny_tensors, write_model
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

from transformers_kt.errors import CheckpointError, CheckpointNotFoundError, GgufFormatError, KtError
from transformers_kt.gguf.checkpoint import open_checkpoint

SHAPES = tiny_tensors(TINY_V3)
SHARDS = 4
PER_SHARD = -(-len(SHAPES) // SHARDS)


def split_model(folder: Path, stem: str = "model", per_shard: int = PER_SHARD) -> list[Path]:
    folder.mkdir(exist_ok=True)
    write_model(folder / f"{stem}.gguf", split_max_tensors=per_shard)
    return sorted(folder.glob(f"{stem}-*.gguf"))


def assert_is_the_model(path: str | Path, files: int) -> None:
    checkpoint = open_checkpoint(path)
    assert len(checkpoint.files) == files
    assert {name: info.shape for name, info in checkpoint.tensors.items()} == SHAPES
    assert checkpoint.metadata["deepseek2.embedding_length"] == 64
    assert checkpoint.nbytes == sum(4 * int(np.prod(shape)) for shape in SHAPES.values())
    for number, name in enumerate(SHAPES):
        assert set(checkpoint.data(name).view(np.float32)) == {number}


def test_a_file_is_a_model(tmp_path: Path) -> None:
    path = write_model(tmp_path / "m.gguf")
    assert_is_the_model(path, 1)
    assert_is_the_model(str(path), 1)


def test_a_folder_with_one_file_is_a_model(tmp_path: Path) -> None:
    write_model(tmp_path / "m.gguf")
    (tmp_path / "config.json").write_text("{}")
    assert_is_the_model(tmp_path, 1)


@pytest.mark.parametrize("which", range(SHARDS))
def test_any_shard_names_the_model(tmp_path: Path, which: int) -> None:
    paths = split_model(tmp_path)
    assert len(paths) == SHARDS
    assert_is_the_model(paths[which], SHARDS)


def test_a_folder_with_shards_is_a_model(tmp_path: Path) -> None:
    split_model(tmp_path)
    assert_is_the_model(tmp_path, SHARDS)


def test_a_first_shard_may_hold_metadata_alone(tmp_path: Path) -> None:
    first, second = tmp_path / "m-00001-of-00002.gguf", tmp_path / "m-00002-of-00002.gguf"
    split = {"split.count": 2, "split.tensors.count": len(SHAPES)}
    write_model(first, shapes={}, more={"split.no": 0, **split})
    write_model(second, facts={}, shapes=SHAPES, more={"split.no": 1, **split})
    assert_is_the_model(first, 2)


def test_a_tilde_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_model(tmp_path / "m.gguf")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert_is_the_model("~/m.gguf", 1)


def test_a_relative_path_is_accepted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = split_model(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert_is_the_model(paths[2].name, SHARDS)
    assert_is_the_model(".", SHARDS)


@pytest.mark.parametrize("which", range(SHARDS))
def test_a_missing_shard_is_named(tmp_path: Path, which: int) -> None:
    paths = split_model(tmp_path)
    paths[which].unlink()
    for path in (tmp_path, paths[which - 1]):
        with pytest.raises(CheckpointNotFoundError, match=rf"4 shards.*{paths[which].name} is missing"):
            open_checkpoint(path)


def test_all_missing_shards_are_named(tmp_path: Path) -> None:
    paths = split_model(tmp_path)
    paths[0].unlink()
    paths[2].unlink()
    with pytest.raises(CheckpointNotFoundError, match=rf"{paths[0].name}, {paths[2].name} are missing"):
        open_checkpoint(tmp_path)


def test_a_damaged_shard_is_named(tmp_path: Path) -> None:
    paths = split_model(tmp_path)
    paths[3].write_bytes(paths[3].read_bytes()[:-1])
    with pytest.raises(GgufFormatError, match=paths[3].name):
        open_checkpoint(tmp_path)


def test_several_models_in_a_folder_are_listed(tmp_path: Path) -> None:
    write_model(tmp_path / "a-Q4_K_M.gguf")
    split_model(tmp_path, "b-Q8_0")
    with pytest.raises(CheckpointError, match=r"2 models: a-Q4_K_M\.gguf, b-Q8_0-\*-of-00004\.gguf") as caught:
        open_checkpoint(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert len(open_checkpoint(tmp_path / "a-Q4_K_M.gguf").files) == 1


def test_shards_of_two_splits_of_one_model_are_two_models(tmp_path: Path) -> None:
    split_model(tmp_path)
    split_model(tmp_path, per_shard=len(SHAPES) // 2 + 1)
    with pytest.raises(CheckpointError, match=r"model-\*-of-00002\.gguf, model-\*-of-00004\.gguf"):
        open_checkpoint(tmp_path)


def test_a_shard_of_another_model_under_the_same_name_is_noticed(tmp_path: Path) -> None:
    ours = split_model(tmp_path / "ours")
    other = {f"other.{number}.weight": (8,) for number in range(3 * PER_SHARD + 1)}
    write_model(tmp_path / "model.gguf", shapes=other, split_max_tensors=PER_SHARD)
    stranger = tmp_path / "model-00002-of-00004.gguf"
    assert stranger.exists()
    shutil.copy(stranger, ours[1])
    with pytest.raises(CheckpointError, match=r"split\.tensors\.count.*not of one model"):
        open_checkpoint(ours[0])


def test_a_renamed_shard_is_noticed(tmp_path: Path) -> None:
    paths = split_model(tmp_path)
    shutil.copy(paths[1], paths[2])
    with pytest.raises(CheckpointError, match=r"model-00003-of-00004\.gguf: split\.no is 1.* 2 is expected"):
        open_checkpoint(tmp_path)


def test_one_of_several_missing_shards_cannot_be_read_as_a_count(tmp_path: Path) -> None:
    paths = split_model(tmp_path)
    paths[0].unlink()
    with pytest.raises(
        CheckpointNotFoundError, match=rf"{paths[1].name} is one of 4 shards\. {paths[0].name} is missing"
    ):
        open_checkpoint(paths[1])


@pytest.mark.parametrize("gguf_alone", [True, False])
def test_a_folder_of_parts_says_how_to_join_them(tmp_path: Path, gguf_alone: bool) -> None:
    (tmp_path / "m.gguf.part1of2").write_bytes(b"GGUF")
    (tmp_path / "m.gguf.part2of2").write_bytes(b"x")
    with pytest.raises(KtError, match=r"part of m\.gguf, .*cat m\.gguf\?\* > m\.gguf"):
        open_checkpoint(tmp_path / "m.gguf.part1of2" if gguf_alone else tmp_path)


def with_stacks(tmp_path: Path, change: Callable[[dict[str, Any]], None]) -> tuple[Path, Path]:
    """A model whose values are all different, and the same after ``change`` to its tensors by name."""
    paths = []
    for name, changed in (("plain", False), ("changed", True)):
        arrays: dict[str, Any] = {}
        for number, (tensor, shape) in enumerate(tiny_tensors(TINY_V3).items()):
            arrays[tensor] = np.random.default_rng(number).standard_normal(shape).astype(np.float32)
        if changed:
            change(arrays)
        writer = gguf.GGUFWriter(tmp_path / f"{name}.gguf", "deepseek2")
        for tensor, values in arrays.items():
            writer.add_tensor(tensor, values)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        paths.append(tmp_path / f"{name}.gguf")
    return paths[0], paths[1]


def fused(arrays: dict[str, Any]) -> None:
    for layer in (1, 2):
        gate, up = (arrays.pop(f"blk.{layer}.ffn_{half}_exps.weight") for half in ("gate", "up"))
        arrays[f"blk.{layer}.ffn_gate_up_exps.weight"] = np.concatenate((gate, up), axis=1)


def single(arrays: dict[str, Any]) -> None:
    for part in ("gate", "up", "down"):
        stack = arrays.pop(f"blk.1.ffn_{part}_exps.weight")
        # Not in their order, as a writer may have them.
        for number in (*range(4, len(stack)), *range(4)):
            arrays[f"blk.1.ffn_{part}.{number}.weight"] = stack[number]


@pytest.mark.parametrize("change", [fused, single])
def test_experts_are_stacks_however_the_file_has_them(tmp_path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    plain, changed = map(open_checkpoint, with_stacks(tmp_path, change))
    assert {name: info.shape for name, info in changed.tensors.items()} == {
        name: info.shape for name, info in plain.tensors.items()
    }
    for name, info in plain.tensors.items():
        np.testing.assert_array_equal(changed.data(name), plain.data(name))
        some = (info.nbytes // 3, info.nbytes - 5)
        np.testing.assert_array_equal(changed.data(name, *some), plain.data(name)[slice(*some)])
        assert not changed.data(name).flags.writeable
    assert changed.nbytes == plain.nbytes


def test_experts_that_make_no_stack_stay_as_they_are(tmp_path: Path) -> None:
    def with_a_gap(arrays: dict[str, Any]) -> None:
        single(arrays)
        del arrays["blk.1.ffn_up.3.weight"]
        arrays["blk.1.ffn_gate.3.weight"] = arrays["blk.1.ffn_gate.3.weight"].astype(np.float16)

    tensors = open_checkpoint(with_stacks(tmp_path, with_a_gap)[1]).tensors
    assert "blk.1.ffn_down_exps.weight" in tensors
    assert "blk.1.ffn_up.4.weight" in tensors
    assert "blk.1.ffn_gate.4.weight" in tensors
    assert not {"blk.1.ffn_up_exps.weight", "blk.1.ffn_gate_exps.weight"} & set(tensors)


def test_a_vocabulary_without_weights_is_told_to_be_one(tmp_path: Path) -> None:
    path = write_model(tmp_path / "vocab.gguf", shapes={})
    with pytest.raises(CheckpointError, match=r"vocab\.gguf holds a vocabulary and no weights"):
        open_checkpoint(path).require_weights()


def test_a_shard_under_a_plain_name_is_noticed(tmp_path: Path) -> None:
    paths = split_model(tmp_path / "model")
    plain = tmp_path / "plain.gguf"
    shutil.copy(paths[0], plain)
    with pytest.raises(CheckpointError, match=r"plain\.gguf: split\.count is 4"):
        open_checkpoint(plain)


def test_whole_files_under_shard_names_are_noticed(tmp_path: Path) -> None:
    for number in (1, 2):
        write_model(tmp_path / f"m-0000{number}-of-00002.gguf")
    with pytest.raises(CheckpointError, match=r"split\.no is missing"):
        open_checkpoint(tmp_path)


def test_a_tensor_in_two_shards_is_noticed(tmp_path: Path) -> None:
    shapes = {"a.weight": (8,), "b.weight": (8,)}
    for number in range(2):
        split = {"split.no": number, "split.count": 2, "split.tensors.count": 4}
        write_model(tmp_path / f"m-0000{number + 1}-of-00002.gguf", shapes=shapes, more=split)
    with pytest.raises(CheckpointError, match=r"a\.weight is in both .*00001.*00002"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["m-00001-of-00000.gguf", "m-00003-of-00002.gguf", "m-00000-of-00002.gguf"])
def test_names_that_only_look_like_shards_are_plain(tmp_path: Path, name: str) -> None:
    assert_is_the_model(write_model(tmp_path / name), 1)


def test_other_gguf_files_beside_a_model_are_not_models(tmp_path: Path) -> None:
    split_model(tmp_path)
    write_model(tmp_path / "mmproj-F16.gguf", {}, {}, architecture="clip")
    write_model(tmp_path / "imatrix_unsloth.gguf", {}, {}, architecture="imatrix")
    write_model(tmp_path / "vision.gguf", {}, {}, architecture="clip")
    write_model(tmp_path / "lora.gguf", {}, {}, more={"general.type": "adapter"})
    (tmp_path / "._model.gguf").write_bytes(b"\0\5\26\7")
    assert_is_the_model(tmp_path, SHARDS)


def test_a_damaged_file_counts_as_a_model(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    with pytest.raises(GgufFormatError, match=r"m\.gguf"):
        open_checkpoint(tmp_path)


def test_a_folder_without_gguf_is_listed(tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFoundError, match="is empty"):
        open_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").touch()
    (tmp_path / "UD-Q4_K_XL").mkdir()
    write_model(tmp_path / "UD-Q4_K_XL" / "m.gguf")
    with pytest.raises(CheckpointNotFoundError, match=r"no GGUF model.*holds UD-Q4_K_XL/, model\.safetensors"):
        open_checkpoint(tmp_path)


def test_a_path_that_is_not_there_is_named_with_what_is(tmp_path: Path) -> None:
    (tmp_path / "other.gguf").touch()
    with pytest.raises(CheckpointNotFoundError, match=r"m\.gguf does not exist.*holds other\.gguf"):
        open_checkpoint(tmp_path / "m.gguf")
    with pytest.raises(CheckpointNotFoundError, match="does not exist either"):
        open_checkpoint(tmp_path / "deep" / "m.gguf")
    with pytest.raises(FileNotFoundError):
        open_checkpoint(tmp_path / "m.gguf")


class NoRouteError(Exception):
    """Stands for whatever the HTTP client of the day raises."""


class FakeHub:
    """Repositories as folders; snapshots are made by copying what the patterns allow."""

    def __init__(self, root: Path) -> None:
        self.repository = root / "repository"
        self.cache = root / "cache"
        self.cache.mkdir()
        self.fetched: list[str] = []
        self.options: list[dict[str, Any]] = []
        self.failure: Exception | None = None

    def names(self, folder: Path) -> list[str]:
        return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())

    def list_repo_files(self, repo: str, **options: Any) -> list[str]:
        assert repo == "org/repo"
        self.options.append(options)
        if self.failure is not None:
            raise self.failure
        return self.names(self.repository)

    def snapshot_download(self, repo: str, *, allow_patterns: list[str] | None, **options: Any) -> str:
        assert repo == "org/repo"
        self.options.append(options)
        if not options.get("local_files_only"):
            for name in self.names(self.repository):
                if allow_patterns is None or any(fnmatchcase(name, pattern) for pattern in allow_patterns):
                    self.fetched.append(name)
                    target = self.cache / name
                    target.parent.mkdir(exist_ok=True)
                    shutil.copy(self.repository / name, target)
        elif not any(self.cache.iterdir()):
            raise LocalEntryNotFoundError("nothing cached")
        return str(self.cache)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    fake = FakeHub(tmp_path)
    fake.repository.mkdir()
    split_model(fake.repository / "Q4_K_M", "m-Q4_K_M")
    write_model(fake.repository / "m-Q8_0.gguf")
    write_model(fake.repository / "m-[odd].gguf")
    write_model(fake.repository / "mmproj-Q8_0.gguf", {}, {}, architecture="clip")
    (fake.repository / "README.md").touch()
    monkeypatch.setattr(huggingface_hub, "list_repo_files", fake.list_repo_files)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake.snapshot_download)
    monkeypatch.chdir(tmp_path)
    return fake


Q4_SHARDS = [f"Q4_K_M/m-Q4_K_M-0000{number}-of-00004.gguf" for number in (1, 2, 3, 4)]


@pytest.mark.parametrize(
    ("wanted", "fetched"),
    [
        ("m-Q8_0.gguf", ["m-Q8_0.gguf"]),
        ("Q8_0", ["m-Q8_0.gguf"]),
        ("q8_0", ["m-Q8_0.gguf"]),
        ("*Q8*", ["m-Q8_0.gguf"]),
        ("m-[odd].gguf", ["m-[odd].gguf"]),
        (Q4_SHARDS[0], Q4_SHARDS),
        (Q4_SHARDS[2], Q4_SHARDS),
        ("Q4_K_M", Q4_SHARDS),
        ("Q4_K_M/*", Q4_SHARDS),
        ("m-Q4_K_M-00002-*", Q4_SHARDS),
    ],
)
def test_the_hub_gives_the_one_model_that_fits(hub: FakeHub, wanted: str, fetched: list[str]) -> None:
    assert_is_the_model(f"org/repo:{wanted}", len(fetched))
    assert hub.fetched == fetched


def test_hub_options_are_passed_on(hub: FakeHub, tmp_path: Path) -> None:
    open_checkpoint("org/repo:Q8_0", revision="v1", token="secret", cache_dir=tmp_path, force_download=True)
    listing, download = hub.options
    assert listing == {"revision": "v1", "token": "secret"}
    assert download == {"revision": "v1", "token": "secret", "cache_dir": tmp_path, "force_download": True}


def test_what_is_on_disk_wins_over_the_hub(hub: FakeHub, tmp_path: Path) -> None:
    (tmp_path / "org").mkdir()
    write_model(tmp_path / "org" / "repo:Q8_0")
    assert_is_the_model("org/repo:Q8_0", 1)
    assert hub.options == []


def test_a_pattern_for_several_models_on_the_hub_fetches_none(hub: FakeHub) -> None:
    with pytest.raises(CheckpointError, match=r"fits 3 models.*m-Q4_K_M-\*-of-00004\.gguf, .*m-Q8_0\.gguf"):
        open_checkpoint("org/repo:*.gguf")
    assert hub.fetched == []


def test_what_the_hub_has_is_listed_where_nothing_fits(hub: FakeHub) -> None:
    with pytest.raises(CheckpointNotFoundError, match=r"no GGUF model that fits 'Q2_K'; it has .*m-Q8_0\.gguf"):
        open_checkpoint("org/repo:Q2_K")
    shutil.rmtree(hub.repository)
    hub.repository.mkdir()
    with pytest.raises(CheckpointNotFoundError, match=r"no \.gguf file at all"):
        open_checkpoint("org/repo:Q2_K")


def test_a_shard_missing_on_the_hub_is_named_before_anything_is_fetched(hub: FakeHub) -> None:
    (hub.repository / Q4_SHARDS[1]).unlink()
    with pytest.raises(CheckpointNotFoundError, match=Q4_SHARDS[1]):
        open_checkpoint("org/repo:Q4_K_M")
    assert hub.fetched == []


def error_of_the_hub(kind: Callable[..., Exception]) -> Exception:
    return kind("refused", response=SimpleNamespace(headers={}, request=None, status_code=401))


@pytest.mark.parametrize(
    ("kind", "said"), [(RepositoryNotFoundError, "was not found"), (GatedRepoError, r"gated.*hf auth login")]
)
def test_a_repository_that_cannot_be_had_is_named(hub: FakeHub, kind: type[Exception], said: str) -> None:
    hub.failure = error_of_the_hub(kind)
    with pytest.raises(CheckpointNotFoundError, match=rf"org/repo.*{said}"):
        open_checkpoint("org/repo:Q8_0")


def test_without_network_the_cache_serves(hub: FakeHub) -> None:
    open_checkpoint("org/repo:Q4_K_M")
    hub.failure = NoRouteError()
    assert_is_the_model("org/repo:Q4_K_M", SHARDS)
    hub.failure = AssertionError("must not ask the hub")
    assert len(open_checkpoint("org/repo:Q4_K_M", local_files_only=True).files) == SHARDS
    assert hub.fetched == Q4_SHARDS * 2


def test_without_network_and_cache_the_repository_is_named(hub: FakeHub) -> None:
    hub.failure = NoRouteError()
    with pytest.raises(CheckpointNotFoundError, match=r"org/repo could not be fetched: .*nothing cached"):
        open_checkpoint("org/repo:Q4_K_M")


def test_a_repository_without_a_file_is_not_guessed(hub: FakeHub) -> None:
    with pytest.raises(CheckpointNotFoundError, match=r"org/repo does not exist.*org/repo:file\.gguf"):
        open_checkpoint("org/repo")
    assert hub.options == []
