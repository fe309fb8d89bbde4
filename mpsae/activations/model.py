"""Language models and their hookpoints: record what a module passes on, or put something else."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

EMBEDDED = "stdlib_lm"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def embedded_model_path() -> Path:
    """Folder of the small causal language model that ships with the package."""
    return Path(__file__).parent.parent / "assets" / EMBEDDED


def load_language_model(
    name: str | Path = EMBEDDED,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    trust_remote_code: bool = False,
) -> tuple[Any, Any]:
    """Load a transformers model and its tokenizer.

    Args:
        name: hub id, local folder, or ``"stdlib_lm"`` for the embedded model.
        device: where to put the model.
        dtype: of its weights.
        trust_remote_code: run the code that its repository brings, where it brings any.

    Returns:
        The model in evaluation mode, without gradients (a causal one with its head, any other as
        its bare encoder), and its tokenizer.

    Raises:
        OSError: it cannot be reached or read; the message says what can be passed instead.
    """
    import transformers

    path = embedded_model_path() if name == EMBEDDED else name
    try:
        auto, _ = _kind(path, trust_remote_code)
        version = int(transformers.__version__.split(".")[0])
        option = {"dtype" if version >= 5 else "torch_dtype": dtype}
        trust = {"trust_remote_code": trust_remote_code}
        model: Any = auto.from_pretrained(path, **option, **trust)
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, **trust)
    except Exception as error:
        raise _unreadable(name, error) from error
    return model.to(device).eval().requires_grad_(False), tokenizer


def empty_model(name: str | Path = EMBEDDED, *, trust_remote_code: bool = False) -> Any:
    """Make a transformers model without its weights, on the meta device: shapes alone.

    Raises:
        OSError: its configuration cannot be reached or read.
    """
    try:
        path = embedded_model_path() if name == EMBEDDED else name
        auto, config = _kind(path, trust_remote_code)
        with torch.device("meta"):
            return (
                auto.from_config(config, trust_remote_code=trust_remote_code)
                .eval()
                .requires_grad_(False)
            )
    except Exception as error:
        raise _unreadable(name, error) from error


def _kind(path: str | Path, trust_remote_code: bool) -> tuple[Any, Any]:
    """Read a model's configuration, and say which class of transformers loads it."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    kinds = getattr(config, "architectures", None) or []
    causal = any(kind.endswith(("ForCausalLM", "LMHeadModel")) for kind in kinds)
    return transformers.AutoModelForCausalLM if causal else transformers.AutoModel, config


def _unreadable(name: str | Path, error: Exception) -> OSError:
    return OSError(
        f"cannot load the model {str(name)!r} ({type(error).__name__}: {error}); pass a hub id "
        f"that this machine can reach, a local folder of transformers, or {EMBEDDED}"
    )


def is_causal(model: Any) -> bool:
    """Say whether the model predicts the next token (and so has a cross-entropy to recover)."""
    return model.get_output_embeddings() is not None and not getattr(
        model.config, "is_encoder_decoder", False
    )


def reach_of(model: Any) -> int | None:
    """Longest sequence that the model has positions for; None where it does not say."""
    return getattr(model.config, "max_position_embeddings", None)


def check_context(model: Any, context: int) -> None:
    """Raise ValueError where sequences are longer than the model's positions reach."""
    reach = reach_of(model)
    if reach is not None and context > reach:
        raise ValueError(f"context={context} exceeds the {reach} positions of this model")


def resolve_hookpoint(model: Any, hookpoint: str) -> tuple[nn.Module, bool]:
    """Find the module of a hookpoint such as ``layers.10``, ``layers.10.mlp`` or its input.

    Args:
        model: of transformers.
        hookpoint: path of a module, from the bare model (``layers.10``) or from the whole one
            (``model.layers.10``). The module's output is meant, or with ``:input`` behind the path
            what goes into it.

    Returns:
        The module, and whether its input is meant.

    Raises:
        ValueError: there is no such module; the message says which there are.
    """
    path, _, suffix = hookpoint.partition(":")
    if suffix not in ("", "input"):
        raise ValueError(f"hookpoint {hookpoint!r} ends in ':{suffix}', where only ':input' can be")
    for root in (model.base_model, model):
        try:
            if path:
                return root.get_submodule(path), suffix == "input"
        except AttributeError:
            continue
    raise ValueError(
        f"no module {path!r} in {type(model).__name__}; it has {_hookpoints(model.base_model)}"
    )


