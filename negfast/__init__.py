"""negfast: LLM recommenders that know what users will dislike.

`load` opens a finished run; `prepare`, `train`, `evaluate` and `export` are the commands. `negfast.api` has them
all. They are imported when they are first asked for: ``import negfast`` alone takes no time.
"""

import inspect
from importlib import import_module
from importlib.metadata import version
from types import ModuleType
from typing import TYPE_CHECKING, Any

from negfast.errors import InputError

if TYPE_CHECKING:
    from negfast.api import Run, Scores, evaluate, export, load, prepare, train

__all__ = ["InputError", "Run", "Scores", "__version__", "evaluate", "export", "load", "prepare", "train"]
__version__ = version("negfast")

CALLABLE = ("evaluate", "prepare", "train")  # packages that are also functions


class CallablePackage(ModuleType):
    """A package that can be called: ``negfast.train`` is one, and ``negfast.train(...)`` is `negfast.api.train`."""

    def __call__(self, *args: Any, **options: Any) -> Any:
        return self._function(*args, **options)

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self._function)

    @property
    def _function(self) -> Any:
        return getattr(import_module("negfast.api"), self.__name__.rpartition(".")[2])


def __getattr__(name: str) -> Any:
    if name in CALLABLE:
        return import_module(f"negfast.{name}")
    if name in __all__:
        return getattr(import_module("negfast.api"), name)
    raise AttributeError(f"module 'negfast' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *__all__]
