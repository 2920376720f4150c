"""High-Fidelity Pruning of LLaMA-like language models, as a reproducible pipeline.

In Python: `hfprune.prune(model, tokenizer, texts, ratio=0.2)` and its pieces, see `hfprune.api`.
"""

__version__ = "0.1.0"
__all__ = ["allocate", "cut", "fidelity", "prune", "refit", "sample", "score"]


def __getattr__(name: str) -> object:
    """A name of the Python interface, imported when it is asked for: the package itself imports nothing."""
    if name in __all__:
        from hfprune import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
