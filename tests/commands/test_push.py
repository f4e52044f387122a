"""virst push, to a stand-in for the hub on this machine."""

import shutil

import pytest

from helpers import hub as stand_in
from helpers.evaluation_cases import files_of
from virst_jax import cli
from virst_jax.api import EMBEDDED, find_model


@pytest.fixture
def hub(monkeypatch, tmp_path):
    constants = pytest.importorskip("huggingface_hub.constants")
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with stand_in.running() as running:
        monkeypatch.setattr(constants, "ENDPOINT", running.address)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", running.address + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", running.token)
        yield running


def test_a_model_is_pushed_and_loaded_again(hub, tmp_path, capsys):
    assert cli.main(["push", "tiny", "someone/virst-tiny", "--private"]) == 0
    address = capsys.readouterr().out.strip()
    assert address == f"hf://someone/virst-tiny@{hub.commit_of('someone/virst-tiny')}"
    assert hub.private["someone/virst-tiny"]
    assert files_of(find_model("hf://someone/virst-tiny")) == files_of(EMBEDDED["tiny"])

    # another model takes its place; what was not part of it stays
    repository = hub.files["someone/virst-tiny"]
    repository["README.md"], repository["params/old"] = b"mine", b"old"
    assert cli.main(["push", "tiny", "hf://someone/virst-tiny"]) == 0
    assert repository["README.md"] == b"mine"
    assert "params/old" not in repository


@pytest.mark.parametrize(
    ("model", "name", "token", "words"),
    [
        ("tiny", "someone", "hf_secret", "give OWNER/NAME"),
        ("nowhere", "someone/x", "hf_secret", "no model there"),
        ("tiny", "someone/x", "hf_wrong", "hf auth login"),
        ("damaged", "someone/x", "hf_secret", "is not as it was saved"),
    ],
)
def test_what_is_refused(hub, model, name, token, words, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", token)
    if model == "damaged":
        model = shutil.copytree(EMBEDDED["tiny"], tmp_path / "damaged")
        (model / "tokenizer" / "tokenizer_config.json").write_text("{}")
    assert cli.main(["push", str(model), name]) == 2
    assert words in capsys.readouterr().err
    assert not hub.files
