"""trimtab: fine-tune and run language models inside a memory budget you state.

Importing this package loads no torch: the public names are found on first use.
"""

from importlib import import_module

__version__ = "0.1.0"

_PUBLIC = {
    "Recipe": ".recipe",
    "Place": ".memory.place",
    "TrimtabError": ".errors",
    "load_model": ".model.load",
    "save_adapter": ".artifacts.adapter",
    "load_adapter": ".artifacts.adapter",
    "Full": ".methods.full",
    "LoRA": ".methods.lora",
    "Meft": ".methods.meft",
    "PaCA": ".methods.paca",
    "ParallelAdapter": ".methods.parallel_adapter",
}

__all__ = [*_PUBLIC, "__version__"]


def __getattr__(name: str):
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name], __name__), name)
    raise AttributeError(f"module 'trimtab' has no attribute {name!r}")


def __dir__():
    return sorted(__all__)
