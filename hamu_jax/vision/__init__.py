"""What makes an experiment one on images: the unlearning request, the feed, the model, the evaluation.

May import `config`, `engine` and what is below them; knows nothing of `language` or of the stages.
"""
