"""2,000 damaged files load or are refused. `make fuzz-files` tries ten times as many."""

from __future__ import annotations

from pathlib import Path

import damaged_files
import pytest
from damaged_files import damaged, parsed, sound_file, try_files

FILES = 2000


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return sound_file(tmp_path_factory.mktemp("sound"))


def test_a_sound_file_taken_apart_is_itself(sound: bytes, tmp_path: Path) -> None:
    assert parsed(sound).build() == sound
    (tmp_path / "m.gguf").write_bytes(sound)
    assert damaged_files.tried(tmp_path / "m.gguf", load=True) == "loaded"


def test_a_file_is_damaged_as_its_number_says(sound: bytes) -> None:
    assert damaged(sound, 7) == damaged(sound, 7)
    assert len({damaged(sound, number)[0] for number in range(200)}) > 15


def test_damaged_files_load_or_are_refused(sound: bytes, tmp_path: Path) -> None:
    outcomes = try_files(sound, tmp_path, first=0, files=FILES, load_every=25)
    assert outcomes.total() == FILES
    # The loop proves nothing where every file is refused at its first byte, or none.
    assert outcomes["refused"] > FILES // 3
    assert outcomes["opened"] > FILES // 10
    assert outcomes["loaded"] > 5
