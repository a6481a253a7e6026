"""Counts the Linear layers and bytes that each recipe moves to which precision, on a model without memory.

The last line of output is a JSON object: recipes {name: linears by precision, share of the Linears below 16 bits,
bytes_before, bytes_after, groups}. Bytes before are those of 16 bits; scales are counted with NVFP4, others are few.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from pi05_ros.cli.report import Report, table

HELP = "count what a recipe quantises"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--recipe", metavar="NAME", help="one of them, by groups of layers (default: all recipes)")
    parser.add_argument("--checkpoint", type=Path, metavar="PATH", help="its sizes instead of --size")
    parser.add_argument("--size", choices=("tiny", "full"), default="full", help="of the model (default: full)")


def run(args: argparse.Namespace) -> Report:
    import torch

    from pi05_ros.cli.options import weight_source
    from pi05_ros.quantize.coverage import SIXTEEN, coverage
    from pi05_ros.quantize.recipes import RECIPES, find_recipe

    config = weight_source(argparse.Namespace(**vars(args), horizon=None), torch.device("cpu")).config
    recipes = [find_recipe(args.recipe)] if args.recipe else list(RECIPES.values())
    found = {recipe.name: coverage(recipe, config) for recipe in recipes}
    for recipe in recipes:
        one = found[recipe.name]
        if args.recipe:
            table(f"{recipe.name}: {recipe.summary}", ("group", "Linears", "precision", "before [MB]", "after [MB]"), [
                *((name, group.linears.total(), ", ".join(group.linears), f"{group.bytes_before / 1e6:.1f}",
                   f"{group.bytes_after / 1e6:.1f}") for name, group in one.groups.items()),
                ("all else", "", SIXTEEN, *[f"{one.other_bytes / 1e6:.1f}"] * 2)])
    table("recipes", ("recipe", "Linears", "below 16 bits", "share", "before [GB]", "after [GB]"), [
        (recipe.name + (" (experimental)" if recipe.experimental else ""), one.linears.total(),
         ", ".join(f"{count} {precision}" for precision, count in one.linears.items() if precision != SIXTEEN),
         f"{one.share:.1%}", f"{one.bytes_before / 1e9:.2f}", f"{one.bytes_after / 1e9:.2f}")
        for recipe in recipes for one in [found[recipe.name]]])
    return Report(ok=True, data={"recipes": {name: one.as_data() for name, one in found.items()}})
