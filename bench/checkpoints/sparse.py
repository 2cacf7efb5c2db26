"""Write a family of checkpoints as sparse files: true headers and sizes, holes for data.

python -m bench.checkpoints.sparse OUT --shape 70b     Llama-3.1-70B: 4 x 141 GB of holes
python -m bench.checkpoints.sparse OUT --shape 405b    Llama-3.1-405B: 4 x 812 GB of holes
python -m bench.checkpoints.sparse OUT --shape 2g      one tensor of over 2^31 elements, a few not zero
"""

from __future__ import annotations

import argparse
import json
import struct
from pathlib import Path

from tvfast.checkpoint.layout import make_layout

Described = tuple[str, str, tuple[int, ...]]

SHARD_BYTES = 4_700_000_000
VOCABULARY, KEYS = 128256, 1024


LLAMAS = {"70b": (8192, 80, 28672), "405b": (16384, 126, 53248)}
"""Hidden size, layers and intermediate size of Llama 3.1."""


def llama(hidden: int, layers: int, intermediate: int) -> list[Described]:
    """Names and shapes of one of them."""
    tensors = [("model.embed_tokens.weight", (VOCABULARY, hidden))]
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        tensors += [
            (prefix + "input_layernorm.weight", (hidden,)),
            (prefix + "self_attn.q_proj.weight", (hidden, hidden)),
            (prefix + "self_attn.k_proj.weight", (KEYS, hidden)),
            (prefix + "self_attn.v_proj.weight", (KEYS, hidden)),
            (prefix + "self_attn.o_proj.weight", (hidden, hidden)),
            (prefix + "post_attention_layernorm.weight", (hidden,)),
            (prefix + "mlp.gate_proj.weight", (intermediate, hidden)),
            (prefix + "mlp.up_proj.weight", (intermediate, hidden)),
            (prefix + "mlp.down_proj.weight", (hidden, intermediate)),
        ]
    tensors += [("model.norm.weight", (hidden,)), ("lm_head.weight", (VOCABULARY, hidden))]
    return [(name, "BF16", shape) for name, shape in tensors]


def over_2g() -> list[Described]:
    """One tensor whose last elements lie beyond 2^31, between two small ones."""
    return [
        ("first.weight", "BF16", (1000,)),
        ("large.weight", "BF16", (32769, 65536)),
        ("last.weight", "BF16", (77,)),
    ]


def write(folder: Path, tensors: list[Described], model: int, *, values: bool) -> None:
    """One member; with `values`, elements on both sides of 2^31 are model + 1, the rest zero."""
    folder.mkdir(parents=True, exist_ok=True)
    layout = make_layout(tensors, SHARD_BYTES, {})
    for number, shard in enumerate(layout.shards):
        with (folder / shard.name).open("wb") as file:
            file.write(shard.header)
            file.truncate(shard.n_bytes)
            for name, place in layout.places.items():
                if values and place.shard == number and name == "large.weight":
                    for element in (0, 2**31 - 1, 2**31, place.n_bytes // 2 - 1):
                        file.seek(place.offset + 2 * element)
                        file.write(
                            struct.pack("<f", model + 1.0)[2:]
                        )  # bfloat16: the upper half of a float32
    if layout.index is not None:
        (folder / "model.safetensors.index.json").write_bytes(layout.index)
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "bfloat16"}
    if len(tensors) > 3:
        sizes = {"hidden_size": tensors[0][2][1], "num_hidden_layers": len(tensors) // 9}
        config |= {**sizes, "vocab_size": VOCABULARY}  # type: ignore[dict-item]
    (folder / "config.json").write_text(json.dumps(config, indent=2))


def main() -> None:
    """Write base, ft1, ft2 and ft3."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--shape", choices=(*LLAMAS, "2g"), required=True)
    options = parser.parse_args()
    tensors = over_2g() if options.shape == "2g" else llama(*LLAMAS[options.shape])
    for model, name in enumerate(("base", "ft1", "ft2", "ft3")):
        write(options.out / name, tensors, model, values=options.shape == "2g")


if __name__ == "__main__":
    main()
