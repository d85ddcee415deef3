"""A policy as a model of its own: a decoder of L + K layers that `qadapter export` writes.

`config` what is in its config.json; `model` the transformers model. Importing either registers it
with transformers' auto classes; `import qadapter` sees to that (see `qadapter.registration`).
Neither needs peft.
"""
