"""A recipe is data: it survives YAML, and every wrong value is named."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from compress_tool.config import Recipe, parse_layers, read_recipe, recipe_from
from compress_tool.errors import InputError, ToolError, UsageError


def test_a_recipe_survives_yaml():
    recipe = Recipe(
        method="moe-svd", ratio=0.3, layers=(1, 3), k=4, calibration=("a.txt",), groups=2
    )
    assert recipe_from(yaml.safe_load(recipe.to_yaml())) == recipe


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({}, "--ratio"),
        ({"ratio": 0}, "--ratio is 0"),
        ({"ratio": 1}, "--ratio is 1"),
        ({"ratio": -1}, "--ratio is -1"),
        ({"ratio": 2}, "--ratio is 2"),
        ({"ratio": float("nan")}, "--ratio is nan"),
        ({"ratio": float("inf")}, "--ratio is inf"),
        ({"ratio": "0.4"}, "ratio is '0.4'"),
        ({"ratio": True}, "ratio is True"),
        ({"ratio": 0.4, "rank": 5}, "contradict"),
        ({"rank": 0}, "--rank is 0"),
        ({"ratio": 0.4, "samples": 0}, "--samples is 0"),
        ({"ratio": 0.4, "seq_len": 1}, "--seq-len is 1"),
        ({"ratio": 0.4, "method": "magic"}, "--method is 'magic'"),
        ({"ratio": 0.4, "colour": 1}, "unknown key colour"),
        ({"ratio": 0.4, "layers": []}, "--layers"),
        ({"ratio": 0.4, "layers": [1.5]}, "layers is [1.5]"),
        ({"ratio": 0.4, "centre": "yes"}, "centre is 'yes'"),
        ({"ratio": 0.4, "k": 3}, "--k belongs to --method moe-svd"),
        ({"ratio": 0.4, "groups": 2}, "--groups belongs to"),
        ({"ratio": 0.4, "method": "svd", "centre": True}, "--centre belongs to"),
        ({"ratio": 0.4, "seed": -1}, "--seed is -1"),
        ({"ratio": 0.4, "calibration": 3}, "calibration is 3"),
    ],
)
def test_a_wrong_value_is_named(values: dict, named: str):
    with pytest.raises(UsageError) as caught:
        recipe_from(values)
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)


def test_layers_are_ranges():
    assert parse_layers("3,5,7-9") == (3, 5, 7, 8, 9)
    assert parse_layers("[3, 5]") == (3, 5)
    for bad in ("", "a", "1-", "-1", "1,,2", "1.5"):
        with pytest.raises(UsageError):
            parse_layers(bad)


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"ratio: [", InputError),
        (b"\xff\xfe", InputError),
        (b"- 1\n", UsageError),
        (b"", UsageError),
        (b"ratoi: 0.4\n", UsageError),
        (b"!!python/object/apply:os.system ['true']", InputError),
    ],
)
def test_a_broken_recipe_file_is_refused(tmp_path: Path, content: bytes, kind: type[ToolError]):
    file = tmp_path / "recipe.yaml"
    file.write_bytes(content)
    with pytest.raises(kind, match=r"recipe\.yaml"):
        read_recipe(file)


def test_a_missing_recipe_file_is_bad_input(tmp_path: Path):
    with pytest.raises(InputError, match=r"none\.yaml"):
        read_recipe(tmp_path / "none.yaml")


@given(st.dictionaries(st.text(max_size=8), st.none() | st.booleans() | st.text() | st.floats()))
def test_no_mapping_gives_anything_but_a_tool_error(values: dict):
    with pytest.raises(ToolError):
        recipe_from(values | {"ratio": None})
