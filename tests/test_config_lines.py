"""The line of every key: examples, and tomllib as the oracle of what keys there are."""

import tomllib
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from dataplane.config_lines import find_lines, line_of
from tests.node_file import errors

LINES = '''\
top = 1            # 1
"quoted key" = 2
a.b.c = 3

[table]            # 5
text = """
[not.a.table]
x = 1
"""
after = 'it''s'
list = [           # 11
  1,
  [2,
   3],             # a comment with ] and "
  { x = 1, y.z = 2 },
]
[[many]]           # 17
name = "a#b"
[many.sub]
x = 1979-05-27T07:32:00Z
[[many]]
[[many.deep]]
x = """"quoted""""
[[many.deep]]
x = [] # 25
'''
EXPECTED = {
    ("top",): 1,
    ("quoted key",): 2,
    ("a", "b", "c"): 3,
    ("table",): 5,
    ("table", "text"): 6,
    ("table", "after"): 10,
    ("table", "list"): 11,
    ("table", "list", 0): 12,
    ("table", "list", 1, 0): 13,
    ("table", "list", 1, 1): 14,
    ("table", "list", 2, "x"): 15,
    ("table", "list", 2, "y", "z"): 15,
    ("many", 0): 17,
    ("many", 0, "name"): 18,
    ("many", 0, "sub"): 19,
    ("many", 0, "sub", "x"): 20,
    ("many", 1): 21,
    ("many", 1, "deep", 0): 22,
    ("many", 1, "deep", 0, "x"): 23,
    ("many", 1, "deep", 1): 24,
    ("many", 1, "deep", 1, "x"): 25,
}


def test_lines_are_those_of_the_keys():
    source = LINES.replace("'it''s'", "'its'")
    tomllib.loads(source)
    found = find_lines(source)
    assert {path: found.get(path) for path in EXPECTED} == EXPECTED


def test_what_is_not_in_the_file_has_the_line_of_its_table():
    lines = find_lines("[a]\nb = 1\n[c]\n")
    assert line_of(lines, ("c", "missing")) == 3
    assert line_of(lines, ("nowhere",)) == 1


def paths(value: Any, path: tuple[Any, ...] = ()) -> set[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return {path} | {deeper for key, item in items for deeper in paths(item, (*path, key))}


KEYS = st.text("ab-_1", min_size=1, max_size=3) | st.sampled_from(["x y", 'q"', "é", "a.b", "#"])
SCALARS = st.integers() | st.booleans() | st.text("a]}[{,=#\"'\n\\", max_size=6) | st.just(1.5)
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3))


def quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'


def dump(value: Any, newline: str) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{quoted(key)} = {dump(item, newline)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        # Inside an inline table no newline is allowed, so arrays are broken into lines at the top only.
        return "[" + newline + f", {newline}".join(dump(item, "") for item in value) + newline + "]"
    if isinstance(value, str):
        return quoted(value)
    return str(value).lower()


@given(st.dictionaries(KEYS, VALUES, max_size=4), st.booleans())
def test_the_scanner_finds_every_path_that_tomllib_finds(values, tables):
    text = ""
    for key, value in sorted(values.items(), key=lambda item: tables and isinstance(item[1], dict)):
        if tables and isinstance(value, dict):
            text += f"[{quoted(key)}] # ]\n" + "".join(f"{quoted(k)} = {dump(v, '')}\n" for k, v in value.items())
        else:
            text += f"{quoted(key)} = {dump(value, '  # [' + chr(10))}\n"
    assert tomllib.loads(text) == values
    assert set(find_lines(text)) == paths(values) - {()}


@given(st.text("ab.[]{}=\"'#, \n1", max_size=40))
def test_any_text_is_either_read_or_refused_with_a_line(source):
    for line in errors(source):
        assert line.split(":")[0].isdigit()
