"""Run mergekit on the parity cases and write golden files. Runs in the peer's environment (make_env.sh).

    PEER/bin/python generate_mergekit.py OUT_DIRECTORY

Writes deterministic.npz (every case, the merge methods called on tensors), arcs.npz (slerp's coefficients
on wide arcs), random.npz (moments of the change over many draws) and checkpoint.npz (whole runs of
mergekit-yaml on a tiny Llama). Each holds its inputs, arcs.npz their checksums, and a JSON record of the
peer, its version, the seed and the parameters.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mergekit.merge_methods import registry
from mergekit.merge_methods.base import TensorGroup
from parity_cases import (
    ARCS,
    SEED,
    SLERP_T,
    Array,
    cases,
    make_families,
    random_cases,
    random_inputs,
    wide_arc,
)
from safetensors.numpy import load_file, save_file

WITHOUT_BASE = ("linear", "passthrough")
"""Methods that every case runs without a base."""


def merged(
    method: str,
    arrays: Sequence[Array],
    parameters: dict[str, Any],
    dtype: torch.dtype = torch.float32,
    *,
    base: bool = True,
) -> Any:
    """One call of a registered method; arrays[0] is the base, which some methods do not take."""
    tensors = [torch.from_numpy(x).to(dtype) for x in arrays]
    if method in WITHOUT_BASE or not base:
        group = TensorGroup.from_tensors(tensors[1:])
    else:
        group = TensorGroup.from_tensors(tensors, base_index=0)
    (result,) = registry.get(method)((group,), parameters=parameters)
    return result.numpy()


def record(**more: Any) -> Array:
    """The JSON record of a file, as bytes that np.load reads without pickling."""
    text = json.dumps({"peer": "mergekit", "version": version("mergekit"), "seed": SEED, **more})
    return np.frombuffer(text.encode(), np.uint8)


def certain_angle(family: str, arrays: list[Array]) -> bool:
    """For slerp: whether float32 gives the coefficients that float64 gives, rounded.

    Elsewhere its float32 sums and arc cosine move a coefficient by an ulp, and a result by two.
    """
    if family != "apart":
        return True
    for t in SLERP_T:
        single = merged("slerp", arrays, {"t": t}).flat[:2]
        double = merged("slerp", arrays, {"t": t}, torch.float64).flat[:2]
        if not np.array_equal(single, double.astype(np.float32)):
            return False
    return True


def write_deterministic(path: Path) -> None:
    families = make_families(certain_angle)
    arrays: dict[str, Array] = {}
    for family, tensors in families.items():
        for name, members in tensors.items():
            for place, array in enumerate(members):
                arrays[f"input/{family}/{name}/{place}"] = array
    listed = []
    for case in cases():
        listed.append(vars(case))
        dtype = torch.float64 if case.float64 else torch.float32
        for name, members in families[case.family].items():
            if name in case.shapes:
                operands = members[: case.models + 1]
                out = merged(case.method, operands, case.parameters, dtype, base=case.base)
                arrays[f"output/{case.name}/{name}"] = out
    np.savez_compressed(path, record=record(cases=listed), **arrays)


def write_random(path: Path) -> None:
    inputs = random_inputs()
    arrays: dict[str, Any] = {f"input/{place}": array for place, array in enumerate(inputs)}
    listed = []
    for case in random_cases():
        powers = np.zeros((3, *inputs[0].shape))
        kept = np.zeros(inputs[0].shape, np.int32)
        for draw in range(case.draws):
            torch.manual_seed(SEED + draw)
            out = merged(case.method, inputs[: case.models + 1], case.parameters)
            change = (out - inputs[0]).astype(np.float64)
            powers += [change, change**2, change**4]
            kept += out != inputs[0]
        listed.append(vars(case))
        arrays[f"moments/{case.name}"] = powers / case.draws
        arrays[f"kept/{case.name}"] = kept
    np.savez_compressed(path, record=record(cases=listed), **arrays)


def write_arcs(path: Path) -> None:
    """slerp's two coefficients, as the probes show them: in float64, and in float32 three ways.

    The three ways are one thread, two threads, and one thread with the tensor twice in a batch, which
    mergekit sums in chunks of half the size.
    """
    arrays: dict[str, Any] = {}
    listed = []
    for arc in ARCS:
        pair = wide_arc(arc)
        parameters = {"t": arc.t}
        listed.append({**vars(arc), "crc32": [zlib.crc32(x.tobytes()) for x in pair]})
        arrays[f"float64/{arc.name}"] = merged("slerp", pair, parameters, torch.float64)[:2]
        arrays[f"float32/{arc.name}/one"] = merged("slerp", pair, parameters)[:2]
        torch.set_num_threads(2)
        arrays[f"float32/{arc.name}/two"] = merged("slerp", pair, parameters)[:2]
        torch.set_num_threads(1)
        group = TensorGroup.from_tensors([torch.from_numpy(x) for x in pair], base_index=0)
        twice = registry.get("slerp")((group, group), parameters=parameters)
        arrays[f"float32/{arc.name}/batch"] = twice[0].numpy()[:2]
    np.savez_compressed(path, record=record(arcs=listed), **arrays)


LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 40,
    "tie_word_embeddings": False,
    "dtype": "float32",
}

RECIPES: dict[str, dict[str, Any]] = {
    "ties": {
        "weights": [1.0, 0.5, 0.7],
        "per_model": {"density": [0.2, 0.5, 0.35]},
        "parameters": {"lambda": 0.8, "int8_mask": True},
    },
    "breadcrumbs_ties": {
        "weights": [0.4, 0.3, 0.6],
        "per_model": {"density": [0.6, 0.9, 0.5], "gamma": [0.1, 0.2, 0.0]},
        "parameters": {"normalize": True},
    },
    "sce": {"parameters": {"select_topk": 0.3}},
}


def llama_shapes() -> dict[str, tuple[int, ...]]:
    hidden, inner, vocabulary = (
        int(LLAMA[key]) for key in ("hidden_size", "intermediate_size", "vocab_size")
    )
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for layer in range(int(LLAMA["num_hidden_layers"])):
        prefix = f"model.layers.{layer}."
        shapes |= {
            prefix + "input_layernorm.weight": (hidden,),
            prefix + "self_attn.q_proj.weight": (hidden, hidden),
            prefix + "self_attn.k_proj.weight": (hidden // 2, hidden),
            prefix + "self_attn.v_proj.weight": (hidden // 2, hidden),
            prefix + "self_attn.o_proj.weight": (hidden, hidden),
            prefix + "post_attention_layernorm.weight": (hidden,),
            prefix + "mlp.gate_proj.weight": (inner, hidden),
            prefix + "mlp.up_proj.weight": (inner, hidden),
            prefix + "mlp.down_proj.weight": (hidden, inner),
        }
    return shapes | {"model.norm.weight": (hidden,), "lm_head.weight": (vocabulary, hidden)}


def checkpoint_family() -> dict[str, dict[str, Array]]:
    """base, ft0, ft1, ft2: a tiny Llama and three fine-tunes."""
    rng = np.random.default_rng([SEED, 7])
    family: dict[str, dict[str, Array]] = {"base": {}, "ft0": {}, "ft1": {}, "ft2": {}}
    for name, shape in llama_shapes().items():
        base = rng.normal(1.0 if name.endswith("norm.weight") else 0.0, 0.02, shape).astype(np.float32)
        family["base"][name] = base
        for model in ("ft0", "ft1", "ft2"):
            family[model][name] = (base + rng.normal(0, 5e-4, shape)).astype(np.float32)
    return family


def yaml_text(method: str, recipe: dict[str, Any]) -> str:
    # JSON is YAML.
    models = []
    for place in range(3):
        parameters = {key: values[place] for key, values in recipe.get("per_model", {}).items()}
        if "weights" in recipe:
            parameters["weight"] = recipe["weights"][place]
        models.append({"model": f"ft{place}", "parameters": parameters})
    config = {
        "merge_method": method,
        "base_model": "base",
        "models": models,
        "parameters": recipe["parameters"],
        "dtype": "float32",
    }
    return json.dumps(config)


def write_checkpoint(path: Path) -> None:
    family = checkpoint_family()
    arrays: dict[str, Array] = {}
    for member, tensors in family.items():
        for name, array in tensors.items():
            arrays[f"input/{member}/{name}"] = array
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        for member, tensors in family.items():
            (root / member).mkdir()
            save_file(tensors, root / member / "model.safetensors", metadata={"format": "pt"})
            (root / member / "config.json").write_text(json.dumps(LLAMA))
        for method, recipe in RECIPES.items():
            (root / "config.yaml").write_text(yaml_text(method, recipe))
            out = root / f"out-{method}"
            command = [sys.executable, "-m", "mergekit.scripts.run_yaml", "config.yaml", str(out)]
            options = ["--no-copy-tokenizer", "--no-write-model-card", "--quiet"]
            subprocess.run([*command, *options], cwd=root, check=True)
            tensors = {}
            for shard in sorted(out.glob("*.safetensors")):
                tensors |= load_file(shard)
            if tensors.keys() != family["base"].keys():
                raise RuntimeError(f"{method}: mergekit wrote {sorted(tensors)}")
            for name, array in tensors.items():
                arrays[f"output/{method}/{name}"] = array
    np.savez_compressed(path, record=record(recipes=RECIPES), **arrays)


def main() -> None:
    out = Path(sys.argv[1])
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    write_deterministic(out / "deterministic.npz")
    write_arcs(out / "arcs.npz")
    write_random(out / "random.npz")
    write_checkpoint(out / "checkpoint.npz")


if __name__ == "__main__":
    main()
