"""Recipes fit the model, and say what they cover."""

import json
from fnmatch import fnmatchcase

import pytest

from pi05_ros.cli.main import main
from pi05_ros.config import Pi05Config, tiny_config
from pi05_ros.errors import ConfigError
from pi05_ros.quantize.coverage import SIXTEEN, coverage
from pi05_ros.quantize.recipes import (
    GROUPS,
    LARGE,
    PRESERVED,
    RECIPES,
    Recipe,
    assign,
    find_recipe,
    linear_names,
    skeleton,
    unread_layers,
)


@pytest.mark.parametrize("kind", ["pi05", "pi0"])
def test_every_linear_is_in_exactly_one_group(kind):
    names = linear_names(skeleton(tiny_config(kind=kind)))
    for name in names:
        found = [group for group, patterns in GROUPS.items() if any(fnmatchcase(name, one) for one in patterns)]
        assert len(found) == 1, name
    assert unread_layers(tiny_config()) <= set(names)


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_shipped_recipes_fit_the_full_model_and_preserve_what_they_must(recipe):
    found = coverage(recipe, Pi05Config())
    assert found.linears.total() == 456 and found.bytes_after < found.bytes_before
    for group in PRESERVED:
        assert set(found.groups[group].linears) == {SIXTEEN}
    assert recipe.experimental == (recipe.name == "nvfp4")


def test_coverage_of_the_full_model():
    """Every parameter once, 16 bits each: 3,353,433,872 (PI05_SPEC section 1)."""
    found = {name: coverage(recipe, Pi05Config()) for name, recipe in RECIPES.items()}
    assert {one.bytes_before for one in found.values()} == {2 * 3_353_433_872}
    assert found["balanced"].share >= 0.9 and found["balanced"].linears == {"fp8": 252, "nvfp4": 162, SIXTEEN: 42}
    assert found["fp8_mlp"].linears == {"fp8": 54, SIXTEEN: 402}
    mlp = 18 * 3 * 2048 * 16384
    assert found["fp8_mlp"].bytes_before - found["fp8_mlp"].bytes_after == mlp
    assert found["fp8"].bytes_after < 4.1e9


def test_the_command_prints_it(capsys):
    assert main(["coverage", "--recipe", "balanced"]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])["recipes"]["balanced"]
    assert report["share"] >= 0.9 and set(report["groups"]) == set(GROUPS)
    assert main(["coverage", "--size", "tiny"]) == 0
    assert set(json.loads(capsys.readouterr().out.splitlines()[-1])["recipes"]) == set(RECIPES)
    assert main(["coverage", "--recipe", "fp7"]) == 2


NAMES = linear_names(skeleton(tiny_config()))


def test_a_later_pattern_wins():
    recipe = Recipe("mixed", "", {GROUPS["prefix MLP"][0]: "nvfp4", "language_model.layers.0.mlp.*": "fp8"}, 1, 0)
    chosen = assign(recipe, NAMES)
    assert chosen["language_model.layers.0.mlp.up_proj"] == "fp8" and len(chosen) == 9
    assert chosen["language_model.layers.1.mlp.up_proj"] == "nvfp4"


@pytest.mark.parametrize(("pattern", "message"), [
    ("*.mlp.fc3", "which matches none of 66"), ("", "which matches none"),
    ("action_in_*", "which matches 'action_in_proj'"), ("*", "which matches"), ("*.dense", "norm"),
    ("projector", "projector")])
def test_a_pattern_that_matches_nothing_or_what_is_preserved_is_refused(pattern, message):
    with pytest.raises(ConfigError, match=message.replace("*", r"\*")):
        assign(Recipe("wrong", "", {GROUPS[LARGE[0]][0]: "fp8", pattern: "fp8"}, 1, 0), NAMES)


def test_an_unknown_recipe_is_refused():
    with pytest.raises(ConfigError, match="balanced"):
        find_recipe("fast")
