"""Triton's interpreter where there is no GPU, repaired (3.3.1 to 3.7.1) to compute as one would.

    tl.dot on bf16          multiplies the bit patterns: numpy has no bf16
    fp32 -> bf16            truncates where hardware rounds to the nearest, ties to even
    tl.maximum, tl.minimum  give NaN where hardware gives the other operand
    range(n), n an argument fails with numpy 2.4: int() of an array that has a dimension

And made twice as fast: Triton replaces its language by the interpreted one at each call of a
function by a kernel, once for each launch is enough.

Not repaired: arithmetic on bf16 outside of tl.dot works on bit patterns, so kernels convert to
fp32 right after each load. ``input_precision`` makes no difference: tl.dot is plain fp32.
"""

import os

import numpy as np
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read once, when triton is first imported

import triton.language as tl
from triton.runtime import interpreter


def _widened(handle):
    if handle.dtype.scalar != tl.bfloat16:
        return handle
    bits = handle.data.astype(np.uint32) << 16
    return interpreter.TensorHandle(bits.view(np.float32), tl.float32)


def _rounded_to_bf16(values):
    values = np.ascontiguousarray(values, dtype=np.float32)
    bits = values.view(np.uint32).astype(np.uint64)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def repair():
    """Apply the repairs, once in a process; nothing to do where kernels are compiled."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        return
    builder = interpreter.InterpreterBuilder
    if getattr(builder, "repaired", False):
        return
    builder.repaired = True
    builder.create_maxnumf = lambda self, a, b: self.binary_op(a, b, np.fmax)
    builder.create_minnumf = lambda self, a, b: self.binary_op(a, b, np.fmin)
    create_dot, cast_impl = builder.create_dot, builder.cast_impl
    patch_lang_tensor = interpreter._patch_lang_tensor

    def repaired_dot(self, a, b, d, *options):
        return create_dot(self, _widened(a), _widened(b), d, *options)

    def repaired_cast(self, source, dtype):
        if source.dtype.scalar == tl.float32 and dtype.scalar == tl.bfloat16:
            return interpreter.TensorHandle(_rounded_to_bf16(source.data), tl.bfloat16)
        return cast_impl(self, source, dtype)

    def repaired_patch(tensor, *scope):
        patch_lang_tensor(tensor, *scope)

        def index(self):
            return int(np.asarray(self.handle.data).item())

        if scope:
            scope[0].set_attr(tensor, "__index__", index)
        else:
            tensor.__index__ = index

    patch_lang, patched = interpreter._patch_lang, []

    def patch_lang_once(fn):
        modules = [value for value in fn.__globals__.values() if value is tl or value is tl.core]
        if modules in patched:
            return None
        scope = patch_lang(fn)
        if not patched and hasattr(scope, "restore"):  # the scope of a launch
            restore = scope.restore

            def restore_and_forget():
                patched.clear()
                restore()

            scope.restore = restore_and_forget
        if patched or hasattr(scope, "restore"):
            patched.append(modules)
        return scope

    interpreter._patch_lang = patch_lang_once
    builder.create_dot = repaired_dot
    builder.cast_impl = repaired_cast
    interpreter._patch_lang_tensor = repaired_patch
    object.__setattr__(
        interpreter.interpreter_builder.options,
        "allowed_dot_input_precisions",
        ("tf32", "tf32x3", "ieee", "bf16x3", "bf16x6"),
    )
