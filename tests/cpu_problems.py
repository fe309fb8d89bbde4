"""Problems for the compiled CPU kernel, with the reference's answer to them."""

from dataclasses import dataclass

import torch

from mpsae import reference
from mpsae.kernels import cpu


@dataclass
class Problem:
    x: torch.Tensor
    dictionary: torch.Tensor
    options: reference.PursuitOptions
    encoder: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    k_rows: torch.Tensor | None = None
    slices: torch.Tensor | None = None

    def reference(self, dtype=torch.float64):
        def cast(tensor):
            return None if tensor is None else tensor.to(dtype)

        return reference.matching_pursuit(
            cast(self.x),
            cast(self.dictionary),
            cast(self.encoder),
            cast(self.bias),
            self.options,
            k_rows=self.k_rows,
            slices=self.slices,
        )

    def kernel(self, method="gram", entries="int16", isa="", **more):
        gram = None
        if method == "gram":
            gram = cpu.build_gram(self.dictionary, self.encoder, entries=entries, isa=isa)
        o = self.options
        return cpu.gram_pursuit(
            self.x, self.dictionary, self.encoder, self.bias, gram,
            k=o.k, k_rows=self.k_rows, slices=self.slices,
            residual_threshold=o.residual_threshold, correlation_threshold=o.threshold,
            stop_on_repeat=o.stop_on_repeat, allow_repeats=o.allow_repeats, select=o.select,
            method=method, isa=isa, **more,
        )  # fmt: skip


def gaussian(B, d, n, seed, untied=False, bias=False, **options) -> Problem:
    g = torch.Generator().manual_seed(seed)

    def atoms():
        # norms drift in training: between 0.9 and 1.1
        rows = torch.nn.functional.normalize(torch.randn(n, d, generator=g), dim=1)
        return rows * (0.9 + 0.2 * torch.rand(n, 1, generator=g))

    return Problem(
        torch.randn(B, d, generator=g),
        atoms(),
        reference.PursuitOptions(**options),
        encoder=atoms() if untied else None,
        bias=torch.randn(n, generator=g) * 0.05 if bias else None,
    )
