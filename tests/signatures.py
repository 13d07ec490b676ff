"""Shape signatures that hold: what the package annotates with jaxtyping is checked at every call.

The one idea: while pytest runs, a function whose annotations speak of arrays ("B T D") is compiled
with `jaxtyping.jaxtyped` around it, which binds each letter at its first argument and has beartype
compare the rest and the result. `jaxtyping.install_import_hook` does it to every function, nested
ones at each call of what holds them, at some 2 ms a function; here it is those with something to
check, once each. Outside pytest nothing of this is imported.

Fields of NamedTuples and dataclasses are not checked: JAX builds its pytrees from whatever their
leaves are mapped to, be it shapes, shardings or None.
"""

import ast
import importlib.abc
import importlib.machinery
import sys
from typing import Any

import jaxtyping
from beartype import BeartypeConf, beartype

# What an annotation must mention to be worth checking.
ARRAY_TYPES = frozenset({"Bool", "Float", "Inexact", "Int", "Integer", "Key", "Num", "Shaped"})
ARRAY_TYPES |= {f"{kind}{bits}" for kind in ("Float", "Int", "UInt") for bits in (8, 16, 32, 64)}

_beartyped = beartype(conf=BeartypeConf(is_pep484_tower=True))
checked = jaxtyping.jaxtyped(typechecker=_beartyped)


def install(package: str) -> None:
    """Has the functions of `package` checked; before any module of it is imported."""
    assert package not in sys.modules, f"{package} is imported already"
    sys.meta_path.insert(0, _Finder(package))


def _speaks_of_arrays(function: ast.FunctionDef) -> bool:
    of_arguments = [arg.annotation for arg in ast.walk(function.args) if isinstance(arg, ast.arg)]
    annotations = [node for node in (*of_arguments, function.returns) if node is not None]
    return any(
        isinstance(node, ast.Name) and node.id in ARRAY_TYPES
        for annotation in annotations
        for node in ast.walk(annotation)
    )


def _decorate(body: list[ast.stmt]) -> int:
    """Decorates functions of a module's body, and of its classes; how many it did."""
    count = 0
    for node in body:
        if isinstance(node, ast.ClassDef):
            count += _decorate(node.body)
        elif isinstance(node, ast.FunctionDef) and _speaks_of_arrays(node):
            decorator = ast.parse("__import__('tests.signatures').signatures.checked", mode="eval")
            # The innermost: custom_vjp and jit wrap the checked function, and keep what is theirs.
            node.decorator_list.append(ast.copy_location(decorator.body, node))
            count += 1
    return count


class _Loader(importlib.machinery.SourceFileLoader):
    def get_code(self, fullname: str) -> Any:
        """The module's code with its functions decorated, which no bytecode cache may hold."""
        path = self.get_filename(fullname)
        tree = ast.parse(self.get_data(path), path)
        if not _decorate(tree.body):
            return super().get_code(fullname)
        return compile(ast.fix_missing_locations(tree), path, "exec", dont_inherit=True)


class _Finder(importlib.abc.MetaPathFinder):
    def __init__(self, package: str) -> None:
        self.package = package

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        """Where Python finds the module, with a loader that decorates; None for other packages."""
        if fullname.split(".")[0] != self.package:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and isinstance(spec.loader, importlib.machinery.SourceFileLoader):
            spec.loader = _Loader(spec.loader.name, spec.loader.path)
        return spec
