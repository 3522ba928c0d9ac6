"""The native engine: `firstlm.Engine`."""

from firstlm.engine.answers import Generation
from firstlm.engine.chat import Chat
from firstlm.engine.engine import Engine
from firstlm.engine.scoring import Score
from firstlm.engine.stats import EngineStats

__all__ = ["Chat", "Engine", "EngineStats", "Generation", "Score"]
