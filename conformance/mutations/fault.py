"""What a fault is: a few characters changed in a package's source, and what then goes wrong.

A fault planted in a backend is a second copy of the whole package, compiled from the changed
source; the real package's modules are never touched. A fault of Bridge's own files stands in for
them while it lasts (`standing_in`). Either way nothing of one fault is left over for the next. An
edit must fit its file in exactly one place: a fault that no longer fits the code is an error.
"""

import atexit
import importlib
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any, NamedTuple
from unittest.mock import patch


class Edit(NamedTuple):
    """`old`, which stands once in a module of the package, becomes `new`. Module `fused.c` is the
    C source of the torch backend's fused step."""

    module: str
    old: str
    new: str


class Fault:
    """One mistake that an implementer could make.

    `harm`: what goes wrong, for whom. `clause`: that it breaks. `check`: that must catch it, a name
    in CHECKS or a golden vector's; in `dtype`. `through`: the backend that runs a fault of Bridge's
    own files.
    """

    def __init__(
        self,
        name: str,
        harm: str,
        clause: str,
        check: str,
        *edits: Edit,
        dtype: str = "float32",
        package: str = "bridge_torch",
        through: str = "bridge_torch",
    ) -> None:
        self.name, self.harm, self.clause, self.check = name, harm, clause, check
        self.edits, self.dtype, self.package, self.through = edits, dtype, package, through

    def plant(self) -> dict[str, ModuleType]:
        """The package's modules, by name within it, with this fault in them.

        A fault of torch's plain decoding step needs that to be run: the fused one is then left out.
        So does one of its loop on the device, which then runs on the CPU.
        """
        in_python = [edit for edit in self.edits if edit.module != "fused.c"]
        modules = load_package(self.package, in_python)
        if self.package == "bridge_torch":
            fused = modules["fused"]
            if in_python:
                fused.__dict__["kernels"] = lambda: None
                if any(edit.module == "ahead" for edit in in_python):
                    modules["ahead"].__dict__["serves"] = lambda device: True
            else:
                fused.__dict__["SOURCE"] = _edited(fused.__dict__["SOURCE"], self.edits)
                fused.__dict__["OPTIONS"] = ("-O0", "-fPIC")  # wrong as it is, and soon compiled
        return modules


class StaleFault(Exception):
    """An edit does not fit the source: the code has changed since the fault was written."""


def _edited(source: Path, edits: Sequence[Edit]) -> Path:
    """A copy of a file that is no module, with edits made; it goes when the process does."""
    text = source.read_text()
    for edit in edits:
        text = replaced(text, edit, source)
    scratch = TemporaryDirectory()
    atexit.register(scratch.cleanup)
    copy = Path(scratch.name, source.name)
    copy.write_text(text)
    return copy


def replaced(source: str, edit: Edit, path: Path | str) -> str:
    """The source with one edit made. Raises StaleFault where it does not fit."""
    if source.count(edit.old) != 1:
        raise StaleFault(f"{path} has {source.count(edit.old)} places for {edit.old!r}")
    return source.replace(edit.old, edit.new)


def load_package(package: str, edits: Sequence[Edit] = ()) -> dict[str, ModuleType]:
    """A copy of `package` of its own, with `edits` made. Raises StaleFault where one does not fit.

    Its modules import each other, not the real ones, since they are imported under the same names
    while the real ones are put aside. They must import each other at their tops, and only there.
    """

    def ours(name: str) -> bool:
        return name == package or name.startswith(f"{package}.")

    aside = {name: sys.modules.pop(name) for name in list(sys.modules) if ours(name)}
    finder = _Finder(package, edits)
    sys.meta_path.insert(0, finder)
    try:
        for module in ["backend", *(edit.module for edit in edits)]:
            importlib.import_module(f"{package}.{module}")
        loaded = {name: sys.modules[name] for name in list(sys.modules) if ours(name)}
    finally:
        sys.meta_path.remove(finder)
        for name in list(sys.modules):
            if ours(name):
                del sys.modules[name]
        sys.modules.update(aside)
    return {name.removeprefix(f"{package}."): module for name, module in loaded.items()}


@contextmanager
def standing_in(edits: Sequence[Edit], package: str = "bridge") -> Iterator[None]:
    """For as long as this lasts, whoever has a function or class of an edited module has that of
    the edited source. Raises StaleFault where an edit does not fit.

    A second copy of all of Bridge would have an error class and a contract of its own, which
    neither conformance nor a backend would know.
    """
    with ExitStack() as stack:
        for module in dict.fromkeys(edit.module for edit in edits):
            real = importlib.import_module(f"{package}.{module}")
            path = str(real.__file__)
            changed = ModuleType(real.__name__)
            loader = _Loader(real.__name__, path, [e for e in edits if e.module == module])
            loader.exec_module(changed)
            for holder, name, value in _held(vars(real).values(), of=real.__name__):
                new = getattr(changed, value.__name__)
                stack.enter_context(patch.object(holder, name, new))
        yield


def _held(values: Iterable[Any], of: str) -> list[tuple[ModuleType, str, Any]]:
    """Which modules hold what of these values module `of` defines, and under which names."""
    defined = [value for value in values if getattr(value, "__module__", None) == of]
    return [
        (holder, name, value)
        for holder in list(sys.modules.values())
        for name, value in list(vars(holder).items())
        if holder.__name__.startswith("bridge") and any(value is one for one in defined)
    ]


class _Finder:
    """Finds the modules of one package where they are, and loads them with edits."""

    def __init__(self, package: str, edits: Sequence[Edit]) -> None:
        self.package, self.edits = package, edits

    def find_spec(self, name: str, path=None, target=None) -> ModuleSpec | None:
        package, _, module = name.partition(".")
        if package != self.package:
            return None
        spec = PathFinder.find_spec(name, path)
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            edits = [edit for edit in self.edits if edit.module == module]
            spec.loader = _Loader(name, spec.loader.path, edits)
        return spec


class _Loader(SourceFileLoader):
    def __init__(self, name: str, path: str, edits: Sequence[Edit]) -> None:
        super().__init__(name, path)
        self.edits = edits

    def path_stats(self, path: str):
        raise OSError("edited source has no cached bytecode")

    def get_data(self, path: str) -> bytes:
        source = super().get_data(path).decode()
        for edit in self.edits:
            source = replaced(source, edit, path)
        return source.encode()
