"""Damaged files, each in a process of its own, load or are refused. `make fuzz-files` tries many more."""

from __future__ import annotations

import json
import subprocess
import sys

import damaged_files
import pytest
from damaged_files import damaged, parsed, sound_file

FILES = 150


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return sound_file(tmp_path_factory.mktemp("sound"))


def test_a_sound_file_taken_apart_is_itself(sound: bytes) -> None:
    assert parsed(sound).build() == sound


def test_a_file_is_damaged_as_its_number_says(sound: bytes) -> None:
    assert damaged(sound, 7) == damaged(sound, 7)
    assert len({damaged(sound, number)[0] for number in range(200)}) > 15


def test_damaged_files_load_or_are_refused() -> None:
    command = [sys.executable, damaged_files.__file__, "--files", str(FILES), "--load-every", "3"]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-4000:]
    outcomes = json.loads(ran.stdout)
    assert sum(outcomes.values()) == FILES
    # Which proves nothing where every file is refused at its first byte, or none.
    assert outcomes["refused"] > FILES // 3
    assert outcomes["opened"] > FILES // 10
    assert outcomes["loaded"] > 2
