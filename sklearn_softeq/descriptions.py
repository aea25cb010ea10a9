"""Values in words that are the same in another process, and differ where the values do.

Numbers, strings and containers are written out. Anything else is its name and a digest of what it
consists of: bytecode, defaults and closure of a function, numbers of an array, and of any other
object its class and what ``pickle`` would keep of it. No address and no order of a set comes in.
"""

import copyreg
import dis
import functools
import pickle
import sys
from collections.abc import Iterator
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch

from .records import digest

__all__ = ["IndescribableError", "described"]

#: Types whose ``repr`` is the same in another process, and of no other value.
PLAIN = (type(None), bool, int, float, complex, str, bytes)

#: Of a digest so many hexadecimal digits are shown, and compared.
DIGITS = 16

#: The flag of classes whose attributes cannot be set: ``Py_TPFLAGS_IMMUTABLETYPE``.
IMMUTABLE = 1 << 8

#: Instructions that look up a name in a module.
LOADS = ("LOAD_GLOBAL", "LOAD_NAME")


class IndescribableError(TypeError):
    """A value cannot be known again in another process."""


def described(value: Any) -> str:
    """A value in words that are the same in another process, and differ where the value does.

    Parameters
    ----------
    value : object
        Of a function count bytecode, defaults, attributes, closure, and the constants and functions
        of its own module that it names, not what it finds elsewhere; of an instance its class, with
        the bytecode of its methods, and what ``pickle`` would keep of it. Order counts in lists,
        tuples and subclasses of dictionaries, not in dictionaries and sets.

    Returns
    -------
    str
        Bytecode is that of one version of Python.

    Raises
    ------
    IndescribableError
        If there are no such words, as for a lock, an open file or a generator.
    """
    try:
        return _Describer()(value)
    except RecursionError as error:
        raise IndescribableError(f"{_name(type(value))} is nested too deeply") from error


class _Describer:
    """Describes one value, with all that is in it."""

    def __init__(self) -> None:
        self.path: list[int] = []  # what is being described, from the outside to the inside

    def __call__(self, value: Any) -> str:
        if type(value) in PLAIN:
            return repr(value)
        if id(value) in self.path:  # a function that calls itself, or a container in itself
            return f"<{len(self.path) - self.path.index(id(value))} above>"
        self.path.append(id(value))
        try:
            return self._container(value) or self._numbers(value) or self._code(value)
        finally:
            self.path.pop()

    def _container(self, value: Any) -> str:
        """One that is exactly what its class says, or an empty string."""
        if type(value) is dict:
            entries = sorted((self(k), self(v)) for k, v in value.items())
            return "{" + ", ".join(f"{k}: {v}" for k, v in entries) + "}"
        if type(value) is list:
            return "[" + ", ".join(map(self, value)) + "]"
        if type(value) is tuple:
            return "(" + ", ".join(map(self, value)) + ")"
        if type(value) in (set, frozenset):
            return f"{type(value).__name__}(" + ", ".join(sorted(map(self, value))) + ")"
        return ""

    def _numbers(self, value: Any) -> str:
        """What holds numbers of NumPy's or torch's, or an empty string."""
        if isinstance(value, np.generic) and type(value.item()) in PLAIN:
            return f"{value.dtype}({value.item()!r})"
        if isinstance(value, np.random.RandomState):
            name, keys, *rest = value.get_state(legacy=True)
            return (
                f"a RandomState in the state {digest((name, np.asarray(keys).tolist(), *rest))[:8]}"
            )
        if isinstance(value, torch.Generator):
            return f"{_name(type(value))} {self(value.get_state())}"
        if isinstance(value, torch.Tensor) and value.layout is torch.strided:
            content = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
            return self._digested(value, value.dtype, tuple(value.shape), content.tobytes())
        if type(value) in (np.ndarray, np.memmap) and not value.dtype.hasobject:
            return self._digested(value, value.dtype.descr, value.shape, value.tobytes())
        return ""

    def _code(self, value: Any) -> str:
        """What is code or has a class: all that is left."""
        match value:
            case FunctionType():
                return f"{_name(value)} {_short(self(_parts_of_function(value)))}"
            case CodeType():
                return _short(self(_parts_of_code(value)))
            case MethodType():
                return f"{self(value.__func__)} of {self(value.__self__)}"
            case ModuleType():
                return value.__name__
            case type():
                return self._class(value)
            case functools.partial() if type(value) is functools.partial and not vars(value):
                parts = self(value.func), self(value.args), self(value.keywords)
                return f"partial({', '.join(parts)})"
        return self._instance(value)

    def _class(self, cls: type) -> str:
        """A class by its name and methods.

        One that is not found under its name has been made by a function, which may make others of
        that name; what differs between them are constants, defaults and closures.
        """
        if cls.__flags__ & IMMUTABLE:  # of C's
            return _name(cls)
        found = _found(cls.__module__, cls.__qualname__) is cls
        whole = not found or cls.__module__ == "__main__"
        content: dict[str, Any] = {}
        for name, part in vars(cls).items():
            functions = _functions_of(part)
            if functions:
                content[name] = functions if whole else [f.__code__ for f in functions]
            elif whole and not name.startswith("__") and _constant(part):
                content[name] = part
        if not content:
            return f"{_name(cls)} of {self(cls.__bases__)}"
        return f"{_name(cls)} {_short(self((content, cls.__bases__)))}"

    def _instance(self, value: Any) -> str:
        """By its class and what ``pickle`` would keep."""
        reduce = copyreg.dispatch_table.get(type(value))
        try:
            found = value.__reduce_ex__(4) if reduce is None else reduce(value)
        except Exception as error:
            raise IndescribableError(f"of {_name(type(value))} nothing can be kept") from error
        if isinstance(found, str):
            return self._of_that_name(value, found)
        parts = [list(part) if isinstance(part, Iterator) else part for part in found]
        return self._digested(value, *parts)

    def _of_that_name(self, value: Any, name: str) -> str:
        module = pickle.whichmodule(value, name)  # type: ignore[attr-defined]
        if _found(module, name) is not value:
            raise IndescribableError(f"{module}.{name} is another object")
        return f"{module}.{name}"

    def _digested(self, value: Any, *parts: Any) -> str:
        return f"{_name(type(value))} {_short(self((type(value), parts)))}"


