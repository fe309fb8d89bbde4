"""Build of the optional CPU extension; everything else is in pyproject.toml."""

import sys

from setuptools import Extension, setup

SOURCES = ["module", "driver", "pursue", "session", "plain", "avx2", "avx512", "product_bf16"]
HEADERS = ["problem", "driver", "rows", "simd", "pursuit", "gram", "backward", "table"]
FLAGS = (
    ["/O2", "/std:c++17"]
    if sys.platform == "win32"
    # no -march: each file names its own instruction set, and the CPU at hand decides
    else ["-O3", "-std=c++17", "-fno-math-errno", "-fvisibility=hidden", "-pthread", "-g0"]
)

cpu = Extension(
    "mpsae.kernels._cpu",
    sources=[f"kernels/csrc/{name}.cpp" for name in SOURCES],
    depends=[f"kernels/csrc/{name}.h" for name in HEADERS],
    extra_compile_args=FLAGS,
    extra_link_args=[] if sys.platform == "win32" else ["-pthread"],
    libraries=["dl"] if sys.platform == "linux" else [],  # in libc from glibc 2.34 on
    language="c++",
    optional=True,
)

setup(
    name="mpsae",
    packages=["mpsae", "mpsae.kernels"],
    package_dir={"mpsae": "mpsae", "mpsae.kernels": "kernels"},
    ext_modules=[cpu],
)
