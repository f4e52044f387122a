"""The table of a training run: it goes on behind a restart, whatever a crash has left of it."""

import csv

import pytest

from virst_jax.training.log import TrainLog


def rows(folder):
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_rows_that_come_again_are_dropped_and_columns_grow(tmp_path):
    log = TrainLog(tmp_path)
    for step in range(1, 5):
        log.write(step, {"loss": step / 8})
    log.close()
    log = TrainLog(tmp_path, start=2)
    log.write(3, {"loss": 7.0, "score": 1.0})
    log.close()
    assert rows(tmp_path) == [
        {"step": "1", "loss": "0.125", "score": ""},
        {"step": "2", "loss": "0.25", "score": ""},
        {"step": "3", "loss": "7", "score": "1"},
    ]


@pytest.mark.parametrize(
    ("damage", "kept"),
    [
        (lambda content: content[:-3], 2),  # cut within the last line: its step is whole
        (lambda content: content + bytes(300), 2),  # a power failure: zeros
        (lambda content: content + b"\xff\xfe,3\n", 2),
        (lambda content: content + b"9" * 5000 + b",1\n", 2),
        (lambda content: content + b"\xb2,1\n", 2),
        (lambda content: bytes(len(content)), 0),
        (lambda content: b"", 0),
        (lambda content: b"loss\n1\n", 0),
        (lambda content: b"step,loss\n" + b'"' + b"x" * 200_000, 0),
    ],
)
def test_a_damaged_table_does_not_end_a_run(tmp_path, damage, kept):
    log = TrainLog(tmp_path)
    for step in (1, 2):
        log.write(step, {"loss": 0.125})
    log.close()
    (tmp_path / "metrics.csv").write_bytes(damage((tmp_path / "metrics.csv").read_bytes()))
    log = TrainLog(tmp_path, start=2)
    log.write(3, {"loss": 1.0, "score": 2.0})
    log.close()
    found = rows(tmp_path)
    assert [row["step"] for row in found] == [*map(str, range(1, kept + 1)), "3"]
    assert (found[-1]["loss"], found[-1]["score"]) == ("1", "2")
