"""A family of synthetic Llama checkpoints: a base and fine-tunes of it, the same bytes on every machine.

    python -m bench.checkpoints.family OUT --preset 0.5b --finetunes 3

writes OUT/base, OUT/ft1, OUT/ft2, OUT/ft3: directories that transformers loads, with sharded safetensors
and a byte-level tokenizer. Weights: base ~ N(0, 0.02^2), norms ~ 1 + N(0, 0.05^2); a fine-tune adds
N(0, 0.001^2). Every tensor has its own Philox stream, keyed by (seed, member, CRC-32 of its name): its bytes
depend neither on the shards nor on the other members.
"""

from __future__ import annotations

import argparse
import json
import math
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

CHUNK = 2**22  # elements made at a time
ITEM_BYTES = {"bf16": 2, "f16": 2, "f32": 4}
TORCH_NAMES = {"bf16": "bfloat16", "f16": "float16", "f32": "float32"}
_BASE_STD, _NORM_STD, _DELTA_STD = 0.02, 0.05, 1e-3


@dataclass(frozen=True)
class Architecture:
    """A Llama; `head_dim` is hidden / heads."""

    hidden: int
    layers: int
    inner: int
    vocabulary: int
    heads: int
    kv_heads: int
    tied: bool = False

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Names and shapes, in the order of the files."""
        hidden, inner = self.hidden, self.inner
        kv = self.kv_heads * (hidden // self.heads)
        yield "model.embed_tokens.weight", (self.vocabulary, hidden)
        for layer in range(self.layers):
            prefix = f"model.layers.{layer}."
            yield prefix + "input_layernorm.weight", (hidden,)
            yield prefix + "self_attn.q_proj.weight", (hidden, hidden)
            yield prefix + "self_attn.k_proj.weight", (kv, hidden)
            yield prefix + "self_attn.v_proj.weight", (kv, hidden)
            yield prefix + "self_attn.o_proj.weight", (hidden, hidden)
            yield prefix + "post_attention_layernorm.weight", (hidden,)
            yield prefix + "mlp.gate_proj.weight", (inner, hidden)
            yield prefix + "mlp.up_proj.weight", (inner, hidden)
            yield prefix + "mlp.down_proj.weight", (hidden, inner)
        yield "model.norm.weight", (hidden,)
        if not self.tied:
            yield "lm_head.weight", (self.vocabulary, hidden)


PRESETS = {
    "tiny": Architecture(64, 2, 160, 512, 4, 2),
    "60m": Architecture(512, 8, 1536, 32000, 8, 4),
    "0.5b": Architecture(1024, 24, 4096, 32000, 16, 16),
    "1.2b": Architecture(2048, 16, 8192, 128256, 32, 8, tied=True),  # the shape of Llama 3.2 1B
    "3b": Architecture(3072, 28, 8192, 128256, 24, 8, tied=True),  # the shape of Llama 3.2 3B
    "8b": Architecture(4096, 32, 14336, 128256, 32, 8),  # the shape of Llama 3.1 8B
    # As deep as the models that mergekit's examples name, so narrow that they merge in no time.
    "40-layers": Architecture(64, 40, 160, 512, 4, 2),
    "32-layers": Architecture(64, 32, 160, 512, 4, 2),
    "8-layers": Architecture(64, 8, 160, 512, 4, 2),
}


@dataclass(frozen=True)
class Family:
    """What is written.

    `distinct`: float32, and no two changes of a tensor have the same magnitude, so that no trim meets a tie.
    """

    architecture: Architecture
    finetunes: int = 3
    seed: int = 1234
    dtype: str = "bf16"
    shard_bytes: int = 400_000_000
    distinct: bool = False

    @property
    def members(self) -> tuple[str, ...]:
        return ("base", *(f"ft{k}" for k in range(1, self.finetunes + 1)))

    def chunks(self, name: str, n_elements: int, member: int) -> Iterator[Array]:
        """One tensor of one member (0: the base) in its stored type, flat, in pieces."""
        if self.distinct:
            yield self._distinct(name, n_elements, member)
            return
        base_stream = _stream(self.seed, 0, name, 0)
        delta_stream = _stream(self.seed, member, name, 1)
        for start in range(0, n_elements, CHUNK):
            n = min(CHUNK, n_elements - start)
            stored = _stored(_base_values(base_stream, name, n), self.dtype)
            if member:
                delta = delta_stream.standard_normal(n, dtype=np.float32)
                delta *= np.float32(_DELTA_STD)
                stored = _stored(_values(stored, self.dtype) + delta, self.dtype)
            yield stored

    def _distinct(self, name: str, n_elements: int, member: int) -> Array:
        """Base and change on grids so coarse that their float32 sum, and hence its difference, is exact."""
        base = _base_values(_stream(self.seed, 0, name, 0), name, n_elements).astype(np.float64)
        is_norm = name.endswith("norm.weight")
        grid, step, bound = (2.0**-10, 2.0**-22, 1.5) if is_norm else (2.0**-13, 2.0**-28, 442 * 2.0**-13)
        base = np.clip(np.round(base / grid) * grid, -bound, bound)
        if not member:
            return base.astype(np.float32)
        stream = _stream(self.seed, member, name, 1)
        change = stream.standard_normal(n_elements) * (_DELTA_STD / step)
        order = np.argsort(np.abs(change), kind="stable")
        places = np.arange(n_elements)
        sizes = np.maximum.accumulate(np.round(np.abs(change[order])).astype(np.int64) - places) + places + 1
        if sizes[-1] * step > 2.0**-7:
            raise ValueError(f"{name} has {n_elements} elements: too many for distinct float32 changes")
        magnitudes = np.empty(n_elements)
        magnitudes[order] = sizes * step
        total = base + np.copysign(magnitudes, change)
        member_values: Array = total.astype(np.float32)
        if not np.array_equal(member_values.astype(np.float64), total):
            raise ValueError(f"{name}: base and change do not add exactly in float32")
        return member_values

    def shards(self) -> list[list[tuple[str, tuple[int, ...], int]]]:
        """(name, shape, bytes) of every file."""
        shards: list[list[tuple[str, tuple[int, ...], int]]] = [[]]
        size = 0
        for name, shape in self.architecture.tensors():
            n_bytes = math.prod(shape) * ITEM_BYTES[self.dtype]
            if shards[-1] and size + n_bytes > self.shard_bytes:
                shards.append([])
                size = 0
            shards[-1].append((name, shape, n_bytes))
            size += n_bytes
        return shards

    def write(self, root: Path) -> None:
        """All members, and family.json, which says what they are."""
        root.mkdir(parents=True, exist_ok=True)
        for place, member in enumerate(self.members):
            self.write_member(root / member, place)
        (root / "family.json").write_text(json.dumps(self.record(), indent=2))

    def write_member(self, folder: Path, member: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        shards = self.shards()
        weight_map: dict[str, str] = {}
        for place, shard in enumerate(shards):
            file_name = f"model-{place + 1:05d}-of-{len(shards):05d}.safetensors"
            header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
            offset = 0
            for name, shape, n_bytes in shard:
                header[name] = {
                    "dtype": self.dtype.upper(),
                    "shape": list(shape),
                    "data_offsets": [offset, offset + n_bytes],
                }
                offset += n_bytes
                weight_map[name] = file_name
            text = json.dumps(header, separators=(",", ":")).encode()
            text += b" " * (-len(text) % 8)
            with (folder / file_name).open("wb") as file:
                file.write(len(text).to_bytes(8, "little") + text)
                for name, shape, _ in shard:
                    for chunk in self.chunks(name, math.prod(shape), member):
                        file.write(memoryview(chunk).cast("B"))
        total = sum(n_bytes for shard in shards for _, _, n_bytes in shard)
        _write_json(
            folder / "model.safetensors.index.json",
            {"metadata": {"total_size": total}, "weight_map": weight_map},
        )
        # Where members are told apart, an output shows whose files were copied.
        n_positions = 4096 + (member if self.distinct else 0)
        _write_json(folder / "config.json", self.config(n_positions))
        _write_json(
            folder / "generation_config.json", {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
        )
        _write_tokenizer(folder, self.architecture.vocabulary, n_positions)

    def config(self, n_positions: int = 4096) -> dict[str, Any]:
        """config.json as transformers reads it."""
        shape = self.architecture
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": shape.hidden,
            "num_hidden_layers": shape.layers,
            "intermediate_size": shape.inner,
            "vocab_size": shape.vocabulary,
            "num_attention_heads": shape.heads,
            "num_key_value_heads": shape.kv_heads,
            "head_dim": shape.hidden // shape.heads,
            "max_position_embeddings": n_positions,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            "attention_dropout": 0.0,
            "initializer_range": _BASE_STD,
            "tie_word_embeddings": shape.tied,
            "bos_token_id": 0,
            "eos_token_id": 1,
            "pad_token_id": 2,
            "use_cache": True,
            "torch_dtype": TORCH_NAMES[self.dtype],
        }

    def record(self) -> dict[str, Any]:
        """family.json."""
        n_parameters = sum(math.prod(shape) for _, shape in self.architecture.tensors())
        return {
            **vars(self.architecture),
            "finetunes": self.finetunes,
            "seed": self.seed,
            "dtype": self.dtype,
            "distinct": self.distinct,
            "shard_bytes": self.shard_bytes,
            "parameters": n_parameters,
        }


def _stream(seed: int, member: int, name: str, salt: int) -> np.random.Generator:
    key = (seed & 0xFFFFFFFF) | (member << 32) | (salt << 48) | (zlib.crc32(name.encode()) << 64)
    return np.random.Generator(np.random.Philox(key=key))


def _base_values(stream: np.random.Generator, name: str, n_elements: int) -> Array:
    values = stream.standard_normal(n_elements, dtype=np.float32)
    if name.endswith("norm.weight"):
        values *= np.float32(_NORM_STD)
        values += np.float32(1)
    else:
        values *= np.float32(_BASE_STD)
    return values


def _stored(values: Array, dtype: str) -> Array:
    """float32 values in their stored type, rounded to nearest even; bfloat16 as its bits."""
    if dtype == "bf16":
        bits = values.view(np.uint32)
        rounded: Array = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
        return rounded
    return values.astype(np.float16) if dtype == "f16" else values


def _values(stored: Array, dtype: str) -> Array:
    if dtype == "bf16":
        return (stored.astype(np.uint32) << 16).view(np.float32)
    return stored.astype(np.float32)


def _write_json(path: Path, what: Any) -> None:
    path.write_text(json.dumps(what, indent=2))


def _write_tokenizer(folder: Path, n_tokens: int, n_positions: int) -> None:
    """256 bytes, three special tokens, fillers up to the vocabulary's size; no merges."""
    plain = {*range(33, 127), *range(161, 173), *range(174, 256)}
    special = ["<s>", "</s>", "<pad>"]
    vocabulary = {token: place for place, token in enumerate(special)}
    n_moved = 0
    for byte in range(256):  # the table by which byte-level BPE prints bytes
        character = chr(byte) if byte in plain else chr(256 + n_moved)
        n_moved += byte not in plain
        vocabulary[character] = len(vocabulary)
    while len(vocabulary) < n_tokens:
        vocabulary[f"filler{len(vocabulary)}"] = len(vocabulary)
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
        "vocab": vocabulary,
        "merges": [],
    }
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": place, "content": token, **flags} for place, token in enumerate(special)],
        "normalizer": None,
        "pre_tokenizer": level,
        "post_processor": None,
        "decoder": level,
        "model": model,
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False), encoding="utf-8")
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    _write_json(folder / "special_tokens_map.json", names)
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": n_positions,
            "clean_up_tokenization_spaces": False,
            **names,
        },
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="bench.checkpoints.family", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--preset", choices=PRESETS, default="0.5b")
    parser.add_argument("--finetunes", type=int, default=3)
    parser.add_argument("--seed", type=int, default=1234)
    parser.add_argument("--dtype", choices=ITEM_BYTES, default="bf16")
    parser.add_argument("--shard-bytes", type=int, default=400_000_000)
    parser.add_argument(
        "--distinct", action="store_true", help="float32 without equal magnitudes; small presets"
    )
    options = parser.parse_args(arguments)
    family = Family(
        PRESETS[options.preset], options.finetunes, options.seed, options.dtype, options.shard_bytes
    )
    if options.distinct:
        family = replace(family, dtype="f32", distinct=True)
    family.write(options.out)
    print(
        f"{options.out}: {', '.join(family.members)}, {family.record()['parameters'] / 1e6:.1f} M parameters"
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
