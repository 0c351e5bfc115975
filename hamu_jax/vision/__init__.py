"""Experiments on images: the unlearning request, the feed, the model and the evaluation.

May import `config`, `engine` and packages below them, but neither `language` nor `experiment`.
"""
