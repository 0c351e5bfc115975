"""What makes an experiment one on a language model: texts, a frozen base with an adapter, the evaluation.

May import `config`, `engine` and what is below them; knows nothing of `vision` or of the stages.
"""
