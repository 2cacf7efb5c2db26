"""Where each recipe in recipes/ has its structure from, and the families it is run on.

A recipe keeps method, keys, gradients, filters, layer ranges and numbers of its source; the models that the
source names are mapped to members of a generated family, whose depth fits the layer ranges.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).parent / "recipes"
REPOSITORY = "arcee-ai/mergekit"

RANDOM = ("dare_linear", "dare_ties", "della", "della_linear")
_METHODS_PAGE = ("docs/merge_methods.md", "16379603a42e546142afa116be91be125cd3519b")
_MULTI_PAGE = ("docs/multimerge.md", "e91e23056263e7cc7076fadc235056448d12057b")
_RAM = ("mergekit/merge_methods/ram.py", "release 0.1.5")
_README = ("README.md", "release 0.1.5")
_13B = "13B models -> ft1, ft2, ft3, base with the same 40 layers, width 64"
_7B = "7B models -> ft1, ft2, ft3, base with the same 32 layers, width 64"
_OPTION = "the page gives no whole recipe: its parameters on ft1, ft2, ft3"


@dataclass(frozen=True)
class Source:
    """One recipe: its file here, the file it follows, and what was mapped.

    `preset` names a family of bench/checkpoints/family.py: its depth fits the recipe's layer ranges.
    `computed`: the type that mergekit computes in. `portable`: its output is the same on every processor.
    """

    name: str
    path: str
    commit: str
    mapped: str
    preset: str = "8-layers"
    computed: str = "float32"
    portable: bool = True

    @property
    def file(self) -> Path:
        return FOLDER / f"{self.name}.yml"


SOURCES = (
    Source("linear", "examples/linear.yml", "bc62b546e2bbb0cf92b4a895def48c45cc1c1e44", _13B, "40-layers"),
    Source(
        "gradient-slerp",
        "examples/gradient-slerp.yml",
        "bc62b546e2bbb0cf92b4a895def48c45cc1c1e44",
        _13B + "; also the first document of examples/mega.yml",
        "40-layers",
    ),
    Source(
        "gradient-slerp-models",
        "examples/gradient-slerp.yml",
        "bc62b546e2bbb0cf92b4a895def48c45cc1c1e44",
        _13B + "; the form with `models` that its comment gives",
        "40-layers",
    ),
    Source(
        "orcamini-platy-44layer",
        "examples/orcamini-platy-44layer.yml",
        "4643a472fb305d3670497f2546503f2725318444",
        _13B,
        "40-layers",
    ),
    Source(
        "gpt2-small",
        "examples/gpt2-small.yml",
        "cf9e0d71f94978f152823e4afd78d00eb029085b",
        "GPT-2 with 12 layers -> a Llama of 32 layers, of which 8 are kept",
        "32-layers",
    ),
    Source("ties", "examples/ties.yml", "a9e23f0d35e861d47b99720f4771090e81839eb3", _13B, "40-layers"),
    Source(
        "mega-2",
        "examples/mega.yml",
        "b9861081377d02088634dbc7f5e7a97f6676f511",
        _13B + "; second document, the first one's output -> ft1",
        "40-layers",
    ),
    Source(
        "bio-merge", "examples/bio-merge.yml", "7ee1c40305080932438e1cfc9d42274ac6906a89", _7B, "32-layers"
    ),
    Source("multimerge-1", *_MULTI_PAGE, _7B + "; first stage", "32-layers"),
    Source("multimerge-2", *_MULTI_PAGE, _7B + "; second stage, the first one's output -> ft1", "32-layers"),
    Source("multimerge-3", *_MULTI_PAGE, _7B + "; last stage, the second one's output -> ft1", "32-layers"),
    Source(
        "custom-average",
        "docs/create_a_merge_method.md",
        "05d8a25e2485a87ddd732813d783ac8a62de3540",
        "the page's own average -> linear, which computes the same",
    ),
    Source("linear-sum", *_METHODS_PAGE, _OPTION),
    Source("task-arithmetic", *_METHODS_PAGE, _OPTION),
    Source("ties-lambda", *_METHODS_PAGE, _OPTION),
    Source("dare-linear", *_METHODS_PAGE, _OPTION),
    Source("dare-ties", *_METHODS_PAGE, _OPTION),
    Source("della", *_METHODS_PAGE, _OPTION),
    Source("della-linear", *_METHODS_PAGE, _OPTION),
    Source("breadcrumbs", *_METHODS_PAGE, "density and gamma of the page's example, on ft1, ft2, ft3"),
    Source("breadcrumbs-edge", *_METHODS_PAGE, "the edge case that the page describes, on ft1, ft2, ft3"),
    Source("breadcrumbs-ties", *_METHODS_PAGE, _OPTION),
    Source("sce", *_METHODS_PAGE, _OPTION),
    Source("nuslerp", *_METHODS_PAGE, "without a base: slerp of the models, on ft1, ft2"),
    Source("nuslerp-task-vectors", *_METHODS_PAGE, "with a base: slerp of task vectors, on ft1, ft2"),
    Source("nuslerp-rows", *_METHODS_PAGE, "its two flags, on ft1, ft2"),
    Source("multislerp", *_METHODS_PAGE, _OPTION),
    Source("multislerp-task-vectors", *_METHODS_PAGE, "with a base, on ft1, ft2, ft3"),
    Source("karcher", *_METHODS_PAGE, _OPTION),
    Source("model-stock", *_METHODS_PAGE, _OPTION),
    Source("model-stock-filter-wise", *_METHODS_PAGE, "its flag, on ft1, ft2"),
    Source("nearswap", *_METHODS_PAGE, "on ft1, t of the size of its changes"),
    Source(  # of tensors over a million entries mergekit draws a sample
        "arcee-fusion",
        "examples/arcee_fusion.yml",
        "86c30b6f2c67270ec97f514740d8ff214d2a46c6",
        "on ft1, 32 layers of width 64; mergekit with `dtype: float64`",
        "32-layers",
        computed="float64",
    ),
    Source(  # a choice by the roundings of float32 sums
        "arcee-fusion-float32",
        "examples/arcee_fusion.yml",
        "86c30b6f2c67270ec97f514740d8ff214d2a46c6",
        "on ft1, 32 layers of width 64; ours with `tvfast: {dialect: mergekit_float32}`",
        "32-layers",
        portable=False,
    ),
    Source("ram", *_RAM, "no page has a recipe: its parameters on ft1, ft2, ft3"),
    Source("ramplus-tl", *_RAM, "no page has a recipe: its parameters on ft1, ft2"),
    Source("passthrough-scale", *_METHODS_PAGE, "the page's filter, on ft1"),
    Source("readme-precedence", *_README, "the levels of its section on parameters, on 8 layers"),
    Source("readme-tokenizer-source", *_README, "the legacy key, on ft1, ft2"),
    Source("readme-tokenizer-base", *_README, "the present key, on base, ft1, ft2"),
    Source(
        "evolve-granularity",
        "docs/evolve.md",
        "cb56b743a918834ef43bd55dc57b16d3a953999f",
        "a member of the population that layer_granularity 8 makes of 32 layers",
        "32-layers",
    ),
)
