"""Folders that tests read."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
DATA = ROOT / "tests" / "data"
PARITY = DATA / "parity"
TOKENIZER = DATA / "tokenizer"
PROGRAMS = ROOT / "tests" / "programs"
