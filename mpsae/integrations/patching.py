"""Replace one function of a host package, and give it back."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from importlib import metadata
from typing import Any


class Patch:
    """A replacement for a function of a host, put in place for the whole process.

    Args:
        package: of the host, as it is installed.
        owner: gives the module or class that holds the function; imports the host.
        name: of the function there.
        replacement: takes the same arguments.
        parameters: names that the host's function must have.
    """

    def __init__(
        self,
        package: str,
        owner: Callable[[], Any],
        name: str,
        replacement: Callable,
        parameters: Sequence[str],
    ):
        self.package, self.owner, self.name = package, owner, name
        self.replacement, self.parameters = replacement, list(parameters)
        self.replaced: Callable | None = None

    def apply(self) -> None:
        """Put the replacement in place; doing it twice is doing it once.

        Raises:
            ImportError: the host is not installed, or does not have the module.
            RuntimeError: its function has other parameters than those this was written for.
        """
        owner = self.owner()
        # static: a staticmethod is to be given back as one
        current = inspect.getattr_static(owner, self.name, None)
        if current is self.replacement:
            return
        found = None if current is None else list(inspect.signature(current).parameters)
        if found != self.parameters:
            raise RuntimeError(
                f"{self.package} {metadata.version(self.package)} is not patched: its {self.name} "
                f"takes {found}, known is {self.parameters}"
            )
        self.replaced = current
        setattr(owner, self.name, self.replacement)

    def revert(self) -> None:
        """Give the host its own function back; nothing happens where it has it."""
        if self.replaced is not None:
            setattr(self.owner(), self.name, self.replaced)
            self.replaced = None

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Patch within a context, and leave the host as it was found."""
        before = self.replaced is not None
        self.apply()
        try:
            yield
        finally:
            if not before:
                self.revert()


class Patches:
    """Several :class:`Patch` that are put in place together, or not at all."""

    def __init__(self, *patches: Patch):
        self.patches = patches

    def apply(self) -> None:
        """Put all in place; where one is refused, those before it are taken back."""
        done: list[Patch] = []
        try:
            for patch in self.patches:
                if patch.replaced is None:
                    patch.apply()
                    done.append(patch)
        except (ImportError, RuntimeError):
            for patch in done:
                patch.revert()
            raise

    def revert(self) -> None:
        """Give the host its own functions back."""
        for patch in self.patches:
            patch.revert()

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Patch within a context, and leave the host as it was found."""
        with ExitStack() as stack:
            for patch in self.patches:
                stack.enter_context(patch.applied())
            yield
