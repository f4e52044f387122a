import json
import pickle
import string

import numpy as np
import pytest

from virst_jax.data.datasets.json_index import index_members, iterate_elements, read_span
from virst_jax.errors import UserError

TRICKY = {
    "0": [{"size": [4, 6], "counts": 'a]"[\\o}{,:'}, None, {"size": [4, 6], "counts": "\\"}],
    "a,b": [],
    "n": -1.5e3,
    'quo"te': "te]xt",
    "deep": [[[{"x": [[1, 2], {"y": "]"}]}]]],
    "ü": {"é": None},
    "t": True,
}


@pytest.mark.parametrize("style", [{}, {"indent": 2}, {"separators": (",", ":")}, {"ensure_ascii": False}])
def test_members_of_any_style(tmp_path, style):
    path = tmp_path / "x.json"
    path.write_text(json.dumps(TRICKY, **style))
    members = pickle.loads(pickle.dumps(index_members(path)))
    assert {key: members[key].value for key in members.spans} == TRICKY
    assert "0" in members
    assert "1" not in members


def test_members_of_random_strings(tmp_path):
    rng = np.random.default_rng(0)
    letters = list(string.printable + "é\u2028")
    value = {str(i): ["".join(rng.choice(letters, 30)), {"".join(rng.choice(letters, 5)): i}] for i in range(300)}
    path = tmp_path / "x.json"
    path.write_text(json.dumps(value))
    members = index_members(path)
    assert {key: members[key].value for key in members.spans} == value


@pytest.mark.parametrize("indent", [None, 1])
def test_elements_of_a_member(tmp_path, indent):
    path = tmp_path / "x.json"
    elements = [{"id": i, "segmentation": [[1, 2.5, i]]} for i in range(5)]
    path.write_text(json.dumps({"first": [], "annotations": elements}, indent=indent))
    members = index_members(path)
    found = list(iterate_elements(path, members.spans["annotations"]))
    assert [value.value for _, value in found] == elements
    assert [read_span(str(path), span).value for span, _ in found] == elements
    assert list(iterate_elements(path, members.spans["first"])) == []


@pytest.mark.parametrize("text", ["{}", " { } ", "[]"])
def test_empty(tmp_path, text):
    path = tmp_path / "x.json"
    path.write_text(text)
    if text == "[]":
        assert list(iterate_elements(path)) == []
    else:
        assert index_members(path).spans == {}


@pytest.mark.parametrize(
    "text", ["", "[1]", '{"a": [1, 2', '{"a": 1 "b": 2}', '{"a"}', '{"a": }', '{"a": 1,}', "{1: 2}"]
)
def test_broken_files_are_named(tmp_path, text):
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(UserError, match=r"x\.json"):
        index_members(path)


def test_a_truncated_file_is_named(tmp_path):
    path = tmp_path / "x.json"
    path.write_text(json.dumps(TRICKY)[:-9])
    with pytest.raises(UserError, match="truncated"):
        index_members(path)


def test_missing_and_vanished_files(tmp_path):
    path = tmp_path / "x.json"
    with pytest.raises(UserError, match="no such file"):
        index_members(path)
    path.write_text('{"gone": [17]}')
    members = index_members(path)
    path.unlink()
    with pytest.raises(UserError, match="moved"):
        members["gone"]
    with pytest.raises(KeyError):
        members["never"]


def test_values_that_are_not_json(tmp_path):
    path = tmp_path / "x.json"
    path.write_text('{"a": [1}, "b": nothing}')
    members = index_members(path)
    for key in "ab":
        with pytest.raises(UserError, match="not valid JSON"):
            members[key]
