import json
import os

import pytest

from virst_jax.errors import UserError
from virst_jax.io.json_files import parse_json, read_json
from virst_jax.io.regular import read_file

VALUE = {"videos": {"v": {"frames": ["0", 1, None, True], "size": 3.0, "ids": 7, "sound": 1, "é": "ü"}}}


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "meta.json"
    path.write_text(json.dumps(VALUE))
    return path


def test_values_know_their_place(file):
    video = read_json(file)["videos"]["v"]
    assert video["frames"][0].text() == "0"
    assert [e.value for e in video["frames"].elements()] == ["0", 1, None, True]
    assert (video["size"].integer(), video["size"].number(), video["sound"].boolean()) == (3, 3.0, True)
    assert video["ids"].identifiers() == ("7",)
    assert video["frames"][1].identifier() == "1"
    with pytest.raises(UserError) as error:
        video["frames"][1].text()
    assert str(error.value) == f"{file}: videos.v.frames[1]: expected text, found a number; get the file again"


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda top: top["videos"]["v"]["frames"]["x"], "expected an object, found a list"),
        (lambda top: top["videos"][0], "expected a list, found an object"),
        (lambda top: top["nothing"]["x"], "nothing: expected an object, found nothing"),
        (lambda top: top["videos"].text(), "expected text, found an object"),
        (lambda top: top["videos"]["v"]["frames"][3].integer(), "expected a whole number, found true or false"),
        (lambda top: top["videos"]["v"]["ids"].integer(0, 5), "whole number from 0 to 5"),
        (lambda top: top["videos"]["v"]["ids"].boolean(), "expected true or false, found a number"),
        (lambda top: top["videos"]["v"]["frames"][9].text(), r"frames\[9\]: expected text, found nothing"),
        (lambda top: len(top["videos"]["v"]["ids"]), "expected a list, found a number"),
    ],
)
def test_wrong_types(file, ask, message):
    with pytest.raises(UserError, match=message):
        ask(read_json(file))


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-32"])
def test_a_byte_order_mark_is_passed_over(tmp_path, encoding):
    path = tmp_path / "x.json"
    path.write_text(json.dumps(VALUE, ensure_ascii=False), encoding)
    assert read_json(path).value == VALUE


@pytest.mark.parametrize("text", ["", "{", "[" * 100000, "1" * 5000, "[1e400x]", "\ufffe", '{"a": 1} x'])
def test_what_is_no_json(text):
    with pytest.raises(UserError, match=r"^x\.json: not valid JSON"):
        parse_json(text.encode(), "x.json")


def test_numbers_that_are_none():
    top = parse_json(b'{"n": NaN, "i": Infinity, "e": 1e999, "b": ' + b"9" * 400 + b"}", "x.json")
    for key in "nieb":
        with pytest.raises(UserError, match=f"{key}: expected a"):
            top[key].number()
        with pytest.raises(UserError, match=f"{key}: expected a"):
            top[key].integer()


def test_half_a_character():
    top = parse_json(b'{"\\udc00": "a\\ud800"}', "x.json")
    for _, value in top.members():
        with pytest.raises(UserError, match="lone surrogate") as error:
            value.text()
        assert str(error.value).encode()


def test_what_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for name, what in (("pipe", "a pipe"), (".", "a folder"), ("no", "no such file"), ("a\0b", "not readable")):
        with pytest.raises(UserError, match=what):
            read_json(f"{tmp_path}/{name}")
    (tmp_path / "long").write_bytes(b"x" * 11)
    with pytest.raises(UserError, match="11 bytes, more than the 10"):
        read_file(tmp_path / "long", 10)
