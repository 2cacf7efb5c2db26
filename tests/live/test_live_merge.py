"""`LiveMerge`: the bits of `merge` at every `set`, the bits of the base at the end."""

from __future__ import annotations

import gc
import re
import tracemalloc
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import tvfast
from tests.methods.inputs import grid, normal
from tests.strategies import bits
from tvfast.errors import ArgumentError, DTypeError, LayoutError, ShapeError, StateDictError, UnknownNameError
from tvfast.methods import METHODS, ProgramMethod

WEIGHTED = sorted(
    name
    for name, info in METHODS.items()
    if "weights" in [p.name for p in info.parameters]
    and issubclass(info.cls, ProgramMethod)
    and not info.needs_instruct
)
PARAMETERS: dict[str, dict[str, Any]] = {
    "ties": {"density": 0.4},
    "dare_ties": {"density": 0.5},
    "dare_linear": {"density": 0.5},
    "della": {"density": 0.5},
    "della_linear": {"density": 0.5},
    "breadcrumbs": {"density": 0.7, "gamma": 0.1},
    "breadcrumbs_ties": {"density": 0.7, "gamma": 0.1},
    "sce": {"select_topk": 0.5},
    "sta": {"density": 0.4},
    "sta_forget": {"density": 0.4},
}
SHAPES = {"layers.0.up": (5, 33), "layers.0.norm": (7,), "layers.1.up": (5, 33), "head": (64,), "empty": (0,)}


