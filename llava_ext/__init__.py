"""The model side: LLaVA on transformers, with opt-in spatial interventions. Importing this package loads
nothing heavy.
"""
