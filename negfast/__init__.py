"""negfast: LLM recommenders that know what users will dislike."""

from importlib.metadata import version

__version__ = version("negfast")