def state(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    found = {name: grid(*shape, seed=seed + i).to(dtype) for i, (name, shape) in enumerate(SHAPES.items())}
    return {**found, "steps": torch.arange(3)}


def with_noise(base: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    return {
        name: t + (0.1 * normal(*t.shape, seed=seed + i)).to(t.dtype) if t.is_floating_point() else t.clone()
        for i, (name, t) in enumerate(base.items())
    }


def differences(models: Sequence[dict[str, Tensor]], base: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    return [
        {n: t.float() - base[n].float() if t.is_floating_point() else t for n, t in model.items()}
        for model in models
    ]


def assert_equal_bits(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        left, right = (bits(t) if t.is_floating_point() else t for t in (found[name], tensor))
        assert torch.equal(left, right), name


def copied(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in weights.items()}


@pytest.mark.parametrize(
    ("name", "dialect"), [(name, dialect) for name in WEIGHTED for dialect in METHODS[name].dialects]
)
def test_set_gives_the_bits_of_merge(name: str, dialect: str) -> None:
    info = METHODS[name]
    n = info.n_models[1] or 3
    base = state(0)
    models = [with_noise(base, 50 * (k + 1)) for k in range(n)]
    parameters = {**PARAMETERS.get(name, {}), "dialect": dialect, "seed": 3}
    if info.needs_scores:
        parameters["scores"] = [
            {n: t.abs().float() for n, t in with_noise(base, 7 * (k + 1)).items() if n != "steps"}
            for k in range(n)
        ]
    live = copied(base)
    with tvfast.LiveMerge(live, models=models, method=name, **parameters) as merging:
        for weights, scale in (([0.3, 0.9, 0.4], 1.0), ([1.0, 0.5, 0.25], -0.7), ([0.3, 0.9, 0.4], 1.0)):
            merging.set(weights[:n], scale=scale)
            expected = tvfast.merge(base, models, name, weights=weights[:n], scale=scale, **parameters)
            assert_equal_bits(live, expected)
    assert_equal_bits(live, base)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("n_tasks", [1, 4, 5, 8, 16, 17])
def test_task_vectors_stored_in_float32_give_the_bits_of_the_models(dtype: torch.dtype, n_tasks: int) -> None:
    base = state(0, dtype)
    models = [with_noise(base, 50 * (k + 1)) for k in range(n_tasks)]
    deltas = differences(models, base)
    if dtype == torch.float64:
        deltas = [{n: t - base[n] if t.is_floating_point() else t for n, t in m.items()} for m in models]
    weights = [0.3 - 0.1 * k for k in range(n_tasks)]
    for method in ("task_arithmetic", "ties"):
        live = copied(base)
        with tvfast.LiveMerge(live, deltas=deltas, method=method) as merging:
            merging.set(weights)
            assert_equal_bits(live, tvfast.merge(base, models, method, weights=weights))
        assert_equal_bits(live, base)


@settings(max_examples=15)
@given(weights=st.lists(st.floats(-2, 2, width=32), min_size=6, max_size=6), as_tensor=st.booleans())
def test_a_coefficient_per_task_and_group(weights: list[float], as_tensor: bool) -> None:
    base = state(0)
    models = [with_noise(base, 50), with_noise(base, 100)]
    table = [weights[:3], weights[3:]]
    live = copied(base)
    with tvfast.LiveMerge(live, deltas=differences(models, base)) as merging:
        assert merging.groups == ("layers.0", "layers.1", "head", "empty")[: len(merging.groups)]
        padded = [[*row, *[0.0] * (len(merging.groups) - 3)] for row in table]
        merging.set(torch.tensor(padded) if as_tensor else padded)
        for group, name in enumerate(merging.groups[:3]):
            own = {n: t for n, t in base.items() if n.startswith(name)}
            expected = tvfast.merge(
                own,
                [{n: m[n] for n in own} for m in models],
                "task_arithmetic",
                weights=[row[group] for row in table],
            )
            assert_equal_bits({n: live[n] for n in own}, expected)
        first = copied(live)
        columns = {name: [row[g] for row in padded] for g, name in enumerate(merging.groups)}
        merging.set(columns)
        assert_equal_bits(live, first)


def test_groupings() -> None:
    live, deltas = state(0), [state(1)]
    assert tvfast.LiveMerge(live, deltas=deltas, by="tensor").groups == tuple(SHAPES)
    found = tvfast.LiveMerge(live, deltas=deltas, by=lambda name: name.rsplit(".")[-1]).groups
    assert found == ("up", "norm", "head", "empty")


def test_leaving_restores_also_after_an_error_and_keep_does_not() -> None:
    base = torch.tensor([1.0, -0.0, float("nan"), float("inf"), 2.0**-149])
    base.view(torch.int32)[2] = 0x7FC00123
    delta = torch.ones(5)
    live = base.clone()

    def fail() -> None:
        with tvfast.LiveMerge(live, deltas=[delta]) as merging:
            merging.set([2.0])
            assert live[0] == 3.0
            raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        fail()
    assert torch.equal(bits(live), bits(base))
    with tvfast.LiveMerge(live, deltas=[delta]) as merging:
        merging.set(0.5)
        assert merging.coefficients == 0.5
        merging.restore()
        assert merging.coefficients is None
        assert torch.equal(bits(live), bits(base))
        merging.set([0.5])
        merging.keep()
        with pytest.raises(ArgumentError, match="made the weights permanent"):
            merging.set([1.0])
    assert live[0] == 1.5
    with pytest.raises(ArgumentError, match="with block has ended"):
        merging.set([1.0])


def test_a_base_of_the_callers_is_read_and_not_copied() -> None:
    base, live, delta = torch.full((8,), 2.0), torch.zeros(8), torch.ones(8)
    with tvfast.LiveMerge(live, base=base, deltas=[delta]) as merging:
        merging.set([0.5])
        assert live.tolist() == [2.5] * 8
    assert live.tolist() == base.tolist() == [2.0] * 8


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.layers = nn.ModuleList([nn.Linear(6, 6) for _ in range(3)])
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("count", torch.zeros(1, dtype=torch.long))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return self.head(x)


def small_task(model: Small, seed: int) -> dict[str, Tensor]:
    base = {name: t.detach() for name, t in model.state_dict().items()}
    task = {
        name: 0.3 * normal(*t.shape, seed=seed + i) if t.is_floating_point() else t.clone()
        for i, (name, t) in enumerate(base.items())
    }
    task["head.weight"] = task["embed.weight"]
    return task


def loss_of(model: Small) -> Tensor:
    tokens = torch.arange(11)
    return nn.functional.cross_entropy(model(tokens), (tokens + 1) % 11)


METHODS_WITH_GRADIENTS: list[tuple[str, dict[str, Any]]] = [
    ("task_arithmetic", {}),
    ("task_arithmetic", {"normalize": True}),
    ("breadcrumbs", {"density": 0.6, "gamma": 0.1}),
    ("dare_linear", {"density": 0.5, "seed": 1}),
    ("della_linear", {"density": 0.5, "seed": 1}),
]


@pytest.mark.parametrize(("method", "parameters"), METHODS_WITH_GRADIENTS, ids=str)
@pytest.mark.parametrize("per_layer", [False, True])
def test_gradient_equals_autograd(method: str, parameters: dict[str, Any], per_layer: bool) -> None:
    """θ as a function of w in float64 torch: base + Σ w_k (θ(e_k) - θ₀), or its mean, by autograd."""
    model = Small()
    tasks = [small_task(model, 10 * k) for k in range(3)]
    with tvfast.LiveMerge(model, deltas=tasks, method=method, scale=0.8, **parameters) as live:
        n_groups = len(live.groups)
        values = 0.2 + 0.1 * torch.rand(3, n_groups) if per_layer else torch.tensor([0.2, 0.4, 0.3])
        w = nn.Parameter(values)
        kept = []  # kept and rescaled task vectors, from merges with a single weight
        plain = {k: v for k, v in parameters.items() if k != "normalize"}
        zero = {n: torch.zeros_like(t) for n, t in tasks[0].items()}
        for k in range(3):
            unit = [float(j == k) for j in range(3)]
            kept.append(tvfast.merge(zero, tasks, method, weights=unit, **plain))
        live.set(w)
        model.zero_grad()
        loss_of(model).backward()
        found = live.gradient()
        assert found.shape == w.shape
        assert found.dtype == w.dtype

        twin = Small().double()
        exact = w.detach().double().requires_grad_()
        columns = exact if per_layer else exact[:, None].expand(3, n_groups)
        group = {"embed": live.groups.index("embed"), "head": live.groups.index("embed")}
        group |= {f"layers.{i}": live.groups.index(f"layers.{i}") for i in range(3)}
        live.restore()
        named = {}
        for name, start in model.named_parameters():
            own = columns[:, group[name.rsplit(".", 1)[0]]]
            total = sum(own[k] * kept[k][name].double() for k in range(3))
            divisor = own.sum() if parameters.get("normalize") else 1.0
            named[name] = start.detach().double() + 0.8 * total / divisor
        named["head.weight"] = named["embed.weight"]
        tokens = torch.arange(11)
        logits = torch.func.functional_call(twin, named, (tokens,))
        nn.functional.cross_entropy(logits, (tokens + 1) % 11).backward()
        assert exact.grad is not None
        assert (found.double() - exact.grad).abs().max() <= 1e-5 * exact.grad.abs().max()


def test_gradients_can_be_given_and_do_not_depend_on_threads() -> None:
    base, tasks = state(0), [state(1), state(2)]
    grads = {
        n: normal(*t.shape, seed=5 + i) for i, (n, t) in enumerate(base.items()) if t.is_floating_point()
    }
    del grads["head"]
    results = []
    for n_threads in (1, 2):
        live = tvfast.LiveMerge(copied(base), deltas=tasks, n_threads=n_threads)
        live.set({name: [0.5, 0.25] for name in live.groups})
        results.append(live.gradient(grads))
    assert results[0]["head"].tolist() == [0.0, 0.0]
    for name in results[0]:
        assert torch.equal(results[0][name], results[1][name])
    expected = [sum(float((grads[n].double() * t[n].double()).sum()) for n in grads) for t in tasks]
    live.set([0.5, 0.25])
    assert live.gradient(grads).tolist() == pytest.approx(expected, rel=1e-12)
    turned = {"layers.0.up": grads["layers.0.up"].t().contiguous().t()}
    assert torch.equal(live.gradient(turned), live.gradient({"layers.0.up": grads["layers.0.up"]}))


class Ops(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def test_set_allocates_no_tensors(forced_backend: str) -> None:
    if forced_backend == "reference":
        pytest.skip("the reference is made of torch calls, which allocate")
    n = 2**20
    live, tasks = torch.zeros(n), [torch.ones(n) for _ in range(8)]
    for method in ("task_arithmetic", "ties"):
        with tvfast.LiveMerge(live, deltas=tasks, method=method) as merging:
            merging.set([0.1] * 8)
            gc.collect()
            tracemalloc.start()
            with Ops() as ops:
                merging.set([0.2] * 8)
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
        assert ops.seen == []
        assert peak < 2**16


def test_autograd_sees_the_write() -> None:
    live = nn.Parameter(torch.ones(4))
    merging = tvfast.LiveMerge(live, deltas=[torch.ones(4)])
    squared = (live * live).sum()
    merging.set([1.0])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        squared.backward()


def live_of(**arguments: Any) -> tvfast.LiveMerge:
    given: dict[str, Any] = {"deltas": [torch.ones(4), torch.ones(4)], **arguments}
    return tvfast.LiveMerge(given.pop("model", torch.zeros(4)), **given)


SHARED = torch.zeros(8)

WRONG: list[tuple[dict[str, Any], type[ValueError], str]] = [
    ({"deltas": None}, ArgumentError, "deltas and models: neither given"),
    ({"models": [torch.ones(4)]}, ArgumentError, "deltas and models: both given"),
    ({"deltas": torch.ones(4)}, ArgumentError, "expected a list of models"),
    ({"deltas": []}, ArgumentError, "got 0 models; expected at least 1"),
    ({"weights": [1, 2]}, ArgumentError, r"takes no weights; expected them in set\(\[\.\.\.\]\)"),
    ({"method": "linear"}, ArgumentError, "'linear' merges the models themselves"),
    ({"method": "regmean", "deltas": None, "models": [torch.ones(4)]}, ArgumentError, "no pass"),
    ({"method": "slerp", "deltas": None, "models": [torch.ones(4)]}, ArgumentError, "'slerp' has no weights"),
    ({"method": "lata"}, ArgumentError, "compares with an instruct model, which LiveMerge does not take"),
    ({"method": "tise"}, UnknownNameError, "did you mean 'ties'"),
    ({"by": "layers"}, UnknownNameError, "by is 'layers'; expected 'layer', 'tensor'"),
    ({"by": 3}, ArgumentError, "by is a int"),
    ({"n_threads": -1}, ArgumentError, "n_threads is -1"),
    ({"deltas": [torch.ones(5)]}, ShapeError, r"deltas\[0\] has shape \[5\]"),
    ({"deltas": [{"a": torch.ones(4)}]}, StateDictError, "lacks the tensor 'tensor'"),
    ({"model": SHARED[:4], "deltas": [SHARED[2:6]]}, LayoutError, r"deltas\[0\] overlaps the memory of"),
    ({"model": SHARED[:4], "base": SHARED[:4]}, LayoutError, "base overlaps the memory of"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), WRONG, ids=lambda v: str(v)[:50])
def test_wrong_arguments(arguments: dict[str, Any], error: type[ValueError], message: str) -> None:
    with pytest.raises(error, match=message):
        live_of(**arguments)


WRONG_COEFFICIENTS: list[tuple[Any, str]] = [
    ([0.5], "coefficients has 1 values; expected 2, or one for all"),
    ([0.5, float("nan")], r"coefficients\[1\] is nan; expected a finite number"),
    ([0.5, 1e39], r"coefficients\[1\] is 1e\+39"),
    ("ab", "coefficients.*expected a number"),
    ([[0.5], [0.5], [0.5]], r"have shape \[3, 1\]; expected \[2, 1\]"),
    ([[0.5, 0.5], [0.5, 0.5]], r"have shape \[2, 2\]; expected \[2, 1\]"),
    (torch.zeros(2, 1, 1), r"expected \[2, 1\]"),
    ({"tensor": [0.5]}, "tensor has 1 values; expected 2"),
    ({"other": [0.5, 0.5]}, r"lack the groups \['tensor'\] and have \['other'\]"),
]


@pytest.mark.parametrize(("coefficients", "message"), WRONG_COEFFICIENTS, ids=str)
def test_wrong_coefficients_write_nothing(coefficients: Any, message: str) -> None:
    live = torch.zeros(4)
    merging = live_of(model=live)
    with pytest.raises(ArgumentError, match=message):
        merging.set(coefficients)
    assert live.tolist() == [0.0] * 4


def test_gradients_that_cannot_be_had() -> None:
    merging = live_of()
    with pytest.raises(ArgumentError, match="no coefficients are set"):
        merging.gradient()
    merging.set([1.0, 1.0])
    with pytest.raises(ArgumentError, match=r"no live tensor has a \.grad"):
        merging.gradient()
    with pytest.raises(ShapeError, match=r"grads has shape \[5\]"):
        merging.gradient(torch.ones(5))
    with pytest.raises(DTypeError, match="grads has dtype int64"):
        merging.gradient(torch.ones(4, dtype=torch.int64))
    with pytest.raises(ArgumentError, match="are no live floating-point tensors"):
        merging.gradient({"other": torch.ones(4)})
    with pytest.raises(ArgumentError, match="grads is empty"):
        merging.gradient({})
    for method, why in (("ties", "elects signs"), ("sce", "computes its own numbers")):
        voting = live_of(method=method)
        voting.set([1.0, 1.0])
        with pytest.raises(ArgumentError, match=why):
            voting.gradient(torch.ones(4))


def test_votes_of_the_whole_model_take_no_coefficients_per_group() -> None:
    merging = tvfast.LiveMerge(state(0), deltas=[state(1), state(2)], method="ties", dialect="paper")
    with pytest.raises(ArgumentError, match="elects signs over the whole model"):
        merging.set({name: [1.0, 1.0] for name in merging.groups})


def test_a_scale_that_is_not_finite_writes_nothing() -> None:
    weights = {"a": torch.ones(3)}
    live = tvfast.LiveMerge(weights, deltas=[{"a": torch.ones(3)}])
    for scale in (float("nan"), float("inf"), 1e39):
        with pytest.raises(ArgumentError, match=f"scale is {re.escape(str(scale))}; expected"):
            live.set([0.5], scale=scale)
        assert torch.equal(weights["a"], torch.ones(3))
    live.set([0.5])
    assert torch.equal(weights["a"], torch.full((3,), 1.5))


def test_weights_that_do_not_fit_are_called_what_they_are() -> None:
    x, y = torch.ones(3), torch.ones(4)
    with pytest.raises(ShapeError, match=r"'q': base has shape \[4\], model has \[3\]"):
        tvfast.LiveMerge({"q": x}, deltas=[{"q": x}], base={"q": y})
    with pytest.raises(ShapeError, match=r"'q': deltas\[1\] has shape \[4\], model has \[3\]"):
        tvfast.LiveMerge({"q": x}, deltas=[{"q": x.clone()}, {"q": y}], base={"q": x.clone()})
    with pytest.raises(StateDictError, match=r"models\[0\] lacks the tensor 'q'"):
        tvfast.LiveMerge({"q": x}, models=[{}], method="ties")


def test_leaving_restores_weights_that_moved() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    delta = {name: torch.ones_like(tensor) for name, tensor in before.items()}
    with tvfast.LiveMerge(model, deltas=[delta]) as live:
        live.set(1.0)
        model[1].weight.data = model[1].weight.data.clone()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_weights_that_moved_are_named() -> None:
    module = nn.Linear(3, 3)
    merging = tvfast.LiveMerge(module, deltas=[nn.Linear(3, 3)])
    module.weight.data = module.weight.data.clone()
    with pytest.raises(LayoutError, match=r"tensor 'weight': the live tensor has moved"):
        merging.set([1.0])
