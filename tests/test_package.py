"""What is installed, under which names, and how much of it a start imports."""

import importlib
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
import yaml

import virst_jax
from virst_jax import cli, programs
from virst_jax.commands.failures import EXTRAS

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# makes packages look as if they were not installed
WITHOUT_EXTRAS = f"""
import sys
class Without:
    def __init__(self, finder):
        self.finder = finder
    def __getattr__(self, name):
        return getattr(self.finder, name)
    def find_spec(self, name, path=None, target=None):
        missing = name.partition(".")[0] in {sorted({*EXTRAS, "torch"})}
        return None if missing else self.finder.find_spec(name, path, target)
sys.meta_path[:] = map(Without, sys.meta_path)
"""


def python(script: str, *, path: Path = ROOT, cwd: Path | None = None) -> str:
    """What a new interpreter prints that finds our modules in `path` alone."""
    environment = {**os.environ, "PYTHONPATH": str(path), "PYTHONSAFEPATH": "1"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("start", ["import virst_jax", "from virst_jax import cli; cli.main(['help'])"])
def test_a_start_imports_little(start):
    """Help is there at once. Modules are counted, since seconds depend on the machine."""
    plain = "import argparse, collections, difflib, importlib.util, inspect, signal, threading, traceback, typing\n"
    script = f"import sys\n{plain}before = set(sys.modules)\n{start}\nprint(*sorted(set(sys.modules) - before))"
    modules = python(script).splitlines()[-1].split()
    others = {name.partition(".")[0] for name in modules} - {"virst_jax", *sys.stdlib_module_names}
    assert not {name for name in others if not name.startswith("_")}
    assert len(modules) < 25, modules


def test_inference_needs_no_extra():
    modules = "api", "commands.segment", "commands.chat", "commands.demo", "commands.info", "io.visualize", "io.masks"
    imports = "\n".join(f"import virst_jax.{name}" for name in modules)
    script = f"""{WITHOUT_EXTRAS}
{imports}
import numpy as np
from virst_jax.api import EMBEDDED
from virst_jax.data.prompts import load_tokenizer
assert load_tokenizer(EMBEDDED["tiny"] / "tokenizer", 617).num_rows
assert virst_jax.io.masks.encode_mask(np.eye(4, dtype=bool)).isascii()
"""
    python(script)


def test_a_missing_package_is_one_line():
    script = f"{WITHOUT_EXTRAS}\nfrom virst_jax import cli\nsys.stderr = sys.stdout\n"
    shown = python(script + "print(cli.main(['train', '--config=synthetic', '--steps=2']))")
    assert re.fullmatch(r"error: \w+ is not installed; pip install 'virst-jax\[\w+\]'\n2\n", shown)


def test_extras_hold_what_their_lines_promise():
    extras = PROJECT["optional-dependencies"]
    name_of = {"tensorflow_datasets": "tensorflow-datasets", "python_multipart": "python-multipart"}
    base = [re.match(r"[\w-]+", requirement)[0] for requirement in PROJECT["dependencies"]]
    for module, extra in EXTRAS.items():
        package = name_of.get(module, module)
        assert any(re.match(rf"{package}\b", requirement) for requirement in extras[extra]), module
        assert package not in base
    assert extras["all"] == ["virst-jax[data,eval,export,serve,train]"]
    assert any(requirement.startswith("virst-jax[all") for requirement in extras["test"])


def test_the_package_names_what_it_offers():
    assert set(virst_jax.__all__) <= set(dir(virst_jax))
    assert all(getattr(virst_jax, name) is not None for name in virst_jax.__all__)
    assert issubclass(virst_jax.UserError, Exception)
    assert (ROOT / "virst_jax" / "py.typed").is_file()
    assert virst_jax.__version__ == PROJECT["version"]


def test_a_module_has_one_name(tmp_path):
    """In a checkout the top level's; elsewhere, as in an editable installation, the package's."""
    assert programs.load("conversion.rules") is importlib.import_module("conversion.rules")
    assert programs.load("configs").__name__ == "configs"
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "virst_jax").symlink_to(ROOT / "virst_jax")
    script = """
import sys
from virst_jax import programs
found = [programs.load(name).__name__ for name in ("conversion.rules", "configs.stage1", "conversion.rules", "eval")]
print(*found, *(name for name in ("conversion", "configs", "eval") if name in sys.modules))
"""
    ours = "virst_jax.conversion.rules virst_jax.configs.stage1 virst_jax.conversion.rules virst_jax.eval"
    assert python(script, path=tmp_path / "site", cwd=tmp_path).strip() == ours
    (tmp_path / "site" / "conversion.py").write_text("what = 'a module of somebody else'")
    foreign = python(f"import conversion\n{script}", path=tmp_path / "site", cwd=tmp_path).strip()
    assert foreign == f"{ours} conversion"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from what git tracks or would, in a folder of its own."""
    folder = tmp_path_factory.mktemp("wheel")
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    names = listed.stdout.splitlines() if not listed.returncode else [str(p.relative_to(ROOT)) for p in ROOT.rglob("*")]
    for name in names:
        if name.startswith(("tests/", "docs/", ".")) or not (ROOT / name).is_file():
            continue
        (folder / "src" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "src" / name).write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "setup.py", "--quiet", "bdist_wheel", "--dist-dir", str(folder)]
    built = subprocess.run(command, cwd=folder / "src", capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    (file,) = folder.glob("*.whl")
    return file


def test_the_wheel_holds_everything_under_one_name(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        info = f"virst_jax-{PROJECT['version']}.dist-info"
        entry_points = archive.read(f"{info}/entry_points.txt").decode()
        metadata = Parser().parsestr(archive.read(f"{info}/METADATA").decode())
    assert {name.partition("/")[0] for name in names} == {"virst_jax", info}
    expected = {f.relative_to(ROOT).as_posix() for f in (ROOT / "virst_jax").rglob("*.py")}
    for folder in ("configs", "conversion"):
        expected |= {f"virst_jax/{f.relative_to(ROOT).as_posix()}" for f in (ROOT / folder).rglob("*.py")}
    expected |= {"virst_jax/train.py", "virst_jax/eval.py", "virst_jax/py.typed"}
    for folder in ("assets", "serve/static"):
        files = [f for f in (ROOT / "virst_jax" / folder).rglob("*") if f.is_file()]
        assert files
        expected |= {f.relative_to(ROOT).as_posix() for f in files}
    assert {name for name in names if name.startswith("virst_jax/")} == expected
    assert "virst = virst_jax.cli:main" in entry_points
    needed = [r for r in metadata.get_all("Requires-Dist") if "extra ==" not in r]
    assert not [r for r in needed if re.match("grain|matplotlib|jinja2|tensorboard|tensorflow|pycocotools|torch", r)]


def test_the_wheel_runs_without_a_checkout(wheel, tmp_path):
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    script = """
import sys
from virst_jax import cli, programs
from virst_jax.commands import config_file
sys.stderr = sys.stdout
assert programs.load("train").__name__ == "virst_jax.train"
assert config_file.load("stage2", ["--config.seed=3"]).seed == 3
for name in (*cli.BESIDE, "train", "eval"):
    try: cli.main([name, "--help"])
    except SystemExit as stop: assert not stop.code
