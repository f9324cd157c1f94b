"""The model: interventions, the subclasses of transformers' LLaVA, and how they are put together."""
