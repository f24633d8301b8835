"""Hooks of mkdocs: pages show the help that the command prints, and the pictures that the benchmarks drew."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

RESULTS = Path(__file__).parents[1] / "bench" / "results"

HELP = re.compile(r"<!-- (negmerge(?: [a-z]+)? --help) -->")


def on_files(files: Files, config: Any, **_: Any) -> Files:
    """Add the pictures, which live with the rows they were drawn from."""
    for picture in sorted(RESULTS.glob("*.png")):
        files.append(File.generated(config, f"results/{picture.name}", abs_src_path=str(picture)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put help in the place of its marker, and point pictures to the site's copies."""
    return HELP.sub(lambda found: help_text(found[1]), markdown).replace("](../bench/results/", "](results/")


def help_text(command: str) -> str:
    """The help of a command as a block of text, on any terminal in 100 columns."""
    arguments = [sys.executable, "-m", "negmerge_fast", *command.split()[1:]]
    environment = {**os.environ, "COLUMNS": "100", "LC_ALL": "C.UTF-8"}
    done = subprocess.run(arguments, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise PluginError(f"{command}: exit status {done.returncode}: {done.stderr.strip()}")
    return f"```text\n{done.stdout.rstrip()}\n```"
