"""Experiments on language models: texts, a frozen base with an adapter, and the evaluation.

May import `config`, `engine` and packages below them, but neither `vision` nor `experiment`.
"""
