"""What a file is that should be GGUF and is not, by how it begins and what it is called."""

from __future__ import annotations

import re

_ARCHIVES = {
    b"PK\x03\x04": "a zip archive (or a PyTorch checkpoint)",
    b"\x1f\x8b": "a gzip archive",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive",
    b"Rar!": "a rar archive",
    b"BZh": "a bzip2 archive",
    b"\xfd7zXZ\x00": "an xz archive",
    b"\x28\xb5\x2f\xfd": "a zstd archive",
}
_TAR_MAGIC_AT = 257
# The magic numbers of llama.cpp's formats before GGUF, as a little-endian file has them.
_BEFORE_GGUF = (b"lmgg", b"fmgg", b"tjgg", b"algg")
_WEB_PAGE = re.compile(rb"\s*<(!doctype|html|head|\?xml)", re.IGNORECASE)
_SAFETENSORS = re.compile(rb".{8}\{\s*\"", re.DOTALL)
# A file that was cut by bytes, whose parts are no GGUF: X.gguf.part1of2, X.gguf-split-a, X.gguf.001.
_PART = re.compile(r"(?P<whole>.+\.gguf)[.-](part|split)?[-_.]?([a-z]{1,2}|\d{1,4})(of\d+)?", re.IGNORECASE)
_UNFINISHED = (".incomplete", ".crdownload", ".part", ".partial", ".aria2", ".download", ".tmp")
LOOKED_AT_BYTES = 512
"""Of the beginning of a file."""


def described(start: bytes) -> str:
    """A clause about the file that begins with ``start``, no GGUF: what it is and what to do."""
    if start.startswith(b"version https://git-lfs."):
        return "it is a Git LFS pointer: run `git lfs pull`"
    if _WEB_PAGE.match(start):
        return "it is a web page: the link led to a page about the file, or to a login, in place of the file"
    for magic, name in _ARCHIVES.items():
        if start.startswith(magic):
            return f"it is {name}: unpack it, or download the .gguf itself"
    if start[_TAR_MAGIC_AT:].startswith(b"ustar"):
        return "it is a tar archive: unpack it"
    if start[:4] in _BEFORE_GGUF:
        return "it is a GGML file of 2023, older than GGUF: convert the original model anew"
    if _SAFETENSORS.match(start):
        return "it is a safetensors file: convert its folder with llama.cpp's convert_hf_to_gguf.py"
    if start.lstrip()[:1] in (b"{", b"["):
        return "it is JSON, perhaps the error message of a server: look into it"
    if not start.strip(b"\0"):
        return "it begins with zeros: space was reserved for it, but the download did not fill it. Get it again"
    return "check that the download completed"


def part_of(name: str) -> str | None:
    """What to do with a file whose ``name`` says that it is a part of one, or not finished; None for others."""
    if match := _PART.fullmatch(name):
        whole = match["whole"]
        return f"it is a part of {whole}, which was cut by bytes: join the parts in order, `cat {whole}?* > {whole}`"
    if name.lower().endswith(_UNFINISHED):
        return "it is an unfinished download: wait for it, or start it again"
    return None
