"""Exception classes of transformers_kt: every refusal a user can meet is one of these.

Each also derives from the builtin that fits, so that code which catches ``ValueError`` or ``FileNotFoundError`` goes
on working. A message says what was found, what is accepted and what to do.
"""

from __future__ import annotations


class KtError(Exception):
    """Base class of all errors raised on purpose by transformers_kt."""


class GgufFormatError(KtError, ValueError):
    """A file is not GGUF, is truncated, or contradicts itself (header, metadata, tensor table, data)."""


class CheckpointNotFoundError(KtError, FileNotFoundError):
    """No model was found where ``gguf_path`` points: no such file, a folder without GGUF, a missing shard."""


class CheckpointError(KtError, ValueError):
    """A readable checkpoint cannot be used as it is: shards that do not belong together, several models in a folder,
    a tensor missing, surplus, or of a shape that contradicts the config."""


class UnsupportedModelError(KtError, ValueError):
    """The architecture, or a feature of the config, is none that transformers_kt computes."""


class UnsupportedTypeError(KtError, ValueError):
    """A tensor's quantization type has no kernel for the operation that needs it."""


class UnsupportedCpuError(KtError, RuntimeError):
    """This CPU lacks an instruction set that is required, or ``TRANSFORMERS_KT_ISA`` names one it does not have."""


class RuleError(KtError, ValueError):
    """A placement rule is malformed, names something unknown, or cannot be applied."""


class OutOfMemoryError(KtError, MemoryError):
    """The weights would not fit into the memory that is free; raised before any of it is taken."""


class InputError(KtError, ValueError):
    """Input to a loaded model is out of range: a token id, a position past the model's limit."""


class ServerBusyError(KtError, RuntimeError):
    """As many requests wait as the server lets; the status code is 503."""


class UnsupportedOperationError(KtError, NotImplementedError):
    """Something an ordinary transformers model can do and a GGUF-backed one cannot: training, ``save_pretrained``."""
