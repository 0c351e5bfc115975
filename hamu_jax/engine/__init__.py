"""The step and what it is made of: objectives, the table of methods, pairing, the loop, optimizers, state.

It knows batches as what a feed delivers and models as functions, so it may import `data`, `models`, `run`
and `transforms`, but nothing that knows of images, texts or a configuration's fields.
"""
