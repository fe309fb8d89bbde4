"""Inputs and comparisons that the tests of the pursuit share."""

import torch

from mpsae.kernels import cpu

# RMS of the difference over RMS of the expected, by dtype of the inputs: fp64 has rounding only
# (1e-16 a term, some hundred terms); fp32 likewise at 6e-8; 16-bit results are rounded once.
TOLERANCE = {
    torch.float64: 1e-10,
    torch.float32: 1e-5,
    torch.bfloat16: 5e-3,
    torch.float16: 1e-3,
}


def problem(B, d, n, dtype=torch.float64, seed=0, unit=True):
    """Random rows and atoms; atoms of unit norm, or of norms from 0.5 to 1.5."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(B, d, dtype=torch.float64, generator=generator)
    dictionary = torch.randn(n, d, dtype=torch.float64, generator=generator)
    dictionary = torch.nn.functional.normalize(dictionary, dim=1)
    if not unit:
        dictionary *= 0.5 + torch.rand(n, 1, dtype=torch.float64, generator=generator)
    return x.to(dtype), dictionary.to(dtype)


def rms_ratio(actual, expected):
    """RMS of the difference over RMS of the expected."""
    error = (actual.double() - expected.double()).square().mean().sqrt()
    return (error / expected.double().square().mean().sqrt().clamp_min(1e-300)).item()


def assert_rms_close(actual, expected, tolerance):
    assert actual.shape == expected.shape
    if expected.numel() and (expected != 0).any():
        assert rms_ratio(actual, expected) <= tolerance
    else:
        assert (actual == 0).all()


def instruction_sets():
    """Names of those that the compiled extension can use here."""
    names = []
    for name in ("avx512", "avx2", "plain") if cpu.available() else ():
        try:
            names.append(cpu.instruction_set(name)[0])
        except ValueError:  # not of this CPU
            continue
    return names or [""]
