"""What pyproject.toml cannot say: which folders are packages. The compiled part will be built from here, too."""

from setuptools import setup

setup(
    packages=["negmerge_fast", "negmerge_fast.checkpoints"],
    package_data={"negmerge_fast": ["py.typed"]},
)
