"""Which tensor gets which type: the tables are those that llama.cpp's quantize tool gave.

Taken from files that it wrote of the same shapes (llama.cpp in llama-cpp-python 0.3.36).
"""

from __future__ import annotations

import itertools

import pytest

from potluck.errors import UsageError
from potluck.type_mix import ALIASES, CHOICES, Candidate, choice_of, types_of

PARTS = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")


def model(
    n_layers: int, *, dim: int = 512, ffn_dim: int = 1024, tied: bool = False
) -> list[Candidate]:
    vectors = [Candidate(f"blk.{i}.attn_norm.weight", (dim,), "f32") for i in range(n_layers)]
    matrices = [
        Candidate(f"blk.{i}.{part}.weight", (64, ffn_dim if part == "ffn_down" else dim), "f16")
        for i, part in itertools.product(range(n_layers), PARTS)
    ]
    ends = ["token_embd"] if tied else ["token_embd", "output"]
    outer = [Candidate(f"{name}.weight", (96, dim), "f16") for name in ends]
    return [*outer, *vectors, *matrices]


def of_part(types: dict[str, str], part: str) -> str:
    """The digit of each layer's type: 4 for q4_k."""
    return "".join(t[1] for name, t in types.items() if name.endswith(f".{part}.weight"))


@pytest.mark.parametrize(
    ("name", "values", "down"),
    [
        ("q4_k_s", "5555444444444444", "5544444444444444"),
        ("q4_k_m", "6644644644644666", "6644644644644666"),
        ("q5_k_s", "5555555555555555", "5555555555555555"),
        ("q5_k_m", "6655655655655666", "6655655655655666"),
        ("q6_k", "6666666666666666", "6666666666666666"),
        ("q4_0", "4444444444444444", "4444444444444444"),
    ],
)
def test_values_and_down_get_more_bits_in_some_layers(name: str, values: str, down: str) -> None:
    types = types_of(choice_of(name), model(16))
    assert of_part(types, "attn_v") == values
    assert of_part(types, "ffn_down") == down
    usual = CHOICES[name].type_name[1]
    for part in ("attn_q", "attn_k", "attn_output", "ffn_gate", "ffn_up"):
        assert of_part(types, part) == usual * 16


def test_seventy_billion_give_more_bits_to_values_that_many_heads_share() -> None:
    types = types_of(choice_of("q4_k_m"), model(80), many_heads_share_values=True)
    assert set(of_part(types, "attn_v")) == {"5", "6"}
    assert set(of_part(types, "attn_q")) == {"4"}


@pytest.mark.parametrize("name", CHOICES)
def test_the_head_gets_six_bits_or_more_and_vectors_stay_f32(name: str) -> None:
    choice = choice_of(name)
    types = types_of(choice, model(2))
    is_wide = choice.type_name in ("f32", "f16", "bf16", "q8_0")
    assert types["output.weight"] == (choice.type_name if is_wide else "q6_k")
    assert types["token_embd.weight"] == choice.type_name
    assert types["blk.0.attn_norm.weight"] == "f32"


def test_a_tied_embedding_is_the_head() -> None:
    assert types_of(choice_of("q4_0"), model(2, tied=True))["token_embd.weight"] == "q6_k"


@pytest.mark.parametrize(
    ("name", "cols", "expected"),
    [
        ("q4_k_s", 576, "q5_0"),
        ("q5_k_s", 576, "q5_1"),
        ("q6_k", 576, "q8_0"),
        ("q4_0", 576, "q4_0"),
        ("q4_0", 100, "f16"),
        ("q6_k", 100, "f16"),
        ("q8_0", 100, "f16"),
        ("bf16", 100, "bf16"),
    ],
)
def test_rows_that_are_no_whole_blocks_take_another_type(
    name: str, cols: int, expected: str
) -> None:
    types = types_of(choice_of(name), model(2, dim=cols))
    assert types["blk.1.attn_q.weight"] == expected


def test_tensors_that_are_no_weights_keep_their_types() -> None:
    odd = [
        Candidate("blk.0.order", (4, 32), "i32"),
        Candidate("blk.0.attn_rot", (4, 32), "f16"),
        Candidate("blk.0.attn_q_norm.weight", (4, 32), "f32"),
        Candidate("blk.0.attn_q.bias", (32,), "f16"),
    ]
    types = types_of(choice_of("q4_0"), odd)
    assert types == {
        "blk.0.order": "i32",
        "blk.0.attn_rot": "f16",
        "blk.0.attn_q_norm.weight": "f32",
        "blk.0.attn_q.bias": "f32",
    }


def test_names_are_found_in_any_case_and_by_their_short_form() -> None:
    assert choice_of("Q4_K_M") is CHOICES["q4_k_m"]
    assert {name: choice_of(name).name for name in ALIASES} == dict(ALIASES)
    with pytest.raises(UsageError, match="'q3' is unknown") as refusal:
        choice_of("q3")
    assert "q4_k_m" in refusal.value.remedy


def test_file_types_are_those_of_ggufs_table() -> None:
    """LLAMA_FTYPE_* of llama.h."""
    numbers = {name: choice.file_type for name, choice in CHOICES.items()}
    assert numbers == {
        "f32": 0,
        "f16": 1,
        "q4_0": 2,
        "q4_1": 3,
        "q8_0": 7,
        "q5_0": 8,
        "q5_1": 9,
        "q4_k_s": 14,
        "q4_k_m": 15,
        "q5_k_s": 16,
        "q5_k_m": 17,
        "q6_k": 18,
        "bf16": 32,
    }
