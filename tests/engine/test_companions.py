"""The files beside the weights: what is copied, what is written, and what is refused."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import save_file
from torch import ones

from tvfast.engine import companions as module
from tvfast.engine.binding import Binding
from tvfast.engine.companions import DONOR_FILES, TOKENIZER_FILES, card, companions
from tvfast.errors import CheckpointError, RecipeError
from tvfast.methods import method_info
from tvfast.recipe import Recipe, parse_recipe

CONFIG = {"model_type": "llama", "vocab_size": 9, "architectures": ["LlamaForCausalLM"]}
A, B = "{{ messages[0]['content'] }}", "{% for m in messages %}{{ m }}{% endfor %}"


@pytest.fixture
def models(tmp_path: Path) -> dict[str, Path]:
    """Three model directories, each file with content of its own."""
    found = {}
    for name in ("base", "x", "y"):
        folder = tmp_path / name
        folder.mkdir()
        save_file({"w": ones(2)}, folder / "model.safetensors")
        for file in (*TOKENIZER_FILES, *DONOR_FILES):
            if not file.startswith("chat_template"):
                (folder / file).write_text(json.dumps({"of": name, "file": file}))
        found[name] = folder
    return found


def recipe_of(models: dict[str, Path], **keys: Any) -> Recipe:
    found = {
        "merge_method": "ties",
        "base_model": str(models["base"]),
        "models": [{"model": str(models[name]), "parameters": {"weight": 1.0}} for name in ("x", "y")],
        "parameters": {"density": 0.5},
        **keys,
    }
    return parse_recipe("# a comment\n" + yaml.safe_dump(found, sort_keys=False), "config.yaml")


def binding_of(donor: Path, tokenizer: Path | None, config: dict[str, Any] | None = CONFIG) -> Binding:
    return Binding(
        tasks=(),
        config=config,
        donor=str(donor),
        tokenizer=None if tokenizer is None else str(tokenizer),
        warnings=(),
        ties={},
    )


def test_everything_comes_from_where_it_should(models: dict[str, Path]) -> None:
    recipe = recipe_of(models)
    found = companions(recipe, binding_of(models["base"], models["y"]))
    for name in TOKENIZER_FILES:
        if not name.startswith("chat_template"):
            assert found[name] == (models["y"] / name).read_bytes()
    for name in DONOR_FILES:
        assert found[name] == (models["base"] / name).read_bytes()
    assert found["mergekit_config.yml"].decode() == recipe.text
    assert json.loads(found["config.json"]) == CONFIG
    assert list(json.loads(found["config.json"])) == list(CONFIG)
    assert found["config.json"].startswith(b'{\n  "model_type": "llama",\n')
    assert set(found) == {
        *(name for name in TOKENIZER_FILES if not name.startswith("chat_template")),
        *DONOR_FILES,
        *("config.json", "README.md", "mergekit_config.yml"),
    }


def test_equal_inputs_give_equal_bytes(models: dict[str, Path]) -> None:
    recipe = recipe_of(models, chat_template="auto")
    binding = binding_of(models["base"], models["base"])
    (models["x"] / "chat_template.jinja").write_text(A)
    assert companions(recipe, binding) == companions(recipe, binding)


def test_what_the_inputs_lack_is_left_out(models: dict[str, Path]) -> None:
    for folder in models.values():
        for file in folder.iterdir():
            if file.suffix != ".safetensors":
                file.unlink()
    found = companions(recipe_of(models), binding_of(models["base"], None, None))
    assert set(found) == {"README.md", "mergekit_config.yml"}


def test_a_checkpoint_that_is_one_file_has_no_companions(models: dict[str, Path]) -> None:
    file = models["base"] / "model.safetensors"
    found = companions(recipe_of(models), binding_of(file, file, None))
    assert set(found) == {"README.md", "mergekit_config.yml"}


def test_a_model_of_the_local_cache_is_found(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    repository = tmp_path / "cache" / "models--org--name"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("abc123")
    (repository / "snapshots").mkdir()
    models["x"].rename(repository / "snapshots" / "abc123")
    recipe = recipe_of({**models, "x": Path("org/name")})
    found = companions(recipe, binding_of(models["base"], Path("org/name")))
    assert json.loads(found["tokenizer.json"])["of"] == "x"


def test_links_are_followed(models: dict[str, Path], tmp_path: Path) -> None:
    """As in the cache of a hub, whose files are links to blobs."""
    file = models["base"] / "tokenizer.json"
    file.rename(tmp_path / "blob")
    file.symlink_to(tmp_path / "blob")
    found = companions(recipe_of(models), binding_of(models["base"], models["base"]))
    assert found["tokenizer.json"] == (tmp_path / "blob").read_bytes()


def test_a_models_own_code_goes_along(models: dict[str, Path]) -> None:
    (models["base"] / "modeling_own.py").write_text("x = 1\n")
    (models["base"] / "configuration_own.py").write_text("y = 2\n")
    plain = companions(recipe_of(models), binding_of(models["base"], None))
    assert not any(name.endswith(".py") for name in plain)
    own = {**CONFIG, "auto_map": {"AutoModelForCausalLM": "modeling_own.Own"}}
    found = companions(recipe_of(models), binding_of(models["base"], None, own))
    assert found["modeling_own.py"] == b"x = 1\n"
    assert found["configuration_own.py"] == b"y = 2\n"


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (os.mkfifo, "a named pipe"),
        (os.mkdir, "a directory"),
        (lambda path: os.symlink("/dev/zero", path), "a character device"),
        (lambda path: os.symlink("/nowhere/at/all", path), "a symbolic link to nothing"),
    ],
)
def test_only_regular_files_are_copied(models: dict[str, Path], make: Any, says: str) -> None:
    path = models["base"] / "tokenizer.json"
    path.unlink()
    make(path)
    with pytest.raises(CheckpointError) as error:
        companions(recipe_of(models), binding_of(models["base"], models["base"]))
    assert str(path) in str(error.value)
    assert says in str(error.value)


def test_a_file_that_is_too_large_is_refused(
    models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_FILE_BYTES", 1000)
    (models["base"] / "tokenizer.json").write_bytes(bytes(1001))
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: has 1001 bytes; expected at most 1000"):
        companions(recipe_of(models), binding_of(models["base"], models["base"]))


def write_template(folder: Path, template: Any, where: str) -> None:
    if where == "jinja":
        (folder / "chat_template.jinja").write_text(template)
    else:
        name = {"config": "tokenizer_config.json", "json": "chat_template.json"}[where]
        (folder / name).write_text(json.dumps({"chat_template": template, "other": 1}))


@pytest.mark.parametrize("where", ["jinja", "config", "json"])
def test_auto_takes_the_most_common_template(models: dict[str, Path], where: str) -> None:
    for name, template in (("base", A), ("x", B), ("y", B)):
        write_template(models[name], template, where)
    found = companions(recipe_of(models, chat_template="auto"), binding_of(models["base"], models["base"]))
    assert found["chat_template.jinja"].decode() == B
    if where != "jinja":
        name = {"config": "tokenizer_config.json", "json": "chat_template.json"}[where]
        assert json.loads(found[name]) == {"chat_template": B, "other": 1}


def test_of_templates_equally_common_the_first_counts(models: dict[str, Path]) -> None:
    write_template(models["base"], A, "config")
    write_template(models["y"], B, "jinja")
    found = companions(recipe_of(models, chat_template="auto"), binding_of(models["base"], models["base"]))
    assert found["chat_template.jinja"].decode() == A


def test_a_file_of_its_own_counts_before_a_configuration(models: dict[str, Path]) -> None:
    write_template(models["base"], A, "config")
    write_template(models["base"], B, "jinja")
    found = companions(recipe_of(models, chat_template="auto"), binding_of(models["base"], models["base"]))
    assert found["chat_template.jinja"].decode() == B


def test_of_named_templates_the_default_counts(models: dict[str, Path]) -> None:
    named = [{"name": "tool_use", "template": A}, {"name": "default", "template": B}]
    write_template(models["x"], named, "config")
    found = companions(recipe_of(models, chat_template="auto"), binding_of(models["base"], models["base"]))
    assert found["chat_template.jinja"].decode() == B


def test_without_any_template_auto_does_nothing(models: dict[str, Path]) -> None:
    found = companions(recipe_of(models, chat_template="auto"), binding_of(models["base"], models["base"]))
    assert "chat_template.jinja" not in found


def test_a_template_of_the_recipe_is_written_everywhere(models: dict[str, Path]) -> None:
    write_template(models["base"], A, "config")
    found = companions(recipe_of(models, chat_template=B), binding_of(models["base"], models["base"]))
    assert found["chat_template.jinja"].decode() == B
    assert json.loads(found["tokenizer_config.json"]) == {"chat_template": B, "other": 1}


def test_without_the_key_a_template_is_copied_as_it_is(models: dict[str, Path]) -> None:
    write_template(models["base"], A, "jinja")
    write_template(models["x"], B, "jinja")
    found = companions(recipe_of(models), binding_of(models["base"], models["base"]))
    assert found["chat_template.jinja"].decode() == A


def test_names_of_templates_are_refused(models: dict[str, Path]) -> None:
    with pytest.raises(RecipeError, match="chat_template"):
        companions(recipe_of(models, chat_template="chatml"), binding_of(models["base"], models["base"]))


@pytest.mark.parametrize("content", [b"{", b"[1]", b"\xff\xfe", b"[" * 100_000])
def test_a_configuration_that_is_no_object_is_named(models: dict[str, Path], content: bytes) -> None:
    path = models["x"] / "tokenizer_config.json"
    path.write_bytes(content)
    recipe = recipe_of(models, chat_template="auto")
    with pytest.raises(CheckpointError) as error:
        companions(recipe, binding_of(models["base"], models["base"]))
    assert str(path) in str(error.value)
    assert len(str(error.value)) < 1000


def front_matter(text: str) -> dict[str, Any]:
    _, matter, _ = text.split("---\n", 2)
    found: dict[str, Any] = yaml.safe_load(matter)
    return found


def test_the_card_names_models_method_and_recipe(models: dict[str, Path]) -> None:
    recipe = recipe_of(models)
    text = card(recipe)
    matter = front_matter(text)
    assert matter == {"base_model": [], "library_name": "transformers", "tags": ["tvfast", "merge"]}
    info = method_info("ties")
    assert info.formula in text
    assert info.source in text
    for path in models.values():
        assert f"* `{path}`" in text
    assert f"`{models['base']}` (base)" in text
    assert f"```yaml\n{recipe.text.rstrip()}\n```" in text


def test_hub_names_are_the_cards_base_models(models: dict[str, Path]) -> None:
    names = {"base": Path("org/base-7B"), "x": Path("org/fine.tune"), "y": Path("/data/local")}
    matter = front_matter(card(recipe_of(names)))
    assert matter["base_model"] == ["org/base-7B", "org/fine.tune"]


def test_no_recipe_breaks_out_of_its_block(models: dict[str, Path]) -> None:
    text = "# ```\n" + recipe_of(models).text
    recipe = parse_recipe(text, "config.yaml")
    assert f"````yaml\n{text.rstrip()}\n````" in card(recipe)


def test_a_name_with_backticks_stays_code(models: dict[str, Path]) -> None:
    text = card(recipe_of({**models, "x": Path("a`b")}))
    assert "* ``a`b``" in text


def test_a_tokenizers_own_code_and_ranks_go_along(models: dict[str, Path]) -> None:
    folder = models["y"]
    (folder / "tokenization_y.py").write_text("code")
    (folder / "y.tiktoken").write_text("ranks")
    recipe = recipe_of(models)
    found = companions(recipe, binding_of(models["base"], folder))
    assert found["y.tiktoken"] == b"ranks"
    assert "tokenization_y.py" not in found
    (folder / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": ["t.Y", None]}}))
    assert companions(recipe, binding_of(models["base"], folder))["tokenization_y.py"] == b"code"
