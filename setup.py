"""Build: the folder kernels/ is installed as mpsae.kernels (see CONTRIBUTING.md)."""

from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="mpsae",
    version="0.1.0",
    description="Matching-pursuit sparse autoencoders at about the price of TopK",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=[*find_packages(include=["mpsae", "mpsae.*"]), "mpsae.kernels"],
    package_dir={"mpsae": "mpsae", "mpsae.kernels": "kernels"},
    package_data={"mpsae.assets": ["stdlib_lm/*"], "mpsae": ["py.typed"]},
    install_requires=[
        "torch>=2.6",
        "triton>=3.3; platform_system == 'Linux'",
        "transformers>=4.46",
        "datasets>=2.19",
        "safetensors>=0.4",
        "numpy>=1.24",
        "tqdm>=4.60",
        "simple-parsing>=0.1.5",
        "matplotlib>=3.7",
    ],
    extras_require={"test": ["pytest>=8", "pytest-benchmark>=4", "hypothesis>=6.100"]},
    entry_points={"console_scripts": ["mpsae = mpsae.cli.main:main"]},
)
