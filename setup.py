"""Two packages from two places: the library under ``python/``, the Triton kernels beside it.

Everything else is in ``pyproject.toml``.  Nothing here probes the machine or the network.
"""

from setuptools import find_packages, setup

setup(
    package_dir={"": "python", "fptkernels": "fptkernels"},
    packages=[
        *find_packages("python"),
        "fptkernels",
    ],
    package_data={
        "fpt_fast": ["py.typed", "images/presets.json", "demo/backbone/*"],
    },
    include_package_data=False,
)
