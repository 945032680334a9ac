"""The compiled kernels (csrc/bindings): what they take and give.

Arrays are taken as they are: another dtype, or an array that is not C-contiguous, raises TypeError. A wrong shape or
size raises ValueError, an id or index out of range IndexError. ``out`` arrays are written in place. Calls that compute
release the GIL and may come from several threads at once.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

_Floats = npt.NDArray[np.float32]

PANEL_ROWS: int
PREFETCHES: tuple[str, ...]

# ---- The machine -----------------------------------------------------------------------------------------------------

def cpu_features() -> str: ...
def hide_cpu_features(names: str) -> None: ...
def supported_isas() -> list[str]: ...
def isa() -> str:
    """Raises UnsupportedCpuError, naming the missing flag, where this CPU cannot run the kernels asked for."""

def select_isa(name: str) -> None: ...
def thread_count() -> int: ...
def set_thread_count(n: int) -> None:
    """Warns where fewer than ``n`` are used; ValueError for ``n`` < 1."""

def begin_step() -> None:
    """Until `end_step` the threads wait longer for work before they fall asleep. May be nested."""

def end_step() -> None: ...
def refused_calls() -> list[str]:
    """Optional system calls that were refused so far: "madvise", "mbind", "sched_setaffinity"."""

def topology() -> dict[str, object]: ...
def use_topology(root: str | None = None, cpus: Sequence[int] = ...) -> None: ...
def nodes_of_threads(n: int) -> list[int]: ...

# ---- Types and prefetching -------------------------------------------------------------------------------------------

def weight_types() -> list[tuple[str, int, int, int]]:
    """(name, ggml number, elements of a block, bytes of a block) of every type with kernels."""

def panel_layouts() -> list[tuple[str, int, int, int, int, int, int]]:
    """(name, elements and bytes of a block, units of a block, bytes of a unit, of a scale that stands apart from units,
    blocks whose scales stand together) of every type with kernels."""

def codebooks() -> dict[str, npt.NDArray[np.int8]]:
    """Type -> the weights that its quants are positions of, each type that has such: (entries, 8 or 4), or (16,) where
    a quant is one weight. Scales are halved for MXFP4 and NVFP4, whose weights are stored doubled."""

def tune_prefetch(matrices: Sequence[PackedMatrix]) -> dict[str, float]: ...

# ---- Matrices and operations -----------------------------------------------------------------------------------------

class StoredTensor:
    """A tensor of any ggml type in its file or files: (descriptor, offset) of ``parts``, which follow each other and
    have ``part_bytes`` each.

    Who reads from it raises EOFError where a file ends too early and OSError where it cannot be read, with the
    attributes ``part`` and ``position``, a byte within that part. Everything read is looked over for damage; of a type
    without kernels only zeros are looked for.
    """

    def __init__(self, ggml_type: int, parts: Sequence[tuple[int, int]], part_bytes: int) -> None: ...
    def read(self, start: int, out: npt.NDArray[np.uint8]) -> None:
        """Whole blocks from byte ``start`` on to ``out`` uint8 (bytes,), on all threads."""

    def look_at(self, start: int, blocks: npt.NDArray[np.uint8]) -> None:
        """``blocks`` uint8 (bytes,) were read elsewhere: the whole blocks from byte ``start`` on."""

    @property
    def not_finite(self) -> int:
        """The first block with a scale (of a float type a value) that is infinite or no number; -1 for none."""

    @property
    def has_values(self) -> bool:
        """Whether any scale or value is other than zero."""

    @property
    def zeros(self) -> list[tuple[int, int]]:
        """Ranges [start, end) of the bytes read that are zeros, ascending; they begin and end where reads do."""

class PackedMatrix:
    """``count`` matrices of ``rows`` x ``cols`` of one ggml type, interleaved in panels of PANEL_ROWS rows; zeros until
    packed."""

    def __init__(self, ggml_type: int, count: int, rows: int, cols: int) -> None: ...
    def pack(self, index: int, source: npt.NDArray[np.uint8]) -> None:
        """``source`` uint8 (bytes,): whole matrices from ``index`` on."""

    def pack_stored(self, source: StoredTensor, first: int, count: int) -> None:
        """Reads and packs ``count`` matrices from ``first`` on; ``source`` holds all of them, whole ones in a part."""

    def pack_floats(self, source: _Floats) -> None:
        """``source`` float32 (count, rows, cols), converted to F32 or F16."""

    def read_panels(self, index: int, out: npt.NDArray[np.uint8]) -> None:
        """``out`` uint8 (panels, panel bytes) becomes those of matrix ``index``, as they lie in memory."""

    prefetch: str
    """One of PREFETCHES; setting "" goes back to what suits the CPU and the kernels."""

    @property
    def type_name(self) -> str: ...
    @property
    def count(self) -> int: ...
    @property
    def rows(self) -> int: ...
    @property
    def cols(self) -> int: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def node_panels(self) -> list[tuple[int, npt.NDArray[np.uint8]]]:
        """Of each NUMA node that has some: the first panel, and those of all matrices, uint8 (count, panels, panel
        bytes). The memory of the matrix itself, which kernels read at any time: not to be written."""

    @property
    def panels_of_nodes(self) -> list[tuple[int, int]]:
        """[first, end) of the panels on each NUMA node."""

def linear(w: PackedMatrix, x: _Floats, out: _Floats) -> None:
    """``x`` float32 (tokens, cols) times one matrix -> ``out`` float32 (tokens, rows)."""

def rms_norm(x: _Floats, weight: _Floats, eps: float, out: _Floats) -> None:
    """``x`` and ``out`` float32 (tokens, width), which may be the same; ``weight`` float32 (width,)."""

def embed(ggml_type: int, data: npt.NDArray[np.uint8], ids: npt.NDArray[np.int64], out: _Floats) -> None:
    """Rows ``ids`` int64 (tokens,) of the blocks ``data`` uint8 (bytes,) -> ``out`` float32 (tokens, cols)."""

def dequantize(ggml_type: int, data: npt.NDArray[np.uint8], out: _Floats) -> None:
    """Blocks ``data`` uint8 (bytes,) -> ``out`` float32 of any shape."""

def rope_table(positions: npt.NDArray[np.int64], inv_freq: _Floats, scaling: float, table: _Floats) -> None:
    """``positions`` int64 (n,), ``inv_freq`` float32 (dim / 2,) -> ``table`` float32 (n, dim): cosines, then sines."""

def failing_loop(tasks: int, failing: int) -> None: ...

class Job:
    """What was submitted; dropping it waits for it."""

    def is_done(self) -> bool: ...
    def wait(self) -> None:
        """Raises what the job raised."""

class Experts:
    """``gate`` and ``up`` (count, intermediate, hidden), ``down`` (count, hidden, intermediate)."""

    def __init__(self, gate: PackedMatrix, up: PackedMatrix, down: PackedMatrix) -> None: ...
    @property
    def matrices(self) -> list[PackedMatrix]:
        """gate, up, down"""

    def forward_routed(self, x: _Floats, indices: npt.NDArray[np.int64], weights: _Floats, out: _Floats) -> None:
        """``x`` and ``out`` float32 (tokens, hidden), ``indices`` int64 and ``weights`` float32 (tokens, top_k). An
        index of -1 costs nothing and adds nothing; IndexError for others that name no expert."""

    def submit_routed(self, x: _Floats, indices: npt.NDArray[np.int64], weights: _Floats, out: _Floats) -> Job:
        """``forward_routed`` beside the calling thread; no array may be touched before the job is done."""

    def forward_mlp(self, x: _Floats, out: _Floats) -> None:
        """``x`` and ``out`` float32 (tokens, hidden); for a single expert."""

class MoeBlock:
    """Router (1, experts, hidden), ``bias`` float32 (experts,) or None, routed experts, a shared expert or None."""

    def __init__(
        self,
        router: PackedMatrix,
        bias: _Floats | None,
        routed: Experts,
        shared: Experts | None,
        *,
        sigmoid: bool,
        groups: int,
        top_groups: int,
        top_k: int,
        normalize: bool,
        scale: float,
    ) -> None: ...
    @property
    def matrices(self) -> list[PackedMatrix]:
        """router, then those of the routed experts and of the shared expert"""

    @property
    def routed(self) -> Experts: ...
    def forward(self, x: _Floats, out: _Floats, logits: _Floats) -> None:
        """``x`` and ``out`` float32 (tokens, hidden); ``logits`` float32 (tokens, experts) are written too."""

class Attention:
    """What a layer asks of its attention, whichever it is."""

class MlaAttention(Attention):
    """Multi-head latent attention. ``q_a`` and ``q_a_norm`` are None where queries are not compressed; ``k_b`` is
    (heads, latent_dim, nope_dim), ``v_b`` (heads, value_dim, latent_dim)."""

    def __init__(
        self,
        *,
        hidden: int,
        heads: int,
        nope_dim: int,
        rope_dim: int,
        latent_dim: int,
        value_dim: int,
        softmax_scale: float,
        norm_eps: float,
        q_a: PackedMatrix | None,
        q_a_norm: _Floats | None,
        q: PackedMatrix,
        kv_a: PackedMatrix,
        kv_a_norm: _Floats,
        k_b: PackedMatrix,
        v_b: PackedMatrix,
        o: PackedMatrix,
    ) -> None: ...
    @property
    def matrices(self) -> list[PackedMatrix]: ...
    def project_keys(self, x: _Floats, rope_table: _Floats, latents: _Floats, ropes: _Floats) -> None:
        """``x`` (tokens, hidden), ``rope_table`` (tokens, rope_dim) -> ``latents`` (tokens, latent_dim), ``ropes``
        (tokens, rope_dim)."""

    def attend(
        self,
        x: _Floats,
        rope_table: _Floats,
        latents: _Floats,
        ropes: _Floats,
        ranges: npt.NDArray[np.int32] | None,
        mask: npt.NDArray[np.uint8] | None,
        out: _Floats,
    ) -> None:
        """``x`` and ``out`` (batch, tokens, hidden), ``rope_table`` (batch * tokens, rope_dim), ``latents`` (batch,
        keys, latent_dim) and ``ropes`` (batch, keys, rope_dim) with a dense last axis; either ``ranges`` int32 (batch,
        tokens, 2) of visible keys [start, end) or ``mask`` uint8 (batch, tokens, keys)."""

class DecoderLayer:
    """An attention and either a MoE block or an MLP, with both norms and residuals. ``first`` and ``second`` are the
    streams of its cache: latents and rotary keys in latent attention."""

    def __init__(
        self,
        *,
        attention: Attention,
        moe: MoeBlock | None,
        mlp: Experts | None,
        input_norm_eps: float,
        post_norm_eps: float,
    ) -> None: ...
    def project_keys(
        self, x: _Floats, input_norm: _Floats, rope_table: _Floats, first: _Floats, second: _Floats
    ) -> None:
        """Those of the attention for the norm of ``x``; ``input_norm`` float32 (hidden,)."""

    def forward(
        self,
        x: _Floats,
        input_norm: _Floats,
        post_norm: _Floats,
        rope_table: _Floats,
        first: _Floats,
        second: _Floats,
        ranges: npt.NDArray[np.int32] | None,
        mask: npt.NDArray[np.uint8] | None,
        out: _Floats,
    ) -> None:
        """Arguments as of ``MlaAttention.attend``; norms float32 (hidden,)."""

    def append_and_forward(
        self,
        x: _Floats,
        input_norm: _Floats,
        post_norm: _Floats,
        rope_table: _Floats,
        first: _Floats,
        second: _Floats,
        ranges: npt.NDArray[np.int32] | None,
        mask: npt.NDArray[np.uint8] | None,
        out: _Floats,
    ) -> None:
        """``forward``, after writing the keys of ``x`` to the last rows of the cache."""

class KeyBuffers:
    """The caches of all layers for sequences of one length, with room for more: both streams of each, float32 (batch,
    room, width). Their memory must stay where it is."""

    def __init__(self, first: Sequence[_Floats], second: Sequence[_Floats]) -> None: ...

class DecoderStack:
    """Decoder layers that follow each other; ``norms`` float32 (hidden,): input and post norm of each in turn."""

    def __init__(self, layers: Sequence[DecoderLayer], norms: Sequence[_Floats]) -> None: ...
    def append_and_forward(
        self,
        x: _Floats,
        rope_table: _Floats,
        buffers: Sequence[KeyBuffers],
        lengths: Sequence[int],
        ranges: npt.NDArray[np.int32] | None,
        mask: npt.NDArray[np.uint8] | None,
        out: _Floats,
    ) -> None:
        """As ``DecoderLayer.forward`` layer by layer, after writing the keys of ``x`` to the last rows of each cache.

        The sequences of the batch are those of ``buffers`` one after the other, with ``lengths`` keys: as many for the
        sequences of one buffer. A ``mask`` is for equal lengths."""
