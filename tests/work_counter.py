"""What a call really does: operators, bytes allocated, reads by the host, kernels launched.

Nothing here depends on the clock. Tensors are on the CPU, under Triton's interpreter too: what the
package does for the CPU alone, such as the look at indices before a sum, is counted as well.
"""

from __future__ import annotations

from collections import Counter
from contextlib import contextmanager

import pytest
import torch
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from mpsae.kernels import cpu_extension

# on a GPU the host waits for these: their result, or its size, is a number that it has to know
READS = {
    "_local_scalar_dense", "nonzero", "masked_select", "equal", "bincount", "_unique2",
    "unique_dim", "unique_consecutive", "repeat_interleave",
}  # fmt: skip


def _tensors(tree):
    return [t for t in tree_leaves(tree) if isinstance(t, torch.Tensor)]


def _is_view(function):
    aliases = [r.alias_info for r in function._schema.returns if r.alias_info is not None]
    return bool(aliases) and not any(alias.is_write for alias in aliases)


class Operators(TorchDispatchMode):
    """Counts operators, those within the package's own ones too, and the memory they ask for."""

    def __init__(self):
        super().__init__()
        self.calls, self.views, self.reads, self.sizes = Counter(), 0, Counter(), []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = function._schema.name
        if function.namespace == "mpsae":
            self.calls[name] += 1
            kernels = OPDEFS[name]._backend_fns
            with self:  # what the kernel calls in turn
                return kernels.get("cpu", kernels.get(None))(*args, **kwargs)
        if torch._C._dispatch_has_kernel_for_dispatch_key(
            function.name(), "CompositeImplicitAutograd"
        ):
            with self:
                return function.decompose(*args, **kwargs)
        out = function(*args, **kwargs)
        if function.namespace == "aten":  # not the profiler's marks
            self._count(function, args, kwargs, out)
        return out

    def _count(self, function, args, kwargs, out):
        if _is_view(function):
            self.views += 1
            return
        short = function._schema.name.removeprefix("aten::")
        self.calls[short] += 1
        masked = short in ("index", "index_put", "index_put_", "_index_put_impl_") and any(
            t.dtype in (torch.bool, torch.uint8) for t in _tensors(args[1])
        )
        if short in READS or masked:
            self.reads["index by mask" if masked else short] += 1
        given = {t.untyped_storage()._cdata for t in _tensors((args, kwargs))}
        made = {s._cdata: s.nbytes() for s in (t.untyped_storage() for t in _tensors(out))}
        self.sizes += [size for key, size in made.items() if key not in given]


extension_calls = Counter()


class CountedExtension:
    """The compiled extension with its calls counted, and its bf16 products on or off."""

    def __init__(self, extension, bf16):
        self._extension, self._bf16 = extension, bf16

    def __getattr__(self, name):
        function = getattr(self._extension, name)

        def counted(*args):
            extension_calls[name] += 1
            answer = function(*args)
            return (answer[0], self._bf16) if name == "describe" else answer

        return counted


def count_extension(monkeypatch, bf16):
    """Have calls of the extension counted, on a CPU that multiplies bf16 or one that does not."""
    monkeypatch.setattr(cpu_extension, "_cpu", CountedExtension(cpu_extension._cpu, bf16))


@contextmanager
def counted_launches(launches):
    """Count launches of interpreted Triton kernels by name; the interpreter's copies are not."""
    try:
        from triton.runtime.interpreter import GridExecutor
    except ImportError:  # not Linux
        yield
        return
    run = GridExecutor.__call__

    def launch(self, *args, **kwargs):
        launches[self.fn.__name__.strip("_").removesuffix("_kernel")] += 1
        with _disable_current_modes():
            return run(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GridExecutor, "__call__", launch)
        yield


def work_of(call):
    """Run ``call`` and say what it did.

    Returns:
        operators (views left out), views, bytes allocated and the largest piece, reads by the
        host, launches of Triton kernels, calls of the extension, and all operators by name.
    """
    launches = Counter()
    extension_calls.clear()
    with counted_launches(launches), Operators() as seen:
        call()
    counts = {"operators": seen.calls.total(), "views": seen.views}
    counts |= {"bytes": sum(seen.sizes), "largest": max(seen.sizes, default=0)}
    named = {"reads": seen.reads, "launches": launches, "extension": extension_calls}
    named |= {"by name": seen.calls}
    return counts | {key: dict(sorted(some.items())) for key, some in named.items() if some}
