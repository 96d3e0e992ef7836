"""Text generation: the options of `Engine.generate`, the rules on logits, and the searches."""

from lfx.runtime.generation.graphs import GraphGenerator
from lfx.runtime.generation.model import Cache, TextGenerator
from lfx.runtime.generation.search import generate, stream
from lfx.runtime.generation.settings import GenerationSettings, resolve
from lfx.runtime.generation.writer import TextWriter

__all__ = [
    "Cache",
    "GenerationSettings",
    "GraphGenerator",
    "TextGenerator",
    "TextWriter",
    "generate",
    "resolve",
    "stream",
]
