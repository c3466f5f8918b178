"""What a LoRA adapter of PEFT changes: adapter_config.json and adapter_model.safetensors, checked.

An adapter's change of a matrix is (alpha / r) * B @ A (arXiv:2106.09685, section 4.1), with rank
stabilization (alpha / sqrt(r)) * B @ A (arXiv:2312.03732); modules that were trained whole are
replaced. What PEFT knows besides is refused by name. Merging is potluck/convert/lora.py's.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from potluck.convert.hugging_face_names import gguf_name
from potluck.convert.hugging_face_weights import (
    ADAPTER_FILES,
    FLOAT_TYPES,
    StoredWeights,
    open_weights,
)
from potluck.convert.json_file import JsonObject, read_json
from potluck.cursor import shown
from potluck.tensor_source import TensorSource

_RANK_LIMIT = 4096

# Beginnings that leave the base model's weights as they are. Others (pissa, olora, corda, loftq,
# lora_ga ...) train against changed ones, so adding their B @ A to the originals is wrong.
_PLAIN_BEGINNINGS = (True, False, "gaussian", "orthogonal", "eva")

_PREFIX = "base_model.model."
_PART = re.compile(r"(.+)\.lora_([AB])(?:\.default)?\.weight")
_SAVED = re.compile(r"(.+?)(?:\.modules_to_save(?:\.default)?)?\.weight")


@dataclass(frozen=True, slots=True)
class LowRank:
    """A change of a matrix [rows, cols]: scale * up @ down."""

    down: TensorSource  # A, [rank, cols]
    up: TensorSource  # B, [rows, rank]
    scale: float


@dataclass(frozen=True, slots=True)
class Adapter:
    """Changes by GGUF's names of tensors; the order of rows is still Hugging Face's."""

    weights: StoredWeights
    changes: Mapping[str, LowRank]
    replacements: Mapping[str, TensorSource]

    @property
    def tensor_names(self) -> set[str]:
        """What it changes or replaces."""
        return self.changes.keys() | self.replacements.keys()


def open_adapter(folder: Path) -> Adapter:
    """The adapter in `folder`. Raises ModelError: not there, damaged, of a kind not supported."""
    json = read_json(folder / "adapter_config.json")
    rank, scale = _rank_and_scale(json)
    weights = open_weights(folder, ADAPTER_FILES)
    parts: dict[str, dict[str, TensorSource]] = {}
    replacements: dict[str, TensorSource] = {}
    for tensor in weights.tensors.values():
        _check_type(weights, tensor)
        plain = tensor.name.removeprefix(_PREFIX)
        if found := _PART.fullmatch(plain):
            name, which = _gguf_name(weights, tensor, found[1]), found[2]
            _add(weights, parts.setdefault(name, {}), which, tensor)
        elif plain != tensor.name and (found := _SAVED.fullmatch(plain)):
            _add(weights, replacements, _gguf_name(weights, tensor, found[1]), tensor)
        else:
            raise weights.error(f"tensor {shown(tensor.name)} is no part of a LoRA adapter")
    if not parts and not replacements:
        raise weights.error("an adapter that changes nothing")
    if both := parts.keys() & replacements.keys():
        raise weights.error(f"{min(both)} is changed and replaced")
    changes = {name: _low_rank(weights, p, rank, scale) for name, p in parts.items()}
    return Adapter(weights, changes, replacements)


def _rank_and_scale(json: JsonObject) -> tuple[int, float]:
    """The rank r and alpha / r, or alpha / sqrt(r), once nothing else is asked for."""
    if (kind := json.text("peft_type") or "").upper() != "LORA":
        raise json.error(f"peft_type {shown(kind)} is not supported (LORA)")
    for key in ("use_dora", "fan_in_fan_out", "lora_bias", "use_qalora", "use_bdlora"):
        if json.flag(key):
            raise json.error(f"{key} is not supported")
    if (bias := json.text("bias") or "none") != "none":
        raise json.error(f"bias {shown(bias)} is not supported (none)")
    for key in ("rank_pattern", "alpha_pattern", "layer_replication", "target_parameters"):
        if json.values.get(key):
            raise json.error(f"{key} is not supported")
    beginning = json.values.get("init_lora_weights", True)
    if beginning is not None and beginning not in _PLAIN_BEGINNINGS:
        was = shown(beginning) if isinstance(beginning, str) else "of another kind"
        raise json.error(
            f"init_lora_weights {was}: trained against changed weights of the base model",
            remedy="save it with PEFT's path_initial_model_for_weight_conversion",
        )
    rank = json.whole("r", 1, _RANK_LIMIT)
    alpha = json.number("lora_alpha", 0, 1e6)
    over = math.sqrt(rank) if json.flag("use_rslora") else rank
    return rank, alpha / over


def _check_type(weights: StoredWeights, tensor: TensorSource) -> None:
    if tensor.type_name not in FLOAT_TYPES or len(tensor.shape) not in (1, 2) or 0 in tensor.shape:
        found = f"{tensor.type_name} of shape {list(tensor.shape)} is not supported"
        raise weights.error(f"{shown(tensor.name)}: {found}")


def _gguf_name(weights: StoredWeights, tensor: TensorSource, module: str) -> str:
    name = gguf_name(f"{module}.weight")
    if name is None:
        raise weights.error(f"tensor {shown(tensor.name)} changes no part of a model that is known")
    return name


def _add(
    weights: StoredWeights, found: dict[str, TensorSource], name: str, tensor: TensorSource
) -> None:
    if name in found:
        both = f"{shown(found[name].name)} and {shown(tensor.name)}"
        raise weights.error(f"{both} are the same tensor")
    found[name] = tensor


def _low_rank(
    weights: StoredWeights, parts: Mapping[str, TensorSource], rank: int, scale: float
) -> LowRank:
    if len(parts) != 2:
        (found,) = parts.values()
        raise weights.error(f"{shown(found.name)} without its other half")
    down, up = parts["A"], parts["B"]
    for tensor, axis in ((down, 0), (up, 1)):
        if len(tensor.shape) != 2 or tensor.shape[axis] != rank:
            found_shape = f"shape {list(tensor.shape)}, r is {rank} in adapter_config.json"
            raise weights.error(f"{shown(tensor.name)}: {found_shape}")
    return LowRank(down, up, scale)
