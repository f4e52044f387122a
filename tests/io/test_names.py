import os
import unicodedata

import pytest

from virst_jax.errors import UserError
from virst_jax.io.names import check_name, find_entry, name_fault, natural_key, repeated
from virst_jax.io.regular import require_file

GOOD = ["00000", "a b", "-CiPki3XuVI", "été", "狗", "a.b", "...", "x" * 240, "cam2_frame_1", "console", "12:30"]
BAD = ["", ".", "..", "a/b", "/etc", "a\\b", "..\\x", "a\x00b", "a\nb", "\x1b[2J", "\ud800", "x" * 241, "é" * 121]
BAD += ["C:", "c:x", "nul", "CON.txt", "com1", "a\u2028b", None, 3, ["a"]]


@pytest.mark.parametrize("name", GOOD)
def test_names(name):
    assert check_name(name, "video") == name


@pytest.mark.parametrize("name", BAD, ids=ascii)
def test_what_is_no_name(name):
    with pytest.raises(UserError, match=r"meta\.json: the video") as error:
        check_name(name, "meta.json: the video")
    str(error.value).encode()
    assert "\x1b" not in str(error.value)


@pytest.mark.parametrize("name", ["../x", "a/../b", "/a", "//a", "a//b", "a/", "a/./b", "a\\..\\b", "a/" * 600 + "a"])
def test_nested_names_stay_below_their_folder(name):
    assert name_fault(name, nested=True)


def test_nested_names():
    assert check_name("UVO/all/-CiPki3XuVI", "video", nested=True) == "UVO/all/-CiPki3XuVI"
    assert name_fault("UVO/all") == "holds a slash, so it would lead to another folder"


def test_natural_order():
    names = [
        "cam2_frame_1",
        "cam2_frame_10",
        "cam2_frame_11",
        "cam2_frame_2",
        "cam10_frame_1",
        "1",
        "01",
        "a",
        "9" * 9000,
    ]
    expected = ["01", "1", "9" * 9000, "a", "cam2_frame_1", "cam2_frame_2", "cam2_frame_10", "cam2_frame_11"]
    assert sorted(names, key=natural_key) == [*expected, "cam10_frame_1"]
    days = [f"2024-08-07_{i}" for i in range(12)]
    assert sorted(sorted(days), key=natural_key) == days


def test_accents_are_the_same_in_both_forms(tmp_path):
    composed, apart = (unicodedata.normalize(form, "Été/ö") for form in ("NFC", "NFD"))
    os.makedirs(tmp_path / apart)
    assert find_entry(tmp_path, composed) == str(tmp_path / apart)
    assert find_entry(tmp_path, apart) == str(tmp_path / apart)
    assert find_entry(tmp_path, "ü") == str(tmp_path / "ü")
    assert repeated(["a", composed, "b", apart]) == apart
    assert repeated(["a", "b"]) is None


@pytest.mark.parametrize(
    ("there", "asked"),
    [
        ("caf\u00e9.json", "cafe\u0301.json"),
        ("cafe\u0301.json", "caf\u00e9.json"),
        ("Meta.JSON", "meta.json"),
        ("a.json ", "a.json"),
    ],
)
def test_a_file_of_another_spelling_is_named(tmp_path, there, asked):
    (tmp_path / there).write_text("{}")
    if (tmp_path / asked).exists():
        pytest.skip("this file system takes both for one name")
    with pytest.raises(UserError, match="no such file, but its folder has") as info:
        require_file(tmp_path / asked, "copy it again")
    assert ascii(there)[1:-1] in str(info.value)
    assert "copy it again" not in str(info.value)
    with pytest.raises(UserError, match="no such file; copy it again"):
        require_file(tmp_path / "b.json", "copy it again")
