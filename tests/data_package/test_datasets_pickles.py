import io
import os
import pickle
import pickletools

import pytest

from virst_jax.data.datasets.pickles import read_plain_pickle
from virst_jax.errors import UserError

PLAIN = [{"ref_id": 1, "sent": "the café", "big": 2**70, "x": (1.5, None, True), "ids": [1, 2]}, {"set": {1, 2}}]


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_plain_containers(tmp_path, protocol):
    path = tmp_path / "refs(unc).p"
    value = PLAIN if protocol >= 4 else PLAIN[:1]  # older sets are made by a call
    path.write_bytes(pickle.dumps(value, protocol))
    assert read_plain_pickle(path) == value


def test_text_of_python_2(tmp_path):
    path = tmp_path / "refs.p"
    path.write_bytes(b"(lp0\n(dp1\nS'sent'\np2\nS'the caf\\xc3\\xa9'\np3\nsS'split'\nS'train'\nsa.")
    assert read_plain_pickle(path) == [{"sent": "the café", "split": "train"}]
    path.write_bytes(b"(lp0\nS'caf\\xe9'\na.")
    assert read_plain_pickle(path) == ["café"]


class Call:
    def __init__(self, function, *arguments):
        self.made = function, arguments

    def __reduce__(self):
        return self.made


def test_nothing_is_called(tmp_path):
    path, trace = tmp_path / "refs.p", tmp_path / "trace"
    for call in (Call(os.mkdir, str(trace)), Call(eval, f"open({str(trace)!r}, 'w')"), Call(io.open, str(trace), "w")):
        for protocol in (0, 2, 5):
            path.write_bytes(pickle.dumps([call], protocol))
            with pytest.raises(UserError, match="nothing of it was run") as error:
                read_plain_pickle(path)
            assert str(path) in str(error.value)
            assert not trace.exists()


@pytest.mark.parametrize("data", [b"", b"\x80", b"not a pickle", pickle.dumps(PLAIN)[:-5], b"cposix\nsystem\n."])
def test_damaged_files_are_named(tmp_path, data):
    path = tmp_path / "refs.p"
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"refs\.p: not a pickle of plain lists"):
        read_plain_pickle(path)


def test_other_ways_to_reach_a_name(tmp_path):
    path = tmp_path / "refs.p"
    for program in (b"(S'x'\nios\nmkdir\n.", b"\x82\x01.", b"P1\n."):  # INST, EXT1, PERSID
        pickletools.dis(program, io.StringIO())  # a well-formed program
        path.write_bytes(program)
        with pytest.raises(UserError, match=r"refs\.p"):
            read_plain_pickle(path)


def test_a_missing_file(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        read_plain_pickle(tmp_path / "refs.p")
