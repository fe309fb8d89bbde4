"""Build: the folder kernels/ is installed as mpsae.kernels (see CONTRIBUTING.md)."""

import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup

WINDOWS = sys.platform == "win32"
CSRC = Path("kernels/csrc")

cpu_kernel = Extension(
    "mpsae.kernels._cpu",
    sources=sorted(path.as_posix() for path in CSRC.glob("*.cpp")),
    depends=sorted(path.as_posix() for path in CSRC.glob("*.h")),
    # no -march: each file names its own instruction set, and the CPU at hand decides
    extra_compile_args=["/O2", "/std:c++17"]
    if WINDOWS
    else ["-O3", "-std=c++17", "-fno-math-errno", "-fvisibility=hidden", "-pthread", "-g0"],
    extra_link_args=[] if WINDOWS else ["-pthread"],
    libraries=["dl"] if sys.platform == "linux" else [],  # in libc from glibc 2.34 on
    language="c++",
    optional=True,  # without a compiler the package works, more slowly
)

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
    ext_modules=[cpu_kernel],
    package_data={
        "mpsae.assets": ["stdlib_lm/*"],
        "mpsae": ["py.typed"],
        "mpsae.report": ["page.*"],
    },
    install_requires=[
        "torch>=2.6",
        "triton>=3.3; platform_system == 'Linux'",
        "transformers>=4.46",
        "huggingface_hub>=0.23",
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