def _short(text: str) -> str:
    return digest(text)[:DIGITS]


def _name(value: Any) -> str:
    return f"{value.__module__}.{value.__qualname__}"


def _found(module: str, name: str) -> Any:
    """What stands under a name in a module, if anything does."""
    value: Any = sys.modules.get(module)
    for part in name.split("."):
        value = getattr(value, part, None)
    return value


def _functions_of(part: Any) -> list[FunctionType]:
    """Functions that an attribute of a class is made of."""
    parts: list[Any]
    match part:
        case staticmethod() | classmethod():
            parts = [part.__func__]
        case property():
            parts = [part.fget, part.fset, part.fdel]
        case _:
            parts = [part]
    return [function for function in parts if isinstance(function, FunctionType)]


def _parts_of_code(code: CodeType) -> tuple:
    """What decides what it does; not where it stands in its file."""
    counts = code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_flags
    names = code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars
    return code.co_code, code.co_exceptiontable, code.co_consts, counts, names


def _parts_of_function(function: FunctionType) -> tuple:
    named = {name: function.__globals__.get(name) for name in _global_names(function.__code__)}
    counted = {
        name: value
        for name, value in named.items()
        if _constant(value)
        or (isinstance(value, FunctionType) and value.__module__ == function.__module__)
    }
    return (
        function.__code__,
        function.__defaults__,
        function.__kwdefaults__,
        [_content(cell) for cell in function.__closure__ or ()],
        counted,
        vars(function),
    )


def _content(cell: Any) -> Any:
    try:
        return [cell.cell_contents]
    except ValueError:  # nothing has been assigned yet
        return None


def _global_names(code: CodeType) -> set[str]:
    """Names that it, or a function within it, looks up in its module."""
    loads = (i.argval for i in dis.get_instructions(code) if i.opname in LOADS)
    inner = (c for c in code.co_consts if isinstance(c, CodeType))
    return set(loads).union(*map(_global_names, inner))


def _constant(value: Any) -> bool:
    """Whether it is plain, and cannot be changed."""
    if type(value) is tuple:
        return all(map(_constant, value))
    return type(value) in PLAIN or isinstance(value, np.generic)
