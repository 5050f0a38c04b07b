"""A package that imports its public names when they are first used, so that `fxstn --help` does without torch."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

from fxstn.tools.version import version


class LazyPackage(ModuleType):
    """The class of a package with `__all__`, its public names, and `EXPORTS`, {module: those of them that it defines}.

    A package becomes one by `sys.modules[__name__].__class__ = LazyPackage`. Reading a name of EXPORTS imports its module;
    reading the name of a submodule imports that; reading `__version__` looks that of fxstn up. Raises AttributeError for any
    other name.
    """

    EXPORTS: dict[str, list[str]]
    __all__: list[str]  # the public names, submodules among them

    def __getattr__(self, name: str) -> object:
        if name == "__version__":
            return version()
        if name.startswith("__"):  # Python asks every module for some: __path__, __wrapped__
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        for module, names in self.EXPORTS.items():
            if name in names:
                value = getattr(import_module(module), name)
                setattr(self, name, value)
                return value
        submodule = f"{self.__name__}.{name}"
        try:
            return import_module(submodule)
        except ModuleNotFoundError as error:
            if error.name != submodule:
                raise
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}") from None

    def __setattr__(self, name: str, value: object) -> None:
        # Python's import puts the module fxstn.transform where the function fxstn.transform belongs.
        if isinstance(value, ModuleType) and name in self.EXPORTS.get(value.__name__, ()):
            value = getattr(value, name)
        super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        """The public names, read or not yet, and Python's own; not what defining them takes."""
        return sorted({*self.__all__, "__version__", *(name for name in super().__dir__() if name.startswith("__"))})
