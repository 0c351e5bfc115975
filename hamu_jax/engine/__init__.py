"""The step of all methods and the loop that runs it: objectives, methods, pairing, optimizers, state.

Batches come from a feed, and models are functions. The engine may import `data`, `models`, `run` and
`transforms`, but nothing that knows of images, texts or the fields of a configuration.
"""