def _hookpoints(root: nn.Module) -> str:
    """Describe the layers of a model in a few words."""
    for name, module in root.named_modules():
        if isinstance(module, nn.ModuleList) and len(module):
            inside = ", ".join(f"{name}.N.{child}" for child, _ in module[0].named_children())
            return f"{name}.0 to {name}.{len(module) - 1} (also {inside})"
    return ", ".join(name for name, _ in root.named_children())


def widths(model: Any, hookpoints: Sequence[str]) -> dict[str, int]:
    """Find how many features each hookpoint passes on; the model may be on the meta device."""
    probe = torch.zeros(1, 2, dtype=torch.int64)
    with _AnswerMeta():
        found = record(model, hookpoints, probe, torch.ones_like(probe))
    return {name: rows.shape[-1] for name, rows in found.items()}


class _AnswerMeta(TorchFunctionMode):
    """Say True where a model looks at a tensor without numbers, as for the mask of a whole text."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (Tensor.item, Tensor.__bool__) and args[0].is_meta:
            return True
        return func(*args, **(kwargs or {}))


class _AllRecorded(Exception):
    """Raised inside the model once the last hookpoint has been passed."""


@torch.no_grad()
def record(
    model: Any, hookpoints: Sequence[str], ids: Tensor, attention: Tensor
) -> dict[str, Tensor]:
    """Run the model once and keep the activations of several hookpoints.

    Args:
        model: of transformers; layers behind the last hookpoint are not run.
        hookpoints: see :func:`resolve_hookpoint`.
        ids, attention: ``[S, context]``.

    Returns:
        ``[S, context, d]`` for each hookpoint, in the order given.

    Raises:
        ValueError: a hookpoint's activations are not of that shape, or it was never reached.
    """
    return _run(model, hookpoints, ids, attention, to_the_end=False)[0]


@torch.no_grad()
def run(
    model: Any, hookpoints: Sequence[str], ids: Tensor, attention: Tensor
) -> tuple[dict[str, Tensor], Any]:
    """Run the model to its end: what :func:`record` gives, and what the model returns."""
    return _run(model, hookpoints, ids, attention, to_the_end=True)


def _run(
    model: Any, hookpoints: Sequence[str], ids: Tensor, attention: Tensor, *, to_the_end: bool
) -> tuple[dict[str, Tensor], Any]:
    found: dict[str, Tensor] = {}

    def keep(name: str, hidden: Tensor) -> None:
        shape = getattr(hidden, "shape", ())
        if len(shape) != 3 or shape[:2] != ids.shape:
            raise ValueError(
                f"hookpoint {name!r} passes on {list(shape) or type(hidden).__name__}, "
                f"not [{ids.shape[0]}, {ids.shape[1]}, features]"
            )
        found[name] = hidden
        if len(found) == len(set(hookpoints)) and not to_the_end:
            raise _AllRecorded

    handles = [_hook(model, name, partial(keep, name)) for name in dict.fromkeys(hookpoints)]
    output, device = None, model.device
    try:
        output = model(
            input_ids=ids.to(device), attention_mask=attention.to(device), use_cache=False
        )
    except _AllRecorded:
        pass
    finally:
        for handle in handles:
            handle.remove()
    missing = [name for name in hookpoints if name not in found]
    if missing:
        raise ValueError(f"the model never runs {', '.join(missing)}")
    return {name: found[name] for name in hookpoints}, output


@contextmanager
def replace(model: Any, functions: Mapping[str, Callable[[Tensor], Tensor]]) -> Iterator[None]:
    """Within the context, put each hookpoint's activations through a function.

    Args:
        model: of transformers.
        functions: ``[S, context, d] -> [S, context, d]`` for each hookpoint.
    """
    handles = [_hook(model, name, function) for name, function in functions.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hook(model: Any, hookpoint: str, function: Callable[[Tensor], Tensor | None]) -> Any:
    """Call the function with a hookpoint's activations; what it returns takes their place."""
    module, on_input = resolve_hookpoint(model, hookpoint)

    def before(_module, args, kwargs):
        if args:
            new = function(args[0])
            return None if new is None else ((new, *args[1:]), kwargs)
        first = next(iter(kwargs))
        new = function(kwargs[first])
        return None if new is None else (args, {**kwargs, first: new})

    def after(_module, _args, output):
        hidden = output[0] if isinstance(output, tuple) else output
        new = function(hidden)
        if new is None:
            return None
        return (new, *output[1:]) if isinstance(output, tuple) else new

    if on_input:
        return module.register_forward_pre_hook(before, with_kwargs=True)
    return module.register_forward_hook(after)
