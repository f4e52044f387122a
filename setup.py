"""What pyproject.toml cannot say: modules at the top of a checkout are installed inside the package.

configs/ and conversion/ become virst_jax.configs and virst_jax.conversion, train.py and eval.py virst_jax.train and
virst_jax.eval. virst_jax/programs.py finds them in either place.
"""

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

FOLDERS = ("configs", "conversion")
PROGRAMS = ("train", "eval")
beside = [name for folder in FOLDERS for name in find_packages(include=[folder, f"{folder}.*"])]


class Build(build_py):
    """Adds the programs to the package's modules."""

    def find_package_modules(self, package: str, package_dir: str) -> list[tuple[str, str, str]]:
        modules = super().find_package_modules(package, package_dir)
        return modules + [(package, name, f"{name}.py") for name in PROGRAMS if package == "virst_jax"]


setup(
    packages=[*find_packages(include=["virst_jax", "virst_jax.*"]), *(f"virst_jax.{name}" for name in beside)],
    package_dir={f"virst_jax.{folder}": folder for folder in FOLDERS},
    cmdclass={"build_py": Build},
)