print(cli.main(["train", "--config=synthetic", "--config.sead=3"]))
print(sorted(name for name in ("configs", "conversion", "train", "eval") if name in sys.modules))
print(sys.modules["virst_jax"].__file__)
"""
    *shown, error, status, top, file = python(script, path=site, cwd=tmp_path).splitlines()
    assert error == "error: --config.sead: unknown key 'sead' in config; did you mean seed?"
    assert (status, top) == ("2", "[]")
    assert Path(file).is_relative_to(site)
    assert all(
        any(line.startswith(f"usage: virst {name}") for line in shown) for name in (*cli.BESIDE, "train", "eval")
    )


@pytest.mark.heavy
def test_the_wheel_segments_and_trains(wheel, tmp_path):
    """`virst demo` without the extras, and two steps of a recipe that is given by its name."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    demo = f"{WITHOUT_EXTRAS}\nfrom virst_jax import cli\nassert cli.main(['demo', '--out', 'demo', '--quiet']) == 0"
    python(demo, path=tmp_path / "site", cwd=tmp_path)
    assert (tmp_path / "demo" / "result.json").is_file()
    arguments = ["train", "--config=synthetic", "--steps=2", "--config.stages=('patch_pretrain',)"]
    python(f"from virst_jax import cli\nassert cli.main({arguments}) == 0", path=tmp_path / "site", cwd=tmp_path)
    models = list((tmp_path / "runs" / "synthetic-2-steps").glob("*/model/config.json"))
    assert [model.parent.parent.name for model in models] == ["patch_pretrain"]


def test_files_that_others_read():
    """Citation, hooks and images are what their readers expect."""
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors", "license", "version"} <= set(citation)
    assert citation["cff-version"] == "1.2.0"
    assert citation["version"] == PROJECT["version"]
    assert citation["license"] == PROJECT["license"]
    assert "2603.27060" in str(citation["references"])
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    assert {hook["id"] for repo in hooks["repos"] for hook in repo["hooks"]} >= {"ruff-check", "ruff-format", "mypy"}
    lines = (ROOT / "Dockerfile").read_text().replace("\\\n", " ").splitlines()
    known = {"ARG", "FROM", "RUN", "COPY", "ENV", "WORKDIR", "ENTRYPOINT", "CMD", "LABEL", "USER", "VOLUME"}
    instructions = [line.split()[0] for line in lines if line.strip() and not line.startswith("#")]
    assert set(instructions) <= known
    assert {"FROM", "ENTRYPOINT"} <= set(instructions)
    for line in lines:  # what is copied is there
        if line.startswith("COPY ") and "--from" not in line:
            assert all((ROOT / name).exists() for name in line.split()[1:-1])
    changes = (ROOT / "CHANGELOG.md").read_text()
    assert f"## {PROJECT['version']}" in changes or "## Unreleased" in changes
