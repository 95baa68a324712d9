"""What pyproject.toml cannot say: requirements.txt is the one list of what is needed, and its [NAMES] are the extras.

In an installed copy the scripts beside this file are modules of `kd_scripts`.
"""

import re
from pathlib import Path

from setuptools import find_namespace_packages, setup

extras, name = {"": []}, ""
for line in Path(__file__).with_name("requirements.txt").read_text().splitlines():
    if line.startswith("#"):
        name = (re.match(r"# \[(\w+)\]", line) or ["", ""])[1]
    elif line.strip():
        extras.setdefault(name, []).append(line)
required = extras.pop("")
setup(
    install_requires=required,
    extras_require={**extras, "all": [line for lines in extras.values() for line in lines]},
    packages=[*find_namespace_packages(include=["kd", "kd.*"], exclude=["*.__pycache__", "*.templates"]), "kd_scripts"],
    package_dir={"kd_scripts": "."},
    script_name=__file__,  # so that this file is not taken for one of the scripts
)
