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
# By number, what the gguf package does not list.
_NAMES = {
    **{4: "Q4_2", 5: "Q4_3", 31: "Q4_0_4_4", 32: "Q4_0_4_8", 33: "Q4_0_8_8"},
    **{36: "IQ4_NL_4_4", 37: "IQ4_NL_4_8", 38: "IQ4_NL_8_8", 41: "Q1_0", 42: "Q2_0"},
    **{97: "Q8_0_X4", 133: "Q6_0", 134: "IQ1_BN", 135: "IQ2_BN"},
    **{137: "IQ2_K", 138: "IQ3_K", 139: "IQ4_K", 140: "IQ5_K", 141: "IQ6_K"},
    **{144: "IQ4_KS", 145: "IQ2_KS", 146: "IQ4_KSS", 151: "Q8_KV", 152: "IQ5_KS", 156: "IQ3_KS", 157: "IQ2_KL"},
    **{153: "IQ2_KT", 154: "IQ3_KT", 155: "IQ4_KT", 158: "IQ1_KT"},
    **{202: "Q4_0_R8", 206: "Q5_0_R4", 208: "Q8_0_R8", 210: "Q2_K_R4", 211: "Q3_K_R4", 212: "Q4_K_R4"},
    **{213: "Q5_K_R4", 214: "Q6_K_R4", 216: "IQ2_XXS_R4", 217: "IQ2_XS_R4", 218: "IQ3_XXS_R4", 219: "IQ1_S_R4"},
    **{220: "IQ4_NL_R4", 221: "IQ3_S_R4", 222: "IQ2_S_R4", 223: "IQ4_XS_R8", 229: "IQ1_M_R4", 230: "BF16_R16"},
    **{337: "IQ2_K_R4", 338: "IQ3_K_R4", 339: "IQ4_K_R4", 340: "IQ5_K_R4", 344: "IQ4_KS_R4", 352: "IQ5_KS_R4"},
}


def published_with(types: Collection[str]) -> list[str]:
    """The names of files that hold none but ``types``, whatever the model's widths."""
    return [name for name, inside in _INSIDE.items() if set(inside) <= set(types)]


def unknown_type(number: int, known: Collection[int]) -> str:
    """What to say of the ggml type ``number``, which the `gguf` package, that knows ``known``, does not: its name where
    it has one, and whose it is."""
    named = f"{number} ({_NAMES[number]})" if number in _NAMES else str(number)
    if _FIRST_OF_IK_LLAMA <= number < 1 << 16:
        return f"{named}, a type of ik_llama.cpp, which llama.cpp and this project do not read"
    if number > max(known) and number < _FIRST_OF_IK_LLAMA:
        return f"{named}, newer than those of the gguf package {version('gguf')} (up to {max(known)})"
    if number <= max(known):
        return f"{named}, withdrawn by llama.cpp"
    return f"{named}, not one that any program writes: the file is damaged"
