"""What files are called by how they are quantized, and the ggml types inside."""

from __future__ import annotations

from collections.abc import Collection
from importlib.metadata import version

# Name in file names to the types of its matrices in a model with experts, as llama.cpp chooses them: a layer that
# matters more gets more bits, and rows that do not divide by 256 the type in parentheses of
# Q4_K (Q5_0), Q5_K (Q5_1), Q6_K (Q8_0), Q3_K and Q2_K (IQ4_NL).
_INSIDE = {
    "Q8_0": ("Q8_0",),
    "Q6_K": ("Q6_K", "Q8_0"),
    "Q5_K_M": ("Q5_K", "Q6_K", "Q5_1", "Q8_0"),
    "Q5_K_S": ("Q5_K", "Q5_1"),
    "Q5_0": ("Q5_0", "Q6_K"),
    "Q4_K_M": ("Q4_K", "Q6_K", "Q5_0", "Q8_0"),
    "Q4_K_S": ("Q4_K", "Q5_K", "Q6_K", "Q5_0", "Q5_1"),
    "Q4_0": ("Q4_0", "Q6_K"),
    "Q4_1": ("Q4_1", "Q6_K"),
    "IQ4_NL": ("IQ4_NL", "Q5_K", "Q6_K"),
    "IQ4_XS": ("IQ4_XS", "IQ4_NL", "Q5_K", "Q6_K"),
    "Q3_K_M": ("Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL"),
    "Q2_K": ("Q2_K", "Q3_K", "Q6_K", "IQ4_NL"),
    "BF16": ("BF16",),
    "F16": ("F16",),
}
_FIRST_OF_IK_LLAMA = 97  # llama.cpp numbers its own types below


def published_with(types: Collection[str]) -> list[str]:
    """The names of files that hold none but ``types``, whatever the model's widths."""
    return [name for name, inside in _INSIDE.items() if set(inside) <= set(types)]


def unknown_type(number: int, known: Collection[int]) -> str:
    """A clause about the ggml type ``number``, which the `gguf` package, that knows ``known``, does not."""
    if number >= _FIRST_OF_IK_LLAMA and number < 1 << 16:
        return "a type of ik_llama.cpp, which llama.cpp and this project do not read"
    if number > max(known) and number < _FIRST_OF_IK_LLAMA:
        return f"newer than those of the gguf package {version('gguf')} (up to {max(known)})"
    if number <= max(known):
        return "withdrawn by llama.cpp"
    return "not one that any program writes: the file is damaged"
